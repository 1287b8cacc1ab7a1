package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cryovisor/cryovisor/internal/catalog"
	"github.com/cryovisor/cryovisor/snapshot"
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
	// Pool is how many of KVM's VMs are kept ready, for sandboxes to be made or resumed in: at most, and all together, for the sizes of memory
	// that sandboxes had lately. There should be one at least for each of these. A machine that finds none of its size makes its own, and what can't be
	// made in advance is tried again after the next machine. See Pool for what they take; 0 means none, and 1024 is the most.
	Pool int
	// ImageLimit, if not 0, is how much memory each template's image takes at most, in bytes, apart from what sandboxes write; see Template.LimitImage.
	ImageLimit uint64
	// PrepareAhead is how long before a pause by timeout its preparation begins; 0 means some seconds, by the sandbox's memory; less than 0 means
	// that such pauses are not prepared.
	PrepareAhead time.Duration
	// WatchGuest counts as activity, for IdleTimeout, what guests do: see watch.go for what is much.
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
type Manager struct {
	dir     string
	opts    ManagerOptions
	clock   Clock
	keys    KeyProvider
	lock    *os.File
	store   *snapshot.Store
	catalog *catalog.Catalog
	stored  *holdings
	shelf   *shelf // nil if nothing is made in advance
	alarms  *alarms
	events  broker
	meter   meter

	// sealing is held for reading while a key is sealed and written, and for writing while all are sealed anew.
	sealing sync.RWMutex

	ctx  context.Context // of what goes on by itself; ended by Close
	quit context.CancelFunc
	work sync.WaitGroup // what goes on by itself

	closing context.Context // ended when Close begins
	refuse  context.CancelCauseFunc
	calls   sync.WaitGroup // those that make sandboxes or templates, and Kill: of its sandbox nobody knows when the row is deleted

	ending sync.Mutex // held by Close

	mu        sync.Mutex
	closed    bool
	sandboxes sandboxes
	templates map[string]*template // by id
	running   int                  // sandboxes that run, are about to, or have not ended yet
}

// The parts of a data directory.
const (
	lockFile    = "lock"
	catalogFile = "catalog.db"
	keysDir     = "keys"
	masterFile  = "master.txt"
	storeDir    = "store"
	disksDir    = "disks"
)

// OpenManager opens a data directory, makes what is missing, and brings what a crash has left into order. Only one Manager at a time may have a
// directory: another gets ErrLocked.
func OpenManager(ctx context.Context, dir string, opts ManagerOptions) (*Manager, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	m := newManager(abs, opts)
	if err := m.open(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open data directory %s: %w", abs, err), m.release())
	}
	m.alarms.start(m.alarm)
	return m, nil
}

func newManager(dir string, opts ManagerOptions) *Manager {
	opts.Retention = cmp.Or(opts.Retention, DefaultRetention)
	opts.OnClose = cmp.Or(opts.OnClose, ActionPause)
	m := &Manager{dir: dir, opts: opts, clock: opts.Clock, keys: opts.Keys, templates: make(map[string]*template)}
	if m.clock == nil {
		m.clock = SystemClock{}
	}
	m.sandboxes.byID = make(map[string]*entry)
	m.ctx, m.quit = context.WithCancel(context.Background())
	m.closing, m.refuse = context.WithCancelCause(context.Background())
	m.alarms = newAlarms(m.clock)
	return m
}

func (m *Manager) open(ctx context.Context) error {
	if err := checkOptions(m.opts); err != nil {
		return err
	}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return err
	}
	if err := m.openParts(); err != nil {
		return err
	}
	if err := m.recover(ctx); err != nil {
		return err
	}
	m.openShelf()
	return nil
}

// openShelf begins to make VMs in advance, for machines like those that there are.
func (m *Manager) openShelf() {
	if m.opts.Pool == 0 {
		return
	}
	m.shelf = newShelf(m.opts.Pool)
	for _, t := range slices.Backward(m.Templates()) {
		m.shelf.expect(t.MemoryBytes)
	}
	for _, e := range m.sandboxes.order {
		m.shelf.expect(e.row.MemoryBytes)
	}
	m.shelf.start()
	m.shelf.refill()
}

// openParts opens what lies in the directory.
func (m *Manager) openParts() (err error) {
	if m.lock, err = lockDir(filepath.Join(m.dir, lockFile)); err != nil {
		return err
	}
	if m.keys == nil {
		if m.keys, err = OpenLocalKeys(filepath.Join(m.dir, keysDir, masterFile)); err != nil {
			return err
		}
	}
	if m.store, err = snapshot.OpenStore(filepath.Join(m.dir, storeDir)); err != nil {
		return err
	}
	if m.catalog, err = catalog.Open(filepath.Join(m.dir, catalogFile)); err != nil {
		return err
	}
	m.stored = newHoldings(m.store)
	return nil
}

func checkOptions(o ManagerOptions) error {
	switch {
	case o.Retention < 0:
		return fmt.Errorf("%w: a retention of %v", ErrInvalid, o.Retention)
	case o.Limits.Running < 0 || o.Limits.Paused < 0:
		return fmt.Errorf("%w: limits of %d running and %d paused sandboxes", ErrInvalid, o.Limits.Running, o.Limits.Paused)
	}
	if o.Pool < 0 || o.Pool > maxPool {
		return fmt.Errorf("%w: a pool of %d VMs; at most %d", ErrInvalid, o.Pool, maxPool)
	}
	return checkAction(o.OnClose)
}

