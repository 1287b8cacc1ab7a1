package linuxvm

import (
	"bytes"
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
	"testing"

	"filippo.io/age"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/confine"
	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// envJob makes this test binary run a machine in place of its tests.
const envJob = "CRYOVISOR_LINUXVM_JOB"

func TestMain(m *testing.M) {
	text, isJob := os.LookupEnv(envJob)
	if !isJob {
		goleak.VerifyTestMain(m)
	}
	if err := runJob(text); err != nil {
		fmt.Fprintln(os.Stderr, "machine:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// job is what a process of one machine does: it boots the machine or resumes it, and pauses it when it is told to. The
// console is its standard input and output.
type job struct {
	Dir      string // of the programs for guests
	Store    string
	Identity string
	Options  Options     // of a machine to be booted
	ID       snapshot.ID // of a snapshot to be resumed; zero: boot
	Eager    bool

	// What is behind the machine's devices.
	Disk         string // image under the copy-on-write disk, or none
	DiskDir      string // where the machine's changes to it are
	Vsock        string // path of the host's socket, or none
	CID          uint32 // of the guest, with Vsock
	Tap          string // name of an interface, or none
	AdvanceClock bool
}

// pauseOrder tells a process to pause its machine, in a line of JSON.
type pauseOrder struct {
	Prepare    bool // the pause first
	Checkpoint bool // not a pause: the machine runs on, and more orders may come

	Watch  bool    // report progress
	HoldAt float64 // the part of the memory that is written before the pause stops for ever; below 0: it does not
}

// report is what a process says of its machine, a line of JSON each time: that it runs, how far a pause has come, that it
// was paused or a checkpoint made, or that it has ended.
type report struct {
	Running bool
	Done    float64 // the part of the memory that is written
	Held    bool
	Paused  *lifecycle.Paused
	Ended   string
}

// File descriptors of a process besides the standard ones.
const (
	fdOrders  = 3
	fdReports = 4
)

func runJob(text string) error {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		return err
	}
	reports := json.NewEncoder(os.NewFile(fdReports, "reports"))
	identity, err := age.ParseX25519Identity(j.Identity)
	if err != nil {
		return err
	}
	store, err := snapshot.OpenStore(j.Store)
	if err != nil {
		return err
	}
	m, err := j.machine(store, identity)
	if err != nil {
		return err
	}
	if err := reports.Encode(report{Running: true}); err != nil {
		return err
	}
	return errors.Join(serveOrders(m, store, identity.Recipient(), reports), m.Close())
}

// serveOrders does what it is told with a machine, until that is paused or has ended.
func serveOrders(m *lifecycle.Machine, store *snapshot.Store, to age.Recipient, reports *json.Encoder) error {
	orders, told := json.NewDecoder(os.NewFile(fdOrders, "orders")), make(chan error, 1)
	for {
		var order pauseOrder
		go func() { told <- orders.Decode(&order) }()
		select {
		case <-m.VM.Ended():
			return reports.Encode(report{Ended: m.VM.Wait(context.Background()).Error()})
		case err := <-told:
			if err != nil {
				return err
			}
		}
		paused, err := order.do(m, store, lifecycle.PauseOptions{
			Recipients: []age.Recipient{to}, Progress: order.progress(reports),
		})
		if err == nil {
			err = reports.Encode(report{Paused: &paused})
		}
		if err != nil || !order.Checkpoint {
			return err
		}
	}
}

func (o pauseOrder) do(m *lifecycle.Machine, store *snapshot.Store, opts lifecycle.PauseOptions) (lifecycle.Paused, error) {
	ctx := context.Background()
	switch {
	case o.Checkpoint:
		opts.Extra = func() ([]snapshot.Section, error) {
			_, err := io.WriteString(os.Stdout, momentMark) // all that the guest has written came before it
			return nil, err
		}
		return m.Checkpoint(ctx, store, opts)
	case o.Prepare:
		p, err := m.Prepare(ctx, store, opts)
		if err != nil {
			return lifecycle.Paused{}, err
		}
		return p.Pause(ctx)
	}
	return m.Pause(ctx, store, opts)
}

// progress is the Progress of a pause: it reports it, or holds it.
func (o pauseOrder) progress(reports *json.Encoder) func(done, total uint64) {
	if !o.Watch {
		return nil
	}
	return func(done, total uint64) {
		part := float64(done) / float64(max(total, 1))
		hold := o.HoldAt >= 0 && (part >= o.HoldAt || done == total)
		// Nobody could be told of an error. The other end lives longer than this one.
		_ = reports.Encode(report{Done: part, Held: hold})
		if hold {
			select {} // to be killed
		}
	}
}

// machine boots or resumes the machine and sets it going.
func (j *job) machine(store *snapshot.Store, identity age.Identity) (*lifecycle.Machine, error) {
	// A reader that can be interrupted takes nothing after the pause, so that all input reaches the guest.
	if err := unix.SetNonblock(0, true); err != nil {
		return nil, err
	}
	hw, err := j.hardware()
	if err != nil {
		return nil, err
	}
	if j.ID != (snapshot.ID{}) {
		m, err := lifecycle.Resume(context.Background(), store, j.ID, lifecycle.ResumeOptions{
			Identities: []age.Identity{identity}, Hardware: hw, Disks: j.disks(), Eager: j.Eager,
		})
		if err != nil {
			return nil, err
		}
		return m, j.confined(m.VM.Resume)
	}
	lab, err := openLab(j.Dir)
	if err != nil {
		return nil, err
	}
	cfg, err := lab.Config(j.Options)
	if err != nil {
		return nil, err
	}
	cfg.Hardware = hw
	m, err := lifecycle.Boot(context.Background(), cfg, j.disks())
	if err != nil {
		return nil, err
	}
	return m, j.confined(m.VM.Start)
}

// confined sets a machine going in a process that keeps what the command keeps. So every guest of these tests that has a process of
// its own runs confined, in the lab by the kernel that it has, and elsewhere if the host can do that.
func (j *job) confined(run func() error) error {
	rules := confine.Rules{ReadWrite: []string{j.Store}, Remove: []string{j.DiskDir}}
	if j.Vsock != "" {
		rules.Sockets = []string{filepath.Dir(j.Vsock)}
	}
	level, err := confine.Apply(rules)
	if errors.Is(err, confine.ErrUnsupported) && !kvmlab.Inside() {
		return run()
	}
	if err != nil {
		return err
	}
	if level.Landlock == 0 && kvmlab.Inside() {
		return errors.New("the lab's kernel has no Landlock")
	}
	if _, err := os.ReadDir("/"); level.Landlock > 0 && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("a confined process lists the root directory, with the result %s", fmt.Sprint(err))
	}
	return run()
}

// disks says what the machine's disk is on.
func (j *job) disks() lifecycle.Disks {
	d := lifecycle.Disks{Dir: j.DiskDir}
	if j.Disk != "" {
		d.Boot = []lifecycle.Disk{{Name: diskName, Image: j.Disk}}
	}
	return d
}

// diskName is the name of a machine's disk.
const diskName = "data"

// hardware opens what is behind the machine's devices, for as long as the process lives.
func (j *job) hardware() (vmm.Hardware, error) {
	hw := vmm.Hardware{
		Console:         vmm.Console{In: os.NewFile(0, "console input"), Out: os.Stdout},
		AllowOvercommit: true,
		AdvanceClock:    j.AdvanceClock,
	}
	if j.Vsock != "" {
		hw.Vsock = &vmm.Vsock{CID: j.CID, Path: j.Vsock}
	}
	if j.Tap != "" {
		tap, err := vmm.OpenTap(j.Tap)
		if err != nil {
			return hw, err
		}
		hw.NICs = []vmm.NIC{{Name: "eth0", Tap: tap, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}}
	}
	return hw, nil
}

// process is a process that runs a machine.
type process struct {
	cmd     *exec.Cmd
	orders  *os.File
	reports *json.Decoder
	gone    chan struct{} // closed when all of its output has been copied, which is when it has ended
	files   []*os.File
	said    bytes.Buffer // to standard error; whole when the process has ended
}

// startProcess starts a process whose guest's console is input and output. What it has not read of input when it ends is
// left to the next one.
func startProcess(ctx context.Context, j job, input *os.File, output io.Writer) (*process, error) {
	text, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	binary, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var pipes [3]struct{ r, w *os.File } // output, orders, reports
	for i := range pipes {
		if pipes[i].r, pipes[i].w, err = os.Pipe(); err != nil {
			return nil, err
		}
	}
	p := &process{orders: pipes[1].w, gone: make(chan struct{})}
	p.files = []*os.File{pipes[0].r, pipes[1].w, pipes[2].r}
	p.reports = json.NewDecoder(pipes[2].r)
	p.cmd = exec.CommandContext(ctx, binary)
	p.cmd.Env = append(os.Environ(), envJob+"="+string(text))
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = input, pipes[0].w, io.MultiWriter(os.Stderr, &p.said)
	p.cmd.ExtraFiles = []*os.File{pipes[1].r, pipes[2].w}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	for _, theirs := range []*os.File{pipes[0].w, pipes[1].r, pipes[2].w} {
		theirs.Close()
	}
	go func() {
		defer close(p.gone)
		_, _ = io.Copy(output, pipes[0].r) // the end of a pipe is no error
	}()
	return p, nil
}

// end waits for the process and for all that it wrote.
func (p *process) end() error {
	err := p.cmd.Wait()
	<-p.gone
	for _, f := range p.files {
		f.Close()
	}
	return err
}
