// Package vmm is a small virtual machine monitor on Linux KVM for x86-64: it
// runs a guest in the calling process, stops it between two instructions, gives
// out everything that KVM and its own devices know about it as plain data, and
// goes on from such data in another process.
//
//	        New            Start             guest ends, fails
//	(none) -----> Created ---------> Running -----------------> Ended
//	        Restore                  |    ^                       ^
//	(none) -----> Paused   <---------'    |                       |
//	                |  ^      Pause       |        Close          |
//	                |  '------------------'  ---------------------'
//	                '------- Resume -------^   (from any state)
//
// A VM is made of guest memory (package memory), vCPUs, KVM's in-kernel
// interrupt controllers and timers, a serial console, and ports for reset and
// power-off. One goroutine, locked to its thread, owns each vCPU and alone makes
// its system calls.
//
// All methods of VM may be called from several goroutines.
//
// On other systems and processors the package compiles, State and its encoding
// work, and New, Restore and Probe return ErrNotSupported.
package vmm
