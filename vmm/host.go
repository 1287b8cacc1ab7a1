package vmm

// Host is what Probe found out about this machine.
type Host struct {
	MaxVCPUs    int    // of one VM
	MemoryBytes uint64 // of the host, in all
	// Interpreted is set when KVM has no hardware virtualization behind it and
	// interprets kernel-mode code: operating systems do not run, small guests do.
	// It is nil or a HostError of kind ErrInterpreted.
	Interpreted error
	// Lazy is nil when guest memory can be paged in while the guest runs, and
	// otherwise a HostError of kind ErrNoUserfaultfd; an eager resume works
	// nevertheless.
	Lazy error
}
