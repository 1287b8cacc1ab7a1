// Package virtiotest is a guest for tests of virtio devices: RAM, a driver that reaches a device through its
// registers and rings only, and the suite that every device passes.
package virtiotest

import (
	"fmt"
	"slices"
	"sync"
)

// RAM is guest memory from address 0 on. Its methods may be called from any goroutine.
type RAM struct {
	mu  sync.Mutex
	mem []byte
}

// NewRAM returns n zero bytes.
func NewRAM(n int) *RAM { return &RAM{mem: make([]byte, n)} }

// RangeError says that an access was not wholly inside RAM.
type RangeError struct {
	GPA int64
	Len int
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("virtiotest: %d bytes at %#x are not in RAM", e.Len, e.GPA)
}

// ReadAt implements virtio.Memory.
func (r *RAM) ReadAt(p []byte, gpa int64) (int, error) {
	return r.access(p, gpa, func(ram []byte) { copy(p, ram) })
}

// WriteAt implements virtio.Memory.
func (r *RAM) WriteAt(p []byte, gpa int64) (int, error) {
	return r.access(p, gpa, func(ram []byte) { copy(ram, p) })
}

func (r *RAM) access(p []byte, gpa int64, move func([]byte)) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if gpa < 0 || gpa > int64(len(r.mem)) || int64(len(p)) > int64(len(r.mem))-gpa {
		return 0, &RangeError{gpa, len(p)}
	}
	move(r.mem[gpa : gpa+int64(len(p))])
	return len(p), nil
}

// Bytes returns a copy of all of it.
func (r *RAM) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.mem)
}

// load puts an image's patches over it.
func (r *RAM) load(image []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	loadImage(r.mem, image)
}
