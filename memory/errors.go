package memory

import (
	"errors"
	"fmt"
)

var (
	// ErrClosed is returned by everything that is called after Close.
	ErrClosed = errors.New("memory is closed")

	// ErrNotResident is returned by View for pages that would have to be
	// fetched first. Call Resident for them.
	ErrNotResident = errors.New("guest page is not resident")

	// ErrFrozen says that the memory, or the Still, is frozen already. Close the
	// Still before you make another.
	ErrFrozen = errors.New("memory is frozen already: close its Still first")

	// ErrNotHeld says that something is not whole pages that a Still has and that
	// have not been read yet.
	ErrNotHeld = errors.New("not whole pages that the still has and nobody has read")

	// ErrStillClosed is returned by everything that is called after Still.Close.
	ErrStillClosed = errors.New("still is closed")

	// ErrSource says that the source of an image broke its contract: it
	// installed pages outside of RAM, or did not install a page that its map
	// says is in the chunk.
	ErrSource = errors.New("image source is inconsistent")

	// ErrImageFile says that a file is not what an image of another process lies in:
	// a memfd of the right size, which can't be resized, opened for reading and
	// writing.
	ErrImageFile = errors.New("not the memory of an image")

	// ErrAdopted says that the image is another process's, which alone can lend it.
	ErrAdopted = errors.New("image belongs to another process: ask that one")

	// ErrHugeShmem says that this kernel backs shared memory with huge pages
	// whether asked or not. Writing one page would then make its 511 neighbours
	// present as zeros and their faults would never come, so a lazy mapping
	// can't be right. Write "never" or "advise" to
	// /sys/kernel/mm/transparent_hugepage/shmem_enabled, or map eagerly.
	ErrHugeShmem = errors.New("kernel forces huge pages on shared memory" +
		" (/sys/kernel/mm/transparent_hugepage/shmem_enabled must be never or advise for a lazy mapping)")
)

// A RangeError says that an access is not inside RAM: it is beyond the end, in
// the 32-bit hole, or crosses from one into the other.
type RangeError struct {
	Op  string // what was tried: "read", "write", "view", ...
	GPA int64  // the first guest physical address
	Len int    // the number of bytes
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("memory: %s of %d bytes at GPA %#x is outside of RAM", e.Op, e.Len, e.GPA)
}

// A SizeError says that a RAM size is not possible.
type SizeError struct {
	Size uint64 // bytes
}

func (e *SizeError) Error() string {
	return fmt.Sprintf("memory: RAM size %d must be a positive multiple of %d and at most %d",
		e.Size, PageSize, uint64(MaxSize))
}

// A FetchError says that a chunk of an image could not be fetched. It wraps
// what the source said.
type FetchError struct {
	Chunk int64
	Err   error
}

func (e *FetchError) Error() string { return fmt.Sprintf("memory: fetch chunk %d: %v", e.Chunk, e.Err) }
func (e *FetchError) Unwrap() error { return e.Err }
