//go:build linux && amd64

package lifecycle_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// envShare is what a process of these tests is to do, a shareJob.
const envShare = "CRYOVISOR_LIFECYCLE_SHARE"

// shareMemory is the RAM of the guests here.
const shareMemory = 8 << 20

// A shareJob is a machine of a snapshot in a process of its own.
type shareJob struct {
	Own    bool // share the image, instead of adopting it
	Store  string
	Key    string
	ID     string
	Socket string
	Saved  []testvm.VCPUState
}

// shareGuest is a snapshot of a guest that has worked.
func shareGuest(t *testing.T) (*guest, shareJob) {
	t.Helper()
	g := newGuest(t, testvm.WorkerConfig{Memory: shareMemory, WorkingSet: 1 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 5)
	job := shareJob{
		Store: g.store.Dir(), Key: g.key.String(), ID: g.pause(t, m).ID.String(),
		Socket: filepath.Join(t.TempDir(), "image.sock"), Saved: g.device.State(),
	}
	closeMachine(t, m)
	return g, job
}

func (j shareJob) id(t *testing.T) snapshot.ID {
	t.Helper()
	id, err := snapshot.ParseID(j.ID)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// share serves the image of a template until the test ends, or stop is called.
func share(t *testing.T, tpl *lifecycle.Template, socket string) (stop func()) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- tpl.Share(ctx, l); close(ended) }()
	stop = func() {
		cancel()
		if err, first := <-ended; first && err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// clone resumes another machine of a template, and has it work.
func (j shareJob) clone(t *testing.T, g *guest, tpl *lifecycle.Template, opts lifecycle.ResumeOptions) (*guest, *lifecycle.Machine) {
	t.Helper()
	c := g.past(j.Saved)
	opts.Hardware = c.hardware(testvm.NoLimit)
	m, err := tpl.Resume(t.Context(), opts)
	if errors.Is(err, vmm.ErrNoUserfaultfd) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMachine(t, m) })
	if err := errors.Join(m.Resume(), m.WaitPrefetch(t.Context())); err != nil {
		t.Fatal(err)
	}
	c.work(t, m, 5)
	return c, m
}

// TestShareProcess is the other process. It says its Stats when its machine is right, and ends with its input.
func TestShareProcess(t *testing.T) {
	arg := os.Getenv(envShare)
	if arg == "" {
		t.Skip("it is run by other tests")
	}
	var job shareJob
	if err := json.Unmarshal([]byte(arg), &job); err != nil {
		t.Fatal(err)
	}
	g := newGuest(t, testvm.WorkerConfig{Memory: shareMemory, WorkingSet: 1 << 20})
	store, err := snapshot.OpenStore(job.Store)
	if err != nil {
		t.Fatal(err)
	}
	key, err := age.ParseX25519Identity(job.Key)
	if err != nil {
		t.Fatal(err)
	}
	var tpl *lifecycle.Template
	if job.Own {
		tpl, err = lifecycle.Open(t.Context(), store, job.id(t), key)
	} else {
		tpl, err = lifecycle.OpenShared(t.Context(), store, job.id(t), job.Socket, key)
	}
	if err != nil {
		t.Fatal(err)
	}
	if job.Own {
		share(t, tpl, job.Socket)
	}
	c, m := job.clone(t, g, tpl, lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchAll})
	c.compare(t, m)
	stats, err := json.Marshal(m.VM.Memory().Stats())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("%s\n", stats)
	_, _ = io.Copy(io.Discard, os.Stdin)
	if err := tpl.Close(); err != nil {
		t.Error(err)
	}
}

// A shareProcess is a process that does a shareJob, and has come to the end of its input.
type shareProcess struct {
	cmd   *exec.Cmd
	in    io.Closer
	stats memory.Stats
}

func (j shareJob) run(t *testing.T) *shareProcess {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	arg, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	p := &shareProcess{cmd: exec.CommandContext(t.Context(), binary, "-test.run=^TestShareProcess$")}
	p.cmd.Env = append(os.Environ(), envShare+"="+string(arg))
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.end(t, true) })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil {
		err = json.Unmarshal([]byte(line), &p.stats)
	}
	if err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return p
}

