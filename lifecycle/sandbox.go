package lifecycle

import (
	"context"
	"time"
)

// State is what a sandbox is doing.
//
//	        Create, Fork                  Pause, or its timeout
//	(none) ------------> Running ----------------------------> Pausing
//	                      ^ |  ^ <-- Connect, or it failed ------' |
//	                      | |  '-------- Resuming <---.            v
//	                      | |                         '------ Paused
//	                      | '-- Kill, or its timeout --> Killed <--' Kill, or its retention has ended
//	                      '-- (a guest that ends goes back to its last pause, or is Killed if there is none)
type State string

// The states of a sandbox. Killed is seen in events only: who asks for a killed sandbox gets ErrNotFound.
const (
	StateRunning  State = "running"
	StatePausing  State = "pausing"
	StatePaused   State = "paused"
	StateResuming State = "resuming"
	StateKilled   State = "killed"
)

// Action is what happens to a sandbox when its timeout is reached.
type Action string

// The actions.
const (
	ActionKill  Action = "kill"
	ActionPause Action = "pause"
)

// SandboxInfo describes a sandbox at one moment.
type SandboxInfo struct {
	ID       string `json:"id"`
	Template string `json:"template"` // the id of the template, or checkpoint, that it began as
	Owner    string `json:"owner,omitempty"`
	State    State  `json:"state"`

	Created time.Time `json:"created"`
	Started time.Time `json:"started"` // when it last began to run
	// End is when its timeout is reached: the later of what Timeout and IdleTimeout lead to does not count. For a paused sandbox it is when it
	// was paused.
	End time.Time `json:"end"`
	// Expires is when a paused sandbox is deleted; zero for one that runs.
	Expires time.Time `json:"expires,omitzero"`

	Timeout     time.Duration     `json:"timeout"`      // from the last start, connection or SetTimeout
	IdleTimeout time.Duration     `json:"idle_timeout"` // 0: inactivity does not matter
	OnTimeout   Action            `json:"on_timeout"`
	AutoResume  bool              `json:"auto_resume"` // whoever routes traffic to it may connect to it; the Manager only remembers
	Metadata    map[string]string `json:"metadata,omitempty"`

	VCPUs       int    `json:"vcpus"`
	MemoryBytes uint64 `json:"memory_bytes"`
	DiskBytes   uint64 `json:"disk_bytes"`   // the sum of its disks' sizes
	StoredBytes uint64 `json:"stored_bytes"` // what its last pause stored
	Pauses      int    `json:"pauses"`
	// LastError says why the last attempt to pause it by itself failed, or how its guest ended.
	LastError string `json:"last_error,omitempty"`
}

// CreateOptions describe a new sandbox.
type CreateOptions struct {
	Template string // id or name of a template, or the id of a checkpoint
	// Owner is whose the sandbox is: any text of the caller's. The Manager compares it in List, and for templates that have an owner.
	Owner    string
	Metadata map[string]string // at most MaxMetadata bytes in all
	// Timeout is how long it runs before OnTimeout; 0 means DefaultTimeout. IdleTimeout, if not 0, has OnTimeout happen earlier: when there has been
	// no activity for so long. Activity is what Touch reports and, if WatchGuest is set in the ManagerOptions, what the guest does.
	Timeout, IdleTimeout time.Duration
	OnTimeout            Action // empty: ActionKill
	AutoResume           bool
}

// ConnectOptions are the choices of Connect.
type ConnectOptions struct {
	// Timeout counts from now. 0 means what it was created with. For a sandbox that runs it never shortens what is left.
	Timeout time.Duration
}

// ForkResult is one of the sandboxes that a Fork made, or why it could not be made.
type ForkResult struct {
	Sandbox *Sandbox
	Err     error
}

// ListOptions choose sandboxes.
type ListOptions struct {
	Owner    string            // empty: of all owners
	States   []State           // empty: all. StateRunning stands for StatePausing, and StatePaused for StateResuming, as well
	Metadata map[string]string // those that have all of these
	Limit    int               // at most so many; 0 means all
	Token    string            // Page.Next of the page before; empty for the first
}

// Page is a part of a list: the newest sandboxes come first.
type Page struct {
	Sandboxes []SandboxInfo
	Next      string // for the next page; empty if this is the last
}

// Sandbox is a handle: a sandbox's id, and the manager that has it. Its methods are those of the Manager.
type Sandbox struct {
	manager *Manager
	id      string
}

// ID returns the sandbox's id: 20 lower-case letters and digits.
func (s *Sandbox) ID() string { return s.id }

// Info is Manager.Get.
func (s *Sandbox) Info() (SandboxInfo, error) { return s.manager.Get(s.id) }

// Pause is Manager.Pause.
func (s *Sandbox) Pause(ctx context.Context) (SandboxInfo, error) { return s.manager.Pause(ctx, s.id) }

// Connect is Manager.Connect.
func (s *Sandbox) Connect(ctx context.Context, opts ConnectOptions) (info SandboxInfo, resumed bool, err error) {
	return s.manager.Connect(ctx, s.id, opts)
}

// Kill is Manager.Kill.
func (s *Sandbox) Kill(ctx context.Context) error { return s.manager.Kill(ctx, s.id) }

// SetTimeout is Manager.SetTimeout.
func (s *Sandbox) SetTimeout(d time.Duration) error { return s.manager.SetTimeout(s.id, d) }

// Touch is Manager.Touch.
func (s *Sandbox) Touch() error { return s.manager.Touch(s.id) }

// Fork is Manager.Fork.
func (s *Sandbox) Fork(ctx context.Context, n int, opts ConnectOptions) ([]ForkResult, error) {
	return s.manager.Fork(ctx, s.id, n, opts)
}

// Checkpoint is Manager.Checkpoint.
func (s *Sandbox) Checkpoint(ctx context.Context, name string) (TemplateInfo, error) {
	return s.manager.Checkpoint(ctx, s.id, name)
}
