package lifecycle

import (
	"errors"
	"fmt"
)

// Errors of a Manager.
var (
	// ErrNotFound says that there is no such sandbox or template: there never was, it was deleted, or it has expired.
	ErrNotFound = errors.New("not found")
	// ErrLocked says that another Manager, perhaps of another process, has the data directory.
	ErrLocked = errors.New("the data directory is in use by another manager")
	// ErrInvalid says that an argument is not acceptable.
	ErrInvalid = errors.New("invalid")
	// ErrManagerClosed is the error of calls after Close.
	ErrManagerClosed = errors.New("the manager is closed")
	// ErrExists says that a name is in use.
	ErrExists = errors.New("exists already")
)

// StateError says that a sandbox is in a state in which what was asked can't be done.
type StateError struct {
	ID    string
	Op    string
	State State
}

func (e *StateError) Error() string {
	return fmt.Sprintf("%s sandbox %s: it is %s", e.Op, e.ID, e.State)
}

// LimitError says which of the Limits is reached, and what it is.
type LimitError struct {
	What  string // "running sandboxes", "paused sandboxes", "stored bytes"
	Limit uint64
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("the limit of %d %s is reached; kill or pause some, or raise it", e.Limit, e.What)
}
