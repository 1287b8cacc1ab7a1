package confine

import "golang.org/x/sys/unix"

// freeCalls are the system calls that are allowed with any arguments, by what needs them. They were found by tracing the
// command and the tests of the engine, and by reading the Go runtime, package os and net, SQLite, and what glibc's threads
// do in programs with cgo. A filter without conditions costs nothing: the kernel remembers what it says.
var freeCalls = [][]uint32{
	{ // files
		unix.SYS_ACCESS, unix.SYS_CLOSE, unix.SYS_COPY_FILE_RANGE, unix.SYS_DUP, unix.SYS_DUP3, unix.SYS_FACCESSAT,
		unix.SYS_FACCESSAT2, unix.SYS_FADVISE64, unix.SYS_FALLOCATE, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHOWN,
		unix.SYS_FCNTL, unix.SYS_FDATASYNC, unix.SYS_FLOCK, unix.SYS_FSTAT, unix.SYS_FSTATFS, unix.SYS_FSYNC,
		unix.SYS_FTRUNCATE, unix.SYS_GETCWD, unix.SYS_GETDENTS64, unix.SYS_LINK, unix.SYS_LINKAT, unix.SYS_LSEEK,
		unix.SYS_LSTAT, unix.SYS_MKDIR, unix.SYS_MKDIRAT, unix.SYS_NEWFSTATAT, unix.SYS_OPEN, unix.SYS_OPENAT,
		unix.SYS_OPENAT2, unix.SYS_PREAD64, unix.SYS_PREADV, unix.SYS_PWRITE64, unix.SYS_PWRITEV,
		unix.SYS_READ, unix.SYS_READLINK, unix.SYS_READLINKAT, unix.SYS_READV, unix.SYS_RENAME,
		unix.SYS_RENAMEAT, unix.SYS_RMDIR, unix.SYS_SENDFILE, unix.SYS_SPLICE, unix.SYS_STAT,
		unix.SYS_STATFS, unix.SYS_STATX, unix.SYS_SYNC_FILE_RANGE, unix.SYS_UNLINK, unix.SYS_UNLINKAT,
		unix.SYS_UTIMENSAT, unix.SYS_WRITE, unix.SYS_WRITEV,
	},
	{ // memory
		unix.SYS_BRK, unix.SYS_MADVISE, unix.SYS_MEMFD_CREATE, unix.SYS_MINCORE, unix.SYS_MREMAP, unix.SYS_MSYNC,
		unix.SYS_MUNMAP, unix.SYS_USERFAULTFD,
	},
	{ // waiting, and descriptors to wait for
		unix.SYS_CLOCK_NANOSLEEP, unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT,
		unix.SYS_EPOLL_WAIT, unix.SYS_EVENTFD2, unix.SYS_FUTEX, unix.SYS_NANOSLEEP, unix.SYS_PIPE2, unix.SYS_POLL,
		unix.SYS_PPOLL, unix.SYS_PSELECT6, unix.SYS_RESTART_SYSCALL, unix.SYS_SCHED_YIELD, unix.SYS_SELECT,
	},
	{ // sockets that are there; new ones have a condition
		unix.SYS_ACCEPT4, unix.SYS_BIND, unix.SYS_CONNECT, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKNAME, unix.SYS_GETSOCKOPT,
		unix.SYS_LISTEN, unix.SYS_RECVFROM, unix.SYS_RECVMSG, unix.SYS_SENDMSG,
		unix.SYS_SENDTO, unix.SYS_SETSOCKOPT, unix.SYS_SHUTDOWN,
	},
	{ // threads, signals to oneself, timers of the profiler
		unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_GETTID, unix.SYS_MEMBARRIER, unix.SYS_RSEQ, unix.SYS_RT_SIGACTION,
		unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN,
		unix.SYS_SCHED_GETAFFINITY, unix.SYS_SET_ROBUST_LIST, unix.SYS_SET_TID_ADDRESS,
		unix.SYS_SETITIMER, unix.SYS_SIGALTSTACK, unix.SYS_TIMER_CREATE, unix.SYS_TIMER_DELETE, unix.SYS_TIMER_SETTIME,
	},
	{ // what the process is, and the time
		unix.SYS_CLOCK_GETRES, unix.SYS_CLOCK_GETTIME, unix.SYS_GETCPU, unix.SYS_GETEGID, unix.SYS_GETEUID, unix.SYS_GETGID,
		unix.SYS_GETGROUPS, unix.SYS_GETPGRP, unix.SYS_GETPID, unix.SYS_GETPPID, unix.SYS_GETRANDOM, unix.SYS_GETRUSAGE,
		unix.SYS_GETTIMEOFDAY, unix.SYS_GETUID, unix.SYS_SYSINFO, unix.SYS_TIME,
		unix.SYS_UNAME,
	},
}

// fatalCalls are the system calls that nothing in the process makes, and that somebody who has taken it over would: they end it.
var fatalCalls = []uint32{
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, // programs
	unix.SYS_KCMP, unix.SYS_PIDFD_GETFD, unix.SYS_PROCESS_MADVISE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV,
	unix.SYS_PTRACE,                  // other processes
	unix.SYS_SETNS, unix.SYS_UNSHARE, // namespaces
	unix.SYS_CHROOT, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSOPEN, unix.SYS_FSPICK, unix.SYS_MKNOD,
	unix.SYS_MKNODAT, unix.SYS_MOUNT, unix.SYS_MOUNT_SETATTR, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_PIVOT_ROOT,
	unix.SYS_SWAPOFF, unix.SYS_SWAPON, unix.SYS_UMOUNT2, // file systems
	unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_OPEN_BY_HANDLE_AT, // files behind Landlock's back
	unix.SYS_BPF, unix.SYS_DELETE_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_INIT_MODULE, unix.SYS_IO_URING_SETUP,
	unix.SYS_KEXEC_FILE_LOAD, unix.SYS_KEXEC_LOAD, unix.SYS_PERF_EVENT_OPEN, unix.SYS_REBOOT, unix.SYS_SYSLOG, // the kernel
	unix.SYS_ADD_KEY, unix.SYS_KEYCTL, unix.SYS_REQUEST_KEY, // keys
	unix.SYS_CAPSET, unix.SYS_PERSONALITY, unix.SYS_SETFSGID, unix.SYS_SETFSUID, unix.SYS_SETGID, unix.SYS_SETGROUPS,
	unix.SYS_SETREGID, unix.SYS_SETRESGID, unix.SYS_SETRESUID, unix.SYS_SETREUID, unix.SYS_SETUID, // users
	unix.SYS_IOPERM, unix.SYS_IOPL, unix.SYS_MODIFY_LDT, // the processor
	unix.SYS_ACCT, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME, unix.SYS_CLOCK_SETTIME, unix.SYS_SETDOMAINNAME,
	unix.SYS_SETHOSTNAME, unix.SYS_SETTIMEOFDAY, // the host
}
