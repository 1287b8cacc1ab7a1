package confine

// freeCalls are the system calls that are allowed with any arguments, by what needs them. They were found by tracing the
// command and the tests of the engine, and by reading the Go runtime, package os and net, SQLite, and what glibc's threads
// do in programs with cgo. A filter without conditions costs nothing: the kernel remembers what it says.
var freeCalls = [][]string{
	{ // files
		"access", "close", "copy_file_range", "dup", "dup3", "faccessat", "faccessat2", "fadvise64", "fallocate", "fchmod",
		"fchmodat", "fchown", "fcntl", "fdatasync", "flock", "fstat", "fstatfs", "fsync", "ftruncate", "getcwd", "getdents64",
		"link", "linkat", "lseek", "lstat", "mkdir", "mkdirat", "newfstatat", "open", "openat", "openat2", "pread64", "preadv",
		"preadv2", "pwrite64", "pwritev", "pwritev2", "read", "readlink", "readlinkat", "readv", "rename", "renameat",
		"renameat2", "rmdir", "sendfile", "splice", "stat", "statfs", "statx", "sync_file_range", "truncate", "unlink",
		"unlinkat", "utimensat", "write", "writev",
	},
	{ // memory
		"brk", "madvise", "memfd_create", "mincore", "mremap", "msync", "munmap", "userfaultfd",
	},
	{ // waiting, and descriptors to wait for
		"clock_nanosleep", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait", "eventfd2", "futex",
		"nanosleep", "pipe2", "poll", "ppoll", "pselect6", "restart_syscall", "sched_yield", "select",
	},
	{ // sockets that are there; new ones have a condition
		"accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt", "listen", "recvfrom", "recvmmsg", "recvmsg",
		"sendmmsg", "sendmsg", "sendto", "setsockopt", "shutdown",
	},
	{ // threads, signals to oneself, timers of the profiler
		"exit", "exit_group", "gettid", "membarrier", "rseq", "rt_sigaction", "rt_sigpending", "rt_sigprocmask",
		"rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "sched_getaffinity", "set_robust_list", "set_tid_address",
		"setitimer", "sigaltstack", "timer_create", "timer_delete", "timer_settime",
	},
	{ // what the process is, and the time
		"clock_getres", "clock_gettime", "getcpu", "getegid", "geteuid", "getgid", "getgroups", "getpgrp", "getpid", "getppid",
		"getrandom", "getrusage", "gettimeofday", "getuid", "sysinfo", "time", "times", "umask", "uname",
	},
}

// fatalCalls are the system calls that nothing in the process makes, and that somebody who has taken it over would: they end it.
var fatalCalls = []string{
	"execve", "execveat", // programs
	"kcmp", "pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev", "ptrace", // other processes
	"setns", "unshare", // namespaces
	"chroot", "fsconfig", "fsmount", "fsopen", "fspick", "mknod", "mknodat", "mount", "mount_setattr", "move_mount", "open_tree",
	"pivot_root", "swapoff", "swapon", "umount2", // file systems
	"name_to_handle_at", "open_by_handle_at", // files behind Landlock's back
	"bpf", "delete_module", "finit_module", "init_module", "io_uring_setup", "kexec_file_load", "kexec_load", "perf_event_open",
	"reboot", "syslog", // the kernel
	"add_key", "keyctl", "request_key", // keys
	"capset", "personality", "setfsgid", "setfsuid", "setgid", "setgroups", "setregid", "setresgid", "setresuid", "setreuid",
	"setuid",                       // users
	"ioperm", "iopl", "modify_ldt", // the processor
	"acct", "adjtimex", "clock_adjtime", "clock_settime", "setdomainname", "sethostname", "settimeofday", // the host
}
