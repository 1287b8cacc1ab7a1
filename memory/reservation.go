package memory

// A Reservation is address space for the RAM of a machine that is to come, none of it accessible, so that KVM can be
// told of the place before it is known what will be there. [Image.Map] or Close uses it up. It is for one goroutine at a time.
type Reservation struct {
	size uint64
	mm   *mapping
}

// Reserve reserves address space for size bytes of RAM. The error is a *[SizeError], or the system's.
func Reserve(size uint64) (*Reservation, error) {
	if err := checkSize(size); err != nil {
		return nil, err
	}
	mm, err := reserve(span(size))
	if err != nil {
		return nil, err
	}
	return &Reservation{size: size, mm: mm}, nil
}

// Size is the amount of RAM in bytes, without the hole.
func (r *Reservation) Size() uint64 { return r.size }

// HostAddr is the host virtual address that gpa will have.
func (r *Reservation) HostAddr(gpa uint64) uintptr { return r.mm.base() + uintptr(gpa) }

// Close gives the address space back, unless a Memory has it. It may be called more than once, and of nil.
func (r *Reservation) Close() error {
	if r == nil || r.mm == nil {
		return nil
	}
	err := r.mm.unmap()
	r.mm = nil
	return err
}

// memory is a Memory, empty, that has the address space.
func (r *Reservation) memory() *Memory {
	m := &Memory{size: r.size, ranges: Layout(r.size), mm: r.mm, failed: make(chan struct{})}
	r.mm = nil
	return m
}