// end kills the process, or lets it end in peace.
func (p *shareProcess) end(t *testing.T, kill bool) {
	t.Helper()
	if p.cmd.ProcessState != nil {
		return
	}
	if kill {
		_ = p.cmd.Process.Kill() // it may have ended
	}
	p.in.Close()
	if err := p.cmd.Wait(); err != nil && !kill {
		t.Errorf("the other process: %v", err)
	}
}

// imageBlocks is how much memory the images of this process take.
func imageBlocks(t *testing.T) (bytes int64) {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		var st unix.Stat_t
		if to, err := os.Readlink(fd); err == nil && strings.Contains(to, "memfd:cryovisor-image") && unix.Stat(fd, &st) == nil {
			bytes += st.Blocks * 512
		}
	}
	return bytes
}

// TestShare: a machine in another process has what this one has fetched, fetches nothing of that, and takes no memory for it. While it
// lives nothing is taken out of the image, and afterwards it is, however it ended.
func TestShare(t *testing.T) {
	for _, kill := range []bool{false, true} {
		t.Run(fmt.Sprintf("kill=%v", kill), func(t *testing.T) {
			checkLeaks(t)
			g, job := shareGuest(t)
			tpl, err := lifecycle.Open(t.Context(), g.store, job.id(t), g.key)
			if err != nil {
				t.Fatal(err)
			}
			defer tpl.Close()
			stop := share(t, tpl, job.Socket)
			c, m := job.clone(t, g, tpl, lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchAll})
			c.device.SetLimit(0) // two guests at once are slow on two processors
			blocks := imageBlocks(t)
			other := job.run(t)
			c.device.SetLimit(testvm.NoLimit)
			if s := other.stats; s.PagesFetched != 0 || s.ChunksFetched != 0 || s.FoundBytes == 0 {
				t.Errorf("what had been fetched was fetched again: %+v", s)
			}
			if n := imageBlocks(t); n != blocks || n == 0 {
				t.Errorf("the image takes %d bytes, took %d", n, blocks)
			}
			stop() // who has the image keeps it
			c.work(t, m, 50)
			if n, err := m.Reclaim(t.Context()); n != 0 || err != nil {
				t.Errorf("%d bytes taken out of an image that another process has, %v", n, err)
			}
			other.end(t, kill)
			for freed := uint64(0); freed == 0; { // as soon as it is known here that it has gone
				if freed, err = m.Reclaim(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			c.work(t, m, 5)
			c.compare(t, m)
			closeMachine(t, m)
			if err := tpl.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestShareOutlives: machines go on with the image of a process that was killed, and fetch what it had not; nothing is taken out.
func TestShareOutlives(t *testing.T) {
	checkLeaks(t)
	g, job := shareGuest(t)
	job.Own = true
	owner := job.run(t)
	tpl, err := lifecycle.OpenShared(t.Context(), g.store, job.id(t), job.Socket, g.key)
	if err != nil {
		t.Fatal(err)
	}
	defer tpl.Close()
	c, m := job.clone(t, g, tpl, lifecycle.ResumeOptions{})
	owner.end(t, true)
	c.work(t, m, 50)
	if n, err := m.Reclaim(t.Context()); n != 0 || err != nil {
		t.Errorf("an adopter took %d bytes out, %v", n, err)
	}
	late, n := job.clone(t, g, tpl, lifecycle.ResumeOptions{Eager: true})
	for _, x := range []struct {
		*guest
		m *lifecycle.Machine
	}{{c, m}, {late, n}} {
		x.compare(t, x.m)
		if s := x.m.VM.Memory().Stats(); s.PagesFetched != 0 || s.FoundBytes == 0 {
			t.Errorf("stats %+v", s)
		}
		closeMachine(t, x.m)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := tpl.Share(t.Context(), l); !errors.Is(err, memory.ErrAdopted) {
		t.Errorf("an adopter shares: %v", err)
	}
	if err := tpl.Close(); err != nil {
		t.Error(err)
	}
}

// TestShareBothFetch: two that have one image and fetch at the same time both have all of it, fetched about once. The owner may end
// before the other; then nothing is taken out, also if it has a limit.
func TestShareBothFetch(t *testing.T) {
	checkLeaks(t)
	g, job := shareGuest(t)
	tpl, err := lifecycle.Open(t.Context(), g.store, job.id(t), g.key)
	if err != nil {
		t.Fatal(err)
	}
	defer tpl.Close()
	stop := share(t, tpl, job.Socket)
	second, err := lifecycle.OpenShared(t.Context(), g.store, job.id(t), job.Socket, g.key)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	c1, m1 := job.clone(t, g, second, lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchAll})
	c2, m2 := job.clone(t, g, tpl, lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchAll})
	if s := m2.VM.Memory().Stats(); s.PagesFetched != 0 || s.FoundBytes == 0 {
		t.Errorf("the owner fetched what the adopter had: %+v", s)
	}
	c2.compare(t, m2)
	tpl.LimitImage(memory.MinLimit)
	before := imageBlocks(t) / 2 // each has a descriptor
	closeMachine(t, m2)
	if err := tpl.Close(); err != nil {
		t.Error(err)
	}
	stop() // it was the last to leave
	if n := imageBlocks(t); n != before || n <= memory.MinLimit {
		t.Errorf("the image holds %d bytes when its owner has ended, held %d", n, before)
	}
	c1.compare(t, m1)
	if _, err := lifecycle.OpenShared(t.Context(), g.store, job.id(t), job.Socket, g.key); err == nil {
		t.Error("a template that is closed shares")
	}
	closeMachine(t, m1)
	if err := second.Close(); err != nil {
		t.Error(err)
	}
}

// memfd makes a file as a hostile process may send one.
func memfd(t *testing.T, flags int, size int64, seals int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("hostile", flags|unix.MFD_CLOEXEC)
	if err == nil {
		err = unix.Ftruncate(fd, size)
	}
	if err == nil && seals != 0 {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// TestShareHostile: whatever answers on the socket, the error is typed, and no descriptor stays.
func TestShareHostile(t *testing.T) {
	g, job := shareGuest(t)
	id := job.id(t)
	regular, err := os.Create(filepath.Join(t.TempDir(), "regular"))
	if err != nil {
		t.Fatal(err)
	}
	defer regular.Close()
	const fixed = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	good := memfd(t, unix.MFD_ALLOW_SEALING, shareMemory, fixed)
	readOnly, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", good), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(readOnly)
	right := lifecycle.Greeting(id, shareMemory)
	for _, c := range []struct {
		name   string
		answer []byte
		fds    []int
		want   error
	}{
		{"wrong id", lifecycle.Greeting(snapshot.NewID(), shareMemory), []int{good}, lifecycle.ErrOtherSnapshot},
		{"wrong size", lifecycle.Greeting(id, 2*shareMemory), []int{good}, lifecycle.ErrOtherSnapshot},
		{"garbage", []byte(strings.Repeat("x", len(right))), []int{good}, lifecycle.ErrPeer},
		{"cut off", right[:len(right)-1], []int{good}, lifecycle.ErrPeer},
		{"nothing", nil, nil, lifecycle.ErrPeer},
		{"no descriptor", right, nil, lifecycle.ErrPeer},
		{"two descriptors", right, []int{good, good}, lifecycle.ErrPeer},
		{"many descriptors", right, slices.Repeat([]int{good}, 100), lifecycle.ErrPeer},
		{"regular file", right, []int{int(regular.Fd())}, memory.ErrImageFile},
		{"a socket's", right, []int{-1}, memory.ErrImageFile},
		{"smaller file", right, []int{memfd(t, unix.MFD_ALLOW_SEALING, shareMemory/2, fixed)}, memory.ErrImageFile},
		{"unsealed", right, []int{memfd(t, unix.MFD_ALLOW_SEALING, shareMemory, 0)}, memory.ErrImageFile},
		{"may shrink", right, []int{memfd(t, unix.MFD_ALLOW_SEALING, shareMemory, fixed&^unix.F_SEAL_SHRINK)}, memory.ErrImageFile},
		{"seals to come", right, []int{memfd(t, unix.MFD_ALLOW_SEALING, shareMemory, fixed&^unix.F_SEAL_SEAL)}, memory.ErrImageFile},
		{"sealed against writing", right, []int{memfd(t, unix.MFD_ALLOW_SEALING, shareMemory, fixed|unix.F_SEAL_WRITE)}, memory.ErrImageFile},
		{"read only", right, []int{readOnly}, memory.ErrImageFile},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkLeaks(t)
			socket := filepath.Join(t.TempDir(), "s")
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error)
			go func() { ended <- answer(l, len(right), c.answer, c.fds) }()
			_, err = lifecycle.OpenShared(t.Context(), g.store, id, socket, g.key)
			var typed *lifecycle.ShareError
			if !errors.Is(err, c.want) || !errors.As(err, &typed) || typed.Socket != socket {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	_, err = lifecycle.OpenShared(t.Context(), g.store, id, filepath.Join(t.TempDir(), "nobody"), g.key)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nobody serves: %v", err)
	}
}

// answer accepts one connection, hears n bytes, and answers. A descriptor of -1 is that of the connection.
func answer(l *net.UnixListener, n int, b []byte, fds []int) error {
	defer l.Close()
	conn, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, n)); err != nil || len(b) == 0 {
		return err
	}
	f, err := conn.File()
	if err != nil {
		return err
	}
	defer f.Close()
	send := slices.Clone(fds)
	for i := range send {
		if send[i] < 0 {
			send[i] = int(f.Fd())
		}
	}
	var oob []byte
	if len(send) > 0 {
		oob = unix.UnixRights(send...)
	}
	_, _, err = conn.WriteMsgUnix(b, oob, nil)
	return err
}

// TestShareStrangers: who does not ask as it should gets no image, holds nothing up, and leaves nothing.
func TestShareStrangers(t *testing.T) {
	checkLeaks(t)
	g, job := shareGuest(t)
	tpl, err := lifecycle.Open(t.Context(), g.store, job.id(t), g.key)
	if err != nil {
		t.Fatal(err)
	}
	share(t, tpl, job.Socket)
	silent, err := net.Dial("unix", job.Socket) // for as long as the template lives
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	right := lifecycle.Greeting(job.id(t), shareMemory)
	other := lifecycle.Greeting(snapshot.NewID(), shareMemory)
	for _, say := range [][]byte{nil, right[:5], []byte(strings.Repeat("x", len(right))), other} {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: job.Socket, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(say); err != nil {
			t.Error(err)
		}
		_ = conn.CloseWrite()
		oob := make([]byte, 1024)
		b := make([]byte, 1024)
		_, oobn, _, _, _ := conn.ReadMsgUnix(b, oob)
		if oobn > 0 {
			t.Errorf("a descriptor for %q", say)
		}
		conn.Close()
	}
	second, err := lifecycle.OpenShared(t.Context(), g.store, job.id(t), job.Socket, g.key)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(second.Close(), tpl.Close()); err != nil {
		t.Error(err)
	}
}

// FuzzGreeting: what parses must marshal to the same bytes; all else is a typed error.
func FuzzGreeting(f *testing.F) {
	f.Add([]byte{})
	f.Add(lifecycle.Greeting(snapshot.NewID(), shareMemory))
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := lifecycle.ParseGreeting(b)
		if err != nil && !errors.Is(err, lifecycle.ErrPeer) {
			t.Error(err)
		}
		if err == nil && string(again) != string(b) {
			t.Errorf("%q became %q", b, again)
		}
	})
}
