package lifecycle

import "context"

// KeyProvider guards the keys of snapshots. Each sandbox and template has an age identity of its own, to which its snapshots are encrypted; what the
// catalog has of it is sealed by the KeyProvider. Its methods may be called from several goroutines.
type KeyProvider interface {
	// Seal encrypts a secret. It is bound to id: Open with another must fail.
	Seal(ctx context.Context, id string, secret []byte) (sealed []byte, err error)
	// Open is its inverse. It opens what was sealed before a Rotate too, until Retire.
	Open(ctx context.Context, id string, sealed []byte) (secret []byte, err error)
	// Rotate makes a new master key, which Seal uses from then on.
	Rotate(ctx context.Context) error
	// Retire forgets, for good, the master keys from before the last Rotate: nothing is sealed with them any more.
	Retire(ctx context.Context) error
}
