package lifecycle

import (
	"context"
	"errors"
	"time"

	"github.com/cryovisor/cryovisor/vmm"
)

// What a Manager does if nothing else is said.
const (
	DefaultTimeout   = 5 * time.Minute
	DefaultRetention = 30 * 24 * time.Hour
	// MaxMetadata bounds a sandbox's metadata: the bytes of its keys and values.
	MaxMetadata = 16 << 10
)

// ManagerOptions are the choices of OpenManager.
type ManagerOptions struct {
	// Keys guards the keys of snapshots; nil means the identity file DIR/keys/master.txt, which is made if it is missing.
	Keys KeyProvider
	// Clock tells the time; nil means the system's. Timeouts and retention go by it.
	Clock Clock
	// Retention is how long a paused sandbox is kept; 0 means DefaultRetention. A change holds for those that are paused already.
	Retention time.Duration
	Limits    Limits
	// Connect, if not nil, is asked for the hardware of each machine before it goes on: taps, sockets and ports of this process.
	Connect func(ctx context.Context, start Start) (Connection, error)
	// Prefetch is what resumes of paused sandboxes fetch ahead.
	Prefetch Prefetch
	// PrepareAhead is how long before a pause by timeout its preparation begins; 0 means some seconds, by the sandbox's memory; less than 0 means
	// that such pauses are not prepared.
	PrepareAhead time.Duration
	// WatchGuest counts as activity, for IdleTimeout, what guests do: use of their vCPUs beyond a thousandth... and traffic on virtio-net and vsock.
	WatchGuest bool
	// OnClose is what Close does with sandboxes that run; empty means ActionPause.
	OnClose Action
}

// Limits bound what a Manager takes on; 0 means no bound. Beyond one, calls fail with a *LimitError.
type Limits struct {
	Running     int    // sandboxes that run
	Paused      int    // sandboxes that are paused; one that runs may always be paused by its timeout
	StoredBytes uint64 // what the snapshots take on disk, when a new one is begun
}

// Start is what Connect is told: which sandbox is about to run, and what it was made from.
type Start struct {
	Sandbox  SandboxInfo
	Template TemplateInfo
}

// Connection is a machine's hardware, and what is to be done when the machine has ended.
type Connection struct {
	Hardware vmm.Hardware
	Close    func() error // may be nil
}

// Manager keeps sandboxes: those that run, in this process, and those that are paused, in a directory:
//
//	DIR/catalog.db   what there is (SQLite)
//	DIR/keys/        the master key, if it is a local one
//	DIR/store/       snapshots (snapshot.Store)
//	DIR/disks/       what running guests have written to disks
//	DIR/lock         held while a Manager has the directory
//
// Its methods may be called from any number of goroutines; transitions of one sandbox wait for each other, and each happens once. Whoever asks for
// a sandbox that does not exist, was killed or has expired gets ErrNotFound.
//
// What is acknowledged is durable: when Pause has returned the sandbox can be connected to after any crash, and when Kill has, it is gone. A process
// that dies takes with it what ran: such sandboxes are what they were at their last completed pause, or gone if there was none.
type Manager struct{}

var errTODO = errors.New("not yet")

// OpenManager opens a data directory, makes what is missing, and brings what a crash has left into order. Only one Manager at a time may have a
// directory: another gets ErrLocked.
func OpenManager(ctx context.Context, dir string, opts ManagerOptions) (*Manager, error) {
	return nil, errTODO
}

// Close ends the Manager, and first pauses or kills what runs, as the options say. If ctx ends before all are paused, those that are not stay as at their
// last completed pause. It is idempotent.
func (m *Manager) Close(ctx context.Context) error { return errTODO }

// Create makes a sandbox of a template, and lets it run. Errors: ErrNotFound if there is no such template, *LimitError, ErrInvalid; host errors as
// those of Template.Resume.
func (m *Manager) Create(ctx context.Context, opts CreateOptions) (*Sandbox, error) {
	return nil, errTODO
}

// Sandbox returns a handle of a sandbox that exists.
func (m *Manager) Sandbox(id string) (*Sandbox, error) { return nil, errTODO }

// Get describes a sandbox.
func (m *Manager) Get(id string) (SandboxInfo, error) { return SandboxInfo{}, errTODO }

// List lists sandboxes, the newest first. Errors: ErrInvalid for a token that is none.
func (m *Manager) List(opts ListOptions) (Page, error) { return Page{}, errTODO }

// Pause stores a sandbox that runs, and ends its machine. With an error it runs on. Errors: a *StateError for one that is paused (or about to be).
func (m *Manager) Pause(ctx context.Context, id string) (SandboxInfo, error) {
	return SandboxInfo{}, errTODO
}

// Connect has a sandbox run: one that does gets a longer timeout, never a shorter one; one that is paused is resumed; for one that is being
// paused it waits, or, if that is because of a timeout, takes the pause back. resumed says whether it was paused.
func (m *Manager) Connect(ctx context.Context, id string, opts ConnectOptions) (info SandboxInfo, resumed bool, err error) {
	return SandboxInfo{}, false, errTODO
}

// Resume is Connect for a sandbox that must be paused: a *StateError for one that runs.
func (m *Manager) Resume(ctx context.Context, id string, opts ConnectOptions) (SandboxInfo, error) {
	return SandboxInfo{}, errTODO
}

// Kill ends a sandbox and deletes all that there is of it, its keys first. What forks and checkpoints of it need stays.
func (m *Manager) Kill(ctx context.Context, id string) error { return errTODO }

// SetTimeout sets the timeout of a sandbox that runs, from now, longer or shorter. Errors: a *StateError for one that is paused.
func (m *Manager) SetTimeout(id string, d time.Duration) error { return errTODO }