// release gives back what open has taken.
func (m *Manager) release() error {
	m.quit()
	m.refuse(nil)
	errs := []error{m.shelf.close()}
	for _, t := range m.templates {
		errs = append(errs, t.close())
	}
	if m.catalog != nil {
		errs = append(errs, m.catalog.Close())
	}
	if m.lock != nil {
		errs = append(errs, m.lock.Close())
	}
	return errors.Join(errs...)
}

// closeAtOnce is how many sandboxes Close pauses at the same time. Each uses all processors; while one waits for the disk, another does not.
const closeAtOnce = 2

// Close ends the Manager, and first pauses or kills what runs, as the options say. If ctx ends before all are paused, those that are not stay as at their
// last completed pause. It is idempotent.
func (m *Manager) Close(ctx context.Context) error {
	m.ending.Lock()
	defer m.ending.Unlock()
	m.mu.Lock()
	again := m.closed
	m.closed = true
	m.mu.Unlock()
	if again {
		return nil
	}
	m.refuse(ErrManagerClosed)
	m.calls.Wait()
	m.alarms.stop()
	m.mu.Lock()
	all := m.sandboxes.all()
	m.mu.Unlock()
	var group errgroup.Group
	group.SetLimit(closeAtOnce)
	errs := make([]error, len(all))
	for i, e := range all {
		group.Go(func() error {
			errs[i] = m.closeSandbox(ctx, e)
			return nil
		})
	}
	_ = group.Wait()
	m.quit()
	m.work.Wait()
	m.events.close()
	return errors.Join(errors.Join(errs...), m.release())
}

// closeSandbox pauses or kills a sandbox, and in any case ends its machine.
func (m *Manager) closeSandbox(ctx context.Context, e *entry) error {
	// What is under way is not waited for if ctx has ended.
	if err := e.enter(ctx); err != nil {
		e.interrupt(ErrManagerClosed)
		if err := e.enter(context.WithoutCancel(ctx)); err != nil {
			return nil // it was deleted
		}
	}
	defer e.leave()
	if e.live == nil {
		return nil
	}
	var err error
	if m.opts.OnClose == ActionKill {
		err = m.delete(context.WithoutCancel(ctx), e, ReasonClose)
	} else {
		_, err = m.pause(ctx, e, ReasonClose)
	}
	if e.live != nil {
		err = errors.Join(err, m.discardMachine(e))
	}
	return err
}

// call begins a call that makes something, or leaves nothing. Close interrupts it, by its context, and waits until done is called.
func (m *Manager) call(ctx context.Context) (begun context.Context, done func(), err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, nil, ErrManagerClosed
	}
	m.calls.Add(1)
	begun, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(m.closing, func() { cancel(ErrManagerClosed) })
	return begun, func() {
		stop()
		cancel(nil)
		m.calls.Done()
	}, nil
}

// find returns the sandbox with an id.
func (m *Manager) find(id string) (*entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, ErrManagerClosed
	}
	e := m.sandboxes.byID[id]
	if e == nil || m.expired(e) {
		return nil, fmt.Errorf("sandbox %q: %w", id, ErrNotFound)
	}
	return e, nil
}

// expired says whether a sandbox's retention has ended, whether or not it was deleted already.
func (m *Manager) expired(e *entry) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.gone(m.clock.Now())
}

// transition returns the sandbox with an id when no other transition of it is under way. The caller must leave it.
func (m *Manager) transition(ctx context.Context, id string) (*entry, error) {
	e, err := m.find(id)
	if err != nil {
		return nil, err
	}
	if err := e.enter(ctx); err != nil {
		return nil, err
	}
	// While it waited, what it waits for may have come to an end.
	if _, err := m.find(id); err != nil {
		e.leave()
		return nil, err
	}
	return e, nil
}

// Sandbox returns a handle of a sandbox that exists.
func (m *Manager) Sandbox(id string) (*Sandbox, error) {
	if _, err := m.find(id); err != nil {
		return nil, err
	}
	return &Sandbox{manager: m, id: id}, nil
}

// Get describes a sandbox.
func (m *Manager) Get(id string) (SandboxInfo, error) {
	e, err := m.find(id)
	if err != nil {
		return SandboxInfo{}, err
	}
	return e.info(), nil
}

// Machine returns the machine of a sandbox that runs, for what is not the Manager's to do, such as looking at its statistics. It must not be paused,
// closed or resumed. Errors: a *StateError for one that does not run.
func (m *Manager) Machine(id string) (*Machine, error) {
	e, err := m.find(id)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.live == nil {
		return nil, &StateError{ID: id, Op: "use the machine of", State: e.state}
	}
	return e.live.machine, nil
}

// Files are what the Manager uses of its data directory from now on, files and directories that are there: what a confined process has
// to keep. The master key is read already, and not among them.
func (m *Manager) Files() ([]string, error) {
	dirs := []string{m.store.Dir(), m.disks()}
	if err := errors.Join(m.store.Make(), os.MkdirAll(m.disks(), 0o700)); err != nil {
		return nil, err
	}
	return append(dirs, m.catalog.Files()...), nil
}

// RotateKeys has the KeyProvider make a new master key, and seals the keys of all snapshots with that. Snapshots are not touched.
// A process that is confined to Files can't, with a local master key.
func (m *Manager) RotateKeys(ctx context.Context) error {
	ctx, done, err := m.call(ctx)
	if err != nil {
		return err
	}
	defer done()
	m.sealing.Lock()
	defer m.sealing.Unlock()
	if err := rotate(ctx, m.keys, m.catalog); err != nil {
		return fmt.Errorf("rotate keys: %w", err)
	}
	return m.catalog.Forget(ctx)
}

// clone is a copy of a map, which a caller may change.
func clone(m map[string]string) map[string]string { return maps.Clone(m) }
