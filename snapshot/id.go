package snapshot

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// ID identifies a snapshot or a pack: 16 random bytes. The zero ID means "none".
type ID [idBytes]byte

// NewID returns a random ID.
func NewID() ID {
	var id ID
	_, _ = rand.Read(id[:]) // never fails, by its documentation
	return id
}

// ParseID parses the form that [ID.String] returns: 32 lower-case hex digits.
func ParseID(s string) (ID, error) {
	var id ID
	if b, err := hex.DecodeString(s); err != nil || len(b) != len(id) || hex.EncodeToString(b) != s {
		return ID{}, fmt.Errorf("%w: snapshot id %q is not 32 lower-case hex digits", ErrInvalid, s)
	} else {
		copy(id[:], b)
	}
	return id, nil
}

// String returns the ID as 32 lower-case hex digits.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// IsZero reports whether id is the zero ID, which stands for "none".
func (id ID) IsZero() bool { return id == ID{} }

// MarshalText makes IDs readable in JSON.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText is the inverse of [ID.MarshalText].
func (id *ID) UnmarshalText(text []byte) error {
	v, err := ParseID(string(text))
	if err != nil {
		return err
	}
	*id = v
	return nil
}