// Touch reports activity of a sandbox: its IdleTimeout begins anew. For one that is paused it does nothing.
func (m *Manager) Touch(id string) error { return errTODO }

// Fork makes n new sandboxes of one, which goes on or stays paused: they begin as it is at one moment, with its options and metadata.
// The error is that none could be made; a result has an error of its own.
func (m *Manager) Fork(ctx context.Context, id string, n int, opts ConnectOptions) ([]ForkResult, error) {
	return nil, errTODO
}

// Checkpoint keeps a sandbox as it is at one moment as a template, for Create. It goes on or stays paused. name may be empty. The checkpoint
// stays until DeleteTemplate, also when the sandbox has been killed.
func (m *Manager) Checkpoint(ctx context.Context, id, name string) (TemplateInfo, error) {
	return TemplateInfo{}, errTODO
}

// Machine returns the machine of a sandbox that runs, for what is not the Manager's to do, such as looking at its statistics. It must not be paused,
// closed or resumed. Errors: a *StateError for one that does not run.
func (m *Manager) Machine(id string) (*Machine, error) { return nil, errTODO }

// Logs returns the end of what the sandbox's guest has written to its console, at most 64 KiB, kept through pauses (in snapshots, encrypted), and the
// offset of its first byte in all that it has written.
func (m *Manager) Logs(id string) (offset int64, text []byte, err error) { return 0, nil, errTODO }

// TemplateInfo describes a template or a checkpoint.
type TemplateInfo struct {
	ID          string            `json:"id"`
	Name        string            `json:"name,omitempty"`
	Owner       string            `json:"owner,omitempty"`  // empty: everybody's
	Source      string            `json:"source,omitempty"` // a checkpoint's: the id of the sandbox
	Created     time.Time         `json:"created"`
	VCPUs       int               `json:"vcpus"`
	MemoryBytes uint64            `json:"memory_bytes"`
	DiskBytes   uint64            `json:"disk_bytes"`
	StoredBytes uint64            `json:"stored_bytes"`
	Labels      map[string]string `json:"labels,omitempty"` // the embedder's; checkpoints have their template's
}

// TemplateConfig describes a template to be made.
type TemplateConfig struct {
	Name   string // must not be in use
	Owner  string // empty: for all
	VM     vmm.Config
	Disks  Disks // Dir is the Manager's
	Labels map[string]string
	// Ready, if not nil, waits until the guest has come so far that it is to be kept.
	Ready func(ctx context.Context, m *Machine) error
}

// CreateTemplate boots a machine, waits until it is ready, and keeps it as a template.
func (m *Manager) CreateTemplate(ctx context.Context, cfg TemplateConfig) (TemplateInfo, error) {
	return TemplateInfo{}, errTODO
}

// Template describes the template or checkpoint with an id or a name.
func (m *Manager) Template(idOrName string) (TemplateInfo, error) { return TemplateInfo{}, errTODO }

// Templates lists templates and checkpoints, the newest first.
func (m *Manager) Templates() []TemplateInfo { return nil }

// DeleteTemplate deletes a template or checkpoint. Sandboxes that were made of it stay.
func (m *Manager) DeleteTemplate(ctx context.Context, id string) error { return errTODO }

// RotateKeys has the KeyProvider make a new master key, and seals the keys of all snapshots with that. Snapshots are not touched.
func (m *Manager) RotateKeys(ctx context.Context) error { return errTODO }

// Subscribe returns a channel of events from now on. One that is not read in time loses events, which Event.Lost counts. cancel ends it.
func (m *Manager) Subscribe() (events <-chan Event, cancel func()) { return nil, nil }

// Event is a change of a sandbox's state.
type Event struct {
	Time    time.Time   `json:"time"`
	Sandbox SandboxInfo `json:"sandbox"` // after it
	From    State       `json:"from"`    // empty: it was created
	Reason  Reason      `json:"reason"`
	// Connections says that connections to the guest were cut: always by a pause and by what ends a machine.
	Connections bool          `json:"connections,omitempty"`
	Took        time.Duration `json:"took,omitempty"`  // a pause's or a resume's
	Error       string        `json:"error,omitempty"` // why a pause or resume failed: the state is what it was
	Lost        uint64        `json:"lost,omitempty"`  // events before this one that the subscriber did not read in time
}

// Reason is why a state has changed.
type Reason string

// The reasons.
const (
	ReasonRequest Reason = "request" // somebody called
	ReasonTimeout Reason = "timeout"
	ReasonIdle    Reason = "idle"
	ReasonExpired Reason = "expired" // its retention has ended
	ReasonEnded   Reason = "ended"   // its guest has, by itself
	ReasonClose   Reason = "close"   // the Manager is closed
)

// Metrics are counts since the Manager was opened, and what there is.
type Metrics struct {
	States      map[State]int
	Templates   int
	StoredBytes uint64 // by all snapshots, on disk
	Creates     Operation
	Pauses      Operation
	Resumes     Operation
	Kills       Operation
	Expired     uint64
	AutoPauses  uint64 // of Pauses
	TakenBack   uint64 // pauses that were taken back, by Connect
}

// Operation counts what was done and how long it took.
type Operation struct {
	Count, Failed uint64
	Total         time.Duration // of those that did not fail
	Buckets       []uint64      // by OperationBuckets; the last is of those that took longer
}

// OperationBuckets are upper bounds of times.
var OperationBuckets = []time.Duration{
	time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second,
}

// Metrics returns them.
func (m *Manager) Metrics() Metrics { return Metrics{} }
