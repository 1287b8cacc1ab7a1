package confine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A process can be confined only for good, so it is always another one: this program, which does what the environment says.
const (
	childEnv = "CRYOVISOR_CONFINE_CHILD" // "attempts", or the name of one that is fatal
	dirEnv   = "CRYOVISOR_CONFINE_DIR"
)

func TestMain(m *testing.M) {
	if name := os.Getenv(childEnv); name != "" {
		if err := child(name, os.Getenv(dirEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child confines itself to some directories below dir, and makes an attempt, or all that are not fatal.
func child(name, dir string) error {
	// A thread that is there before has to be confined with the others: the attempts are made by it.
	attempting := make(chan func() error)
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		for do := range attempting {
			result <- do()
		}
	}()
	attempting <- func() error { return nil }
	<-result
	there := func(do func() error) error { attempting <- do; return <-result }
	_, err := Apply(Rules{
		ReadWrite: []string{filepath.Join(dir, "rw"), filepath.Join(dir, "file")},
		ReadOnly:  []string{filepath.Join(dir, "ro")},
		Remove:    []string{filepath.Join(dir, "remove")},
		Sockets:   []string{filepath.Join(dir, "sockets")},
	})
	if err != nil {
		return err
	}
	if do := deadly[name]; do != nil {
		return fmt.Errorf("%s did not end the process: %w", name, there(do))
	}
	out := make(map[string]int)
	for _, a := range attempts(dir) {
		var errno syscall.Errno
		if err := there(a.do); err != nil && !errors.As(err, &errno) {
			return fmt.Errorf("%s: %w", a.name, err)
		}
		out[a.name] = int(errno)
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}

type attempt struct {
	name  string
	want  syscall.Errno // 0: it works
	since int           // by Landlock from this version on; 0: without
	do    func() error
}

// raw makes a system call that no library of Go makes.
func raw(nr uintptr, args ...uintptr) func() error {
	return func() error {
		var a [6]uintptr
		copy(a[:], args)
		if _, _, errno := syscall.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
			return errno
		}
		return nil
	}
}

// deadly are attempts that end the process. Their arguments would be refused, or do nothing, if they came to the kernel.
var deadly = map[string]func() error{
	"execve":            func() error { return syscall.Exec("/bin/true", []string{"true"}, nil) },
	"ptrace":            raw(unix.SYS_PTRACE, unix.PTRACE_TRACEME),
	"process_vm_writev": raw(unix.SYS_PROCESS_VM_WRITEV, 1),
	"mount":             raw(unix.SYS_MOUNT),
	"unshare":           raw(unix.SYS_UNSHARE),
	"setuid":            raw(unix.SYS_SETUID, uintptr(os.Getuid())),
	"bpf":               raw(unix.SYS_BPF, ^uintptr(0)),
	"keyctl":            raw(unix.SYS_KEYCTL, ^uintptr(0)),
	"init_module":       raw(unix.SYS_INIT_MODULE),
	"open_by_handle_at": raw(unix.SYS_OPEN_BY_HANDLE_AT, ^uintptr(0)),
	"io_uring_setup":    raw(unix.SYS_IO_URING_SETUP),
}

func attempts(dir string) []attempt {
	in := func(parts ...string) string { return filepath.Join(append([]string{dir}, parts...)...) }
	write := func(path string) func() error {
		return func() error { return os.WriteFile(path, []byte("x"), 0o600) }
	}
	read := func(path string) func() error {
		return func() error { _, err := os.ReadFile(path); return err }
	}
	x32 := uintptr(0x40000000) // __X32_SYSCALL_BIT: the calls of another ABI, by the same way in
	return []attempt{
		{name: "write to a file", do: write(in("rw", "new"))},
		{name: "make, move, link and remove", do: func() error { return shuffle(in("rw")) }},
		{name: "listen and connect", do: func() error { return listen(in("rw", "socket")) }},
		{name: "a lone file", do: write(in("file"))},
		{name: "read only", do: read(in("ro", "file"))},
		{name: "oneself", do: read("/proc/self/status")},
		{name: "a process of one's own", want: unix.EPERM, do: exec.Command("/bin/true").Run},
		{name: "applied twice", want: unix.EALREADY, do: func() error {
			if _, err := Apply(Rules{}); !errors.Is(err, ErrApplied) {
				return err
			}
			return unix.EALREADY
		}},

		{name: "read elsewhere", since: 2, want: unix.EACCES, do: read(in("outside"))},
		{name: "write elsewhere", since: 2, want: unix.EACCES, do: write(in("another"))},
		{name: "write to what is read only", since: 2, want: unix.EACCES, do: write(in("ro", "file"))},
		{name: "list elsewhere", since: 2, want: unix.EACCES, do: func() error { _, err := os.ReadDir(dir); return err }},
		{name: "by a symbolic link", since: 2, want: unix.EACCES, do: read(in("rw", "link"))},
		{name: "move out", since: 2, want: unix.EACCES, do: func() error { return os.Rename(in("rw", "mine"), in("mine")) }},
		{name: "make a symbolic link", want: unix.EPERM, do: func() error { return os.Symlink("/", in("rw", "root")) }},
		{name: "truncate by name", want: unix.EPERM, do: func() error { return os.Truncate(in("ro", "file"), 0) }},
		{name: "remove from where that is all", do: func() error { return os.Remove(in("remove", "file")) }},
		{name: "write where one may remove", since: 2, want: unix.EACCES, do: write(in("remove", "new"))},
		{name: "remove a socket", do: func() error { return os.Remove(in("sockets", "old")) }},
		{name: "write among sockets", since: 2, want: unix.EACCES, do: write(in("sockets", "new"))},
		{name: "another's memory", since: 2, want: unix.EACCES, do: read(fmt.Sprintf("/proc/%d/maps", os.Getppid()))},
		{name: "write to one's own by its file", since: 2, want: unix.EACCES, do: func() error {
			_, err := os.OpenFile("/proc/self/mem", os.O_RDWR, 0)
			return err
		}},

		{name: "a unix socket", do: socket(unix.AF_UNIX)},
		{name: "an internet socket", want: unix.EPERM, do: socket(unix.AF_INET)},
		{name: "an internet socket of version 6", want: unix.EPERM, do: socket(unix.AF_INET6)},
		{name: "a netlink socket", want: unix.EPERM, do: socket(unix.AF_NETLINK)},
		{name: "a packet socket", want: unix.EPERM, do: socket(unix.AF_PACKET)},
		{name: "a vsock", want: unix.EPERM, do: socket(unix.AF_VSOCK)},
		{name: "memory", do: raw(unix.SYS_MMAP, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uintptr(0))},
		{name: "memory that is code", want: unix.EPERM, do: raw(unix.SYS_MMAP, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uintptr(0))},
		{name: "to make memory code", want: unix.EPERM, do: raw(unix.SYS_MPROTECT, 0, 4096, unix.PROT_EXEC)},
		{name: "the same with a key", want: unix.EPERM, do: raw(unix.SYS_PKEY_MPROTECT, 0, 4096, unix.PROT_EXEC)},
		{name: "to type for the user", want: unix.EPERM, do: raw(unix.SYS_IOCTL, 0, unix.TIOCSTI)},
		{name: "a request with a high half", want: unix.EPERM, do: raw(unix.SYS_IOCTL, 0, 1<<32|unix.TCGETS)},
		{name: "a fork", want: unix.EPERM, do: raw(unix.SYS_FORK)},
		{name: "a vfork", want: unix.EPERM, do: raw(unix.SYS_CLONE, unix.CLONE_VM|unix.CLONE_VFORK|uintptr(unix.SIGCHLD))},
		{name: "a thread in namespaces", want: unix.EPERM, do: raw(unix.SYS_CLONE, unix.CLONE_THREAD|unix.CLONE_SIGHAND|unix.CLONE_VM|unix.CLONE_NEWUSER)},
		{name: "clone3", want: unix.ENOSYS, do: raw(unix.SYS_CLONE3)},
		{name: "x32", want: unix.ENOSYS, do: raw(x32 | unix.SYS_GETPID)},
		{name: "to signal oneself", do: raw(unix.SYS_KILL, uintptr(os.Getpid()), 0)},
		{name: "to signal another", want: unix.EPERM, do: raw(unix.SYS_KILL, uintptr(os.Getppid()), 0)},
		{name: "to signal all", want: unix.EPERM, do: raw(unix.SYS_KILL, ^uintptr(0), 0)},
		{name: "a limit", want: unix.EPERM, do: func() error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) }},
		{name: "to be dumpable", want: unix.EPERM, do: raw(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1)},
		{name: "a new filter", want: unix.EPERM, do: raw(unix.SYS_SECCOMP)},
		{name: "what is not known", want: unix.EPERM, do: raw(999)},
	}
}

// shuffle does what stores, disks and sockets do with names.
func shuffle(dir string) error {
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	f := filepath.Join(a, "f")
	return errors.Join(os.Mkdir(a, 0o700), os.Mkdir(b, 0o700), os.WriteFile(f, nil, 0o600), os.Chmod(f, 0o400),
		os.Link(f, filepath.Join(b, "g")), os.Rename(f, filepath.Join(b, "f")), os.RemoveAll(a), os.RemoveAll(b))
}

func listen(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	return c.Close()
}

func socket(family int) func() error {
	return func() error {
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	}
}

// place makes the directories that child expects.
func place(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"rw", "ro", "remove", "sockets"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"file", "outside", "ro/file", "remove/file", "rw/mine", "sockets/old"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(dir, "outside"), filepath.Join(dir, "rw", "link")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// run runs a child.
func run(t *testing.T, name, dir string) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // a fork that should not be would hold the pipes for ever
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.WaitDelay = time.Second
	cmd.Env = append(os.Environ(), childEnv+"="+name, dirEnv+"="+dir)
	cmd.Dir = dir
	var failed strings.Builder
	cmd.Stderr = &failed
	out, err := cmd.Output()
	if failed.Len() > 0 {
		t.Logf("%s: %s", name, failed.String())
	}
	return out, err
}

func needSeccomp(t *testing.T) {
	t.Helper()
	if !Supported().Seccomp {
		t.Skip(ErrUnsupported)
	}
}

// TestAttempts has a confined process try what it may do, and what it may not.
func TestAttempts(t *testing.T) {
	needSeccomp(t)
	dir := place(t)
	out, err := run(t, "attempts", dir)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]int
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	for _, a := range attempts(dir) {
		t.Run(a.name, func(t *testing.T) {
			if Supported().Landlock < a.since {
				t.Skipf("Landlock is of version %d", Supported().Landlock)
			}
			if errno, ok := got[a.name]; !ok || syscall.Errno(errno) != a.want {
				t.Errorf("%v, want %v", syscall.Errno(errno), a.want)
			}
		})
	}
}

// TestDeadly makes the attempts that end a process, each in one.
func TestDeadly(t *testing.T) {
	needSeccomp(t)
	dir := place(t)
	for name := range deadly {
		t.Run(name, func(t *testing.T) {
			_, err := run(t, name, dir)
			var ended *exec.ExitError
			if !errors.As(err, &ended) || ended.Sys().(syscall.WaitStatus).Signal() != unix.SIGSYS {
				t.Errorf("ended with %v, want %v", err, unix.SIGSYS)
			}
		})
	}
}

// TestMissing names what is not there, or no directory: nothing is confined then.
func TestMissing(t *testing.T) {
	needSeccomp(t)
	dir := place(t)
	for _, r := range []Rules{{ReadOnly: []string{filepath.Join(dir, "missing")}}, {Remove: []string{filepath.Join(dir, "file")}}} {
		if _, err := Apply(r); err == nil || errors.Is(err, ErrApplied) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "still"), nil, 0o600); err != nil {
		t.Error(err)
	}
}
