// Package kvm is the system-call layer over /dev/kvm: the only code of this
// module that makes KVM's ioctls. It holds no policy: which state is saved, in
// which order, and what an exit means to a machine is decided by its caller.
//
// # Objects
//
// A [System] is an open /dev/kvm, a [VM] is what KVM_CREATE_VM returned, and a
// [VCPU] is a virtual processor with its mapped kvm_run page. Each owns a file
// descriptor, which Close releases; Close may be called again. They hold no
// reference to each other: closing a VM leaves its vCPUs' descriptors open, and
// the kernel keeps the machine until the last of them is closed.
//
// # Concurrency
//
// System and VM may be used by several goroutines, Close excepted. All methods
// of a VCPU belong to the goroutine that runs it, which must be locked to its
// thread (KVM expects the ioctls of a vCPU from one thread), with two
// exceptions that any goroutine may call at any time, Close included:
// [VCPU.Kick] and [VCPU.SetImmediateExit].
//
// # Rules that the code here keeps
//
//   - A pointer becomes a uintptr in the call expression of unix.Syscall and
//     nowhere else, so that the collector sees it during the call. Structs that
//     carry an address to the kernel keep it as an unsafe.Pointer.
//   - unix.Syscall, never RawSyscall: KVM_RUN may last for ever and touches guest
//     memory that a pager of this very process may have to provide, so the
//     scheduler must know that the thread is in the kernel.
//   - EINTR of KVM_RUN is a result (a kick must be seen) and not retried; EINTR
//     of KVM_CREATE_VM only says that a signal arrived, and is.
//   - A short count from KVM_GET_MSRS or KVM_SET_MSRS is an error.
//   - Every struct and request number is compared with the kernel's headers by
//     a test (testdata/layout.txt).
//
// Sources: Documentation/virt/kvm/api.rst of the Linux kernel for meaning, and
// include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h for layout.
//
// # What comes from gokvm
//
// The plain ABI structs whose layout is right, and the capability, exit and
// multiprocessing constants, are those of github.com/bobuhiro11/gokvm/kvm
// (MIT). None of its functions is used. README.md has the table of what was
// taken and what was not, with the reasons.
//
// The package is empty on systems other than linux/amd64.
package kvm
