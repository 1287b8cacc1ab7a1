package virtiotest

import (
	"encoding/binary"
	"fmt"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// Flags of a descriptor.
const (
	DescNext, DescWrite, DescIndirect = 1, 2, 4
)

// Request is what a driver asks of a device.
type Request struct {
	Queue int
	Out   []byte // for the device to read
	In    int    // bytes for the device to write
	// Check says whether the device answered right: in is the whole device-writable part, and written how much of it
	// the device says it has written. Nil takes any answer.
	Check func(in []byte, written uint32) error
	// Segments, if not nil, are the addresses to use in place of buffers of the driver's own.
	Segments []virtio.Segment
}

// Ring is a driver's side of a queue.
type Ring struct {
	d                 *Driver
	index, size       int
	desc, avail, used uint64
	free              []uint16
	added, seen       uint16 // positions in the available and the used ring
	kicked            uint16 // added at the last Kick
	requests          map[uint16]*posted
}

// posted is a Request on its way.
type posted struct {
	req   Request
	descs []uint16
	pages []uint64
	in    []virtio.Segment
}

// segment is a piece of a chain that is to be built.
type segment struct {
	gpa   uint64
	len   uint32
	write bool
}

// Pending is how many requests the device has not completed.
func (r *Ring) Pending() int { return len(r.requests) }

// Post adds a request in a random arrangement of descriptors, indirect ones included if they were negotiated.
// It returns false if there is no room.
func (r *Ring) Post(req Request) (bool, error) {
	p := &posted{req: req}
	segs, ok := r.lay(p)
	if !ok {
		r.d.pages = append(r.d.pages, p.pages...)
		return false, nil
	}
	indirect := r.d.Features&virtio.FeatureIndirect != 0 && len(segs)*16 <= pageSize && r.d.Rand.IntN(2) == 0
	var head uint16
	var err error
	if indirect {
		head, ok, err = r.chainIndirect(p, segs)
	} else {
		head, ok, err = r.chain(p, segs)
	}
	if err != nil || !ok {
		r.d.pages = append(r.d.pages, p.pages...)
		return false, err
	}
	if err := r.write16(r.avail+4+2*uint64(int(r.added)%r.size), head); err != nil {
		return false, err
	}
	r.added++
	r.requests[head] = p
	return true, r.write16(r.avail+2, r.added)
}

// lay puts the request in memory, cut at random places.
func (r *Ring) lay(p *posted) ([]segment, bool) {
	if p.req.Segments != nil {
		var segs []segment
		for _, s := range p.req.Segments {
			segs = append(segs, segment{s.GPA, s.Len, p.req.In > 0})
		}
		return segs, true
	}
	out, ok := r.buffers(p, len(p.req.Out), false)
	if !ok {
		return nil, false
	}
	rest := p.req.Out
	for _, s := range out {
		if _, err := r.d.RAM.WriteAt(rest[:s.len], int64(s.gpa)); err != nil {
			return nil, false
		}
		rest = rest[s.len:]
	}
	in, ok := r.buffers(p, p.req.In, true)
	for _, s := range in {
		p.in = append(p.in, virtio.Segment{GPA: s.gpa, Len: s.len})
	}
	return append(out, in...), ok
}

func (r *Ring) buffers(p *posted, n int, write bool) ([]segment, bool) {
	var segs []segment
	for n > 0 {
		gpa, ok := r.d.page()
		if !ok {
			return nil, false
		}
		p.pages = append(p.pages, gpa)
		cut := min(n, pageSize)
		if r.d.Rand.IntN(3) == 0 {
			cut = 1 + r.d.Rand.IntN(cut)
		}
		segs = append(segs, segment{gpa + uint64(r.d.Rand.IntN(pageSize-cut+1)), uint32(cut), write})
		n -= cut
	}
	return segs, true
}

// chain links segs in the ring's table; the first descriptor is the head.
func (r *Ring) chain(p *posted, segs []segment) (uint16, bool, error) {
	if len(segs) > len(r.free) || len(segs) == 0 {
		return 0, false, nil
	}
	r.d.Rand.Shuffle(len(r.free), func(i, j int) { r.free[i], r.free[j] = r.free[j], r.free[i] })
	p.descs, r.free = append(p.descs, r.free[:len(segs)]...), r.free[len(segs):]
	for i, s := range segs {
		var next uint16
		flags := uint16(0)
		if i+1 < len(segs) {
			next, flags = p.descs[i+1], DescNext
		}
		if err := r.WriteDesc(r.desc, p.descs[i], s.gpa, s.len, flags|writeFlag(s), next); err != nil {
			return 0, false, err
		}
	}
	return p.descs[0], true, nil
}

// chainIndirect links segs in a table of its own, in random order after the first.
func (r *Ring) chainIndirect(p *posted, segs []segment) (uint16, bool, error) {
	table, ok := r.d.page()
	if !ok || len(r.free) == 0 || len(segs) == 0 {
		return 0, false, nil
	}
	p.pages = append(p.pages, table)
	order := append([]int{0}, r.d.Rand.Perm(len(segs))...)
	for i, at := range order[1:] {
		if at == 0 {
			order[i+1], order[1] = order[1], 0
		}
	}
	order = order[1:]
	for i, s := range segs {
		var next uint16
		flags := uint16(0)
		if i+1 < len(segs) {
			next, flags = uint16(order[i+1]), DescNext
		}
		if err := r.WriteDesc(table, uint16(order[i]), s.gpa, s.len, flags|writeFlag(s), next); err != nil {
			return 0, false, err
		}
	}
	p.descs, r.free = append(p.descs, r.free[0]), r.free[1:]
	return p.descs[0], true, r.WriteDesc(r.desc, p.descs[0], table, uint32(16*len(segs)), DescIndirect, 0)
}

func writeFlag(s segment) uint16 {
	if s.write {
		return DescWrite
	}
	return 0
}

// WriteDesc writes descriptor i of a table.
func (r *Ring) WriteDesc(table uint64, i uint16, addr uint64, n uint32, flags, next uint16) error {
	b := binary.LittleEndian.AppendUint64(nil, addr)
	b = binary.LittleEndian.AppendUint32(b, n)
	b = binary.LittleEndian.AppendUint16(b, flags)
	b = binary.LittleEndian.AppendUint16(b, next)
	_, err := r.d.RAM.WriteAt(b, int64(table+16*uint64(i)))
	return err
}

// Kick rings for what was posted since the last Kick, if the device wants that.
func (r *Ring) Kick() error {
	before := r.kicked
	r.kicked = r.added
	if before == r.added {
		return nil
	}
	if r.d.Features&virtio.FeatureEventIdx != 0 {
		event, err := r.read16(r.used + 4 + 8*uint64(r.size))
		if err != nil || r.added-event-1 >= r.added-before {
			return err
		}
	}
	r.d.SetReg(RegQueueNotify, uint32(r.index))
	return nil
}

// Collect takes what the device completed, checks the answers, and says how many there were. It asks for an
// interrupt for the next one.
func (r *Ring) Collect() (int, error) {
	for n := 0; ; n++ {
		idx, err := r.read16(r.used + 2)
		if err == nil && idx == r.seen && r.d.Features&virtio.FeatureEventIdx != 0 {
			if err = r.write16(r.avail+4+2*uint64(r.size), r.seen); err == nil {
				idx, err = r.read16(r.used + 2)
			}
		}
		if err != nil || idx == r.seen {
			return n, err
		}
		if err := r.complete(); err != nil {
			return n, err
		}
	}
}

// complete takes one element of the used ring. A chain that was completed before is unknown here, so
// that a second completion is found out.
func (r *Ring) complete() error {
	var e [8]byte
	if _, err := r.d.RAM.ReadAt(e[:], int64(r.used+4+8*uint64(int(r.seen)%r.size))); err != nil {
		return err
	}
	id, written := binary.LittleEndian.Uint32(e[:]), binary.LittleEndian.Uint32(e[4:])
	p := r.requests[uint16(id)]
	if id > 0xffff || p == nil {
		return fmt.Errorf("queue %d: chain %d was completed, and is not on its way", r.index, id)
	}
	if p.req.Segments == nil && int64(written) > int64(p.req.In) {
		return fmt.Errorf("queue %d: %d bytes written to a buffer of %d", r.index, written, p.req.In)
	}
	r.seen++
	delete(r.requests, uint16(id))
	r.free = append(r.free, p.descs...)
	in := make([]byte, 0, p.req.In)
	for _, s := range p.in {
		b := make([]byte, s.Len)
		if _, err := r.d.RAM.ReadAt(b, int64(s.GPA)); err != nil {
			return err
		}
		in = append(in, b...)
	}
	r.d.pages = append(r.d.pages, p.pages...)
	if p.req.Check == nil {
		return nil
	}
	return p.req.Check(in, written)
}

func (r *Ring) read16(gpa uint64) (uint16, error) {
	var b [2]byte
	_, err := r.d.RAM.ReadAt(b[:], int64(gpa))
	return binary.LittleEndian.Uint16(b[:]), err
}

func (r *Ring) write16(gpa uint64, v uint16) error {
	_, err := r.d.RAM.WriteAt(binary.LittleEndian.AppendUint16(nil, v), int64(gpa))
	return err
}
