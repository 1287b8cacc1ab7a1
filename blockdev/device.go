// Package blockdev is disks: what a machine's block device reads and writes, as an interface, and raw files and host
// block devices behind it.
package blockdev

// Device is a disk of a fixed size. All offsets and lengths are in bytes and may have any alignment; they must
// lie within Size, else the error is a *RangeError and nothing is done. All methods may be called from any
// goroutine at any time.
//
// Order: a call sees what calls that returned before it began have done. Calls for overlapping ranges that run at the same
// time take effect in any order, also mixed with each other.
//
// Atomicity: none is promised. A write that fails, or that the host dies in, may have taken effect in part, in
// its own range only.
//
// Durability: when Flush returns nil, everything that calls did which returned before that Flush began outlives a
// crash of the host. Before that, any part of it may be lost.
type Device interface {
	// ReadAt fills p from off, or fails; p may then be overwritten in part.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes all of p at off, or fails. ErrReadOnly if the disk can't be written, as for the next two.
	WriteAt(p []byte, off int64) (int, error)
	// Discard says that the contents of a range are of no use any more. It reads as zeros afterwards, and
	// takes no more space where that can be had.
	Discard(off, n int64) error
	// WriteZeroes makes a range read as zeros, and keeps its space, so that later writes to it don't fail
	// for want of space, where that can be had.
	WriteZeroes(off, n int64) error
	// Flush makes durable what was done. After an error nobody knows what is durable.
	Flush() error

	// Size, BlockSize and ReadOnly are constant. Size is a multiple of BlockSize, which is a power of two, at least
	// MinBlockSize: the unit in which the disk is accessed most efficiently.
	Size() int64
	BlockSize() int
	ReadOnly() bool
}

// MinBlockSize is the smallest block size in bytes.
const MinBlockSize = 512
