package snapshot

import (
	"bytes"
	"context"
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

// worker compresses and seals chunks into a pack of its own. Its buffers and its
// pack live as long as the Writer.
type worker struct {
	w     *Writer
	index int
	pack  *packWriter // nil before the first chunk
	comp  compressor
	stage []byte   // pages of a chunk that don't lie together in the guest
	block []byte   // what was read of a disk
	runs  []extent // of the chunk being made; first is set, chunk is not

	// Since the last collection by WriteMemory:
	chunks  []chunkRecord
	extents []extent // chunk is an index into chunks

	stored, zero, blocks uint64 // pages of memory, pages of zeros among it that were left out, and blocks of disks
	scan, compress, seal time.Duration
}

// unit is what a worker takes at a time: at most a chunk's worth of pages, in
// one or several pieces. The pieces are those from first up to the next unit's.
type unit struct {
	first  int
	taken  atomic.Bool
	worker int // who did it, and which extents of its came out
	from   int
	to     int
}

// job is one call of Write. Its pieces are in the snapshot's addresses: memory first, then the disks.
type job struct {
	ctx    context.Context
	memory *Memory // nil if there is none
	disks  map[int]*Disk
	wanted <-chan Range
	pieces []Range
	units  []unit
	next   atomic.Int64
	failed atomic.Bool // lets the other workers stop

	progress progressMeter
}

// cut makes units of ranges.
func (j *job) cut(ranges []Range, chunk uint64) {
	room := uint64(0)
	for _, r := range ranges {
		for r.Len > 0 {
			if room == 0 {
				j.units = append(j.units, unit{first: len(j.pieces)})
				room = chunk
			}
			n := min(r.Len, room)
			j.pieces = append(j.pieces, Range{r.GPA, n})
			r.GPA, r.Len, room = r.GPA+n, r.Len-n, room-n
		}
	}
}

// piecesOf returns the pieces of unit i.
func (j *job) piecesOf(i int) []Range {
	end := len(j.pieces)
	if i+1 < len(j.units) {
		end = j.units[i+1].first
	}
	return j.pieces[j.units[i].first:end]
}

// run lets the workers do all units of j.
func (w *Writer) run(j *job) error {
	n := min(w.opts.Workers, len(j.units))
	w.hire(n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i, k := range w.workers[:n] {
		wg.Go(func() {
			if errs[i] = k.work(j); errs[i] != nil {
				j.failed.Store(true)
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	if err := j.ctx.Err(); err != nil {
		return err
	}
	j.progress.finish()
	return nil
}

// hire makes sure that there are n workers.
func (w *Writer) hire(n int) {
	for len(w.workers) < n {
		w.workers = append(w.workers, &worker{w: w, index: len(w.workers)})
	}
}

// collect appends the workers' chunks to the Writer's and returns the extents of
// j in guest order. Units are in guest order, and so is what each made.
func (w *Writer) collect(j *job) []extent {
	base, n := make([]uint32, len(w.workers)), 0
	for i, k := range w.workers {
		base[i] = uint32(len(w.chunks))
		w.chunks = append(w.chunks, k.chunks...)
		n += len(k.extents)
		w.info.PagesStored += k.stored
		w.info.ZeroPages += k.zero
		w.info.DiskBlocks += k.blocks
		w.info.Scan += k.scan
		w.info.Compress += k.compress
		w.info.Seal += k.seal
	}
	out := make([]extent, 0, n)
	for i := range j.units {
		u := &j.units[i]
		for _, e := range w.workers[u.worker].extents[u.from:u.to] {
			e.chunk += base[u.worker]
			out = append(out, e)
		}
	}
	for _, k := range w.workers {
		k.chunks, k.extents = k.chunks[:0], k.extents[:0]
		k.stored, k.zero, k.blocks = 0, 0, 0
		k.scan, k.compress, k.seal = 0, 0, 0
	}
	return out
}

// work does units until none is left: those that are wanted first, then the others in their order.
func (k *worker) work(j *job) error {
	for !j.failed.Load() {
		if err := j.ctx.Err(); err != nil {
			return err
		}
		select {
		case r := <-j.wanted:
			if err := k.workOn(j, r); err != nil {
				return err
			}
			continue
		default:
		}
		i := int(j.next.Add(1)) - 1
		if i >= len(j.units) {
			return nil
		}
		if err := k.take(j, i); err != nil {
			return err
		}
	}
	return nil
}

// workOn does the units that r touches.
func (k *worker) workOn(j *job, r Range) error {
	start := func(i int) uint64 { return j.pieces[j.units[i].first].GPA }
	i := sort.Search(len(j.units), func(i int) bool { return start(i) > r.GPA })
	for i = max(i-1, 0); i < len(j.units) && start(i) < r.GPA+r.Len; i++ {
		if err := k.take(j, i); err != nil {
			return err
		}
	}
	return nil
}

// take does unit i, unless somebody else does or has.
func (k *worker) take(j *job, i int) error {
	u := &j.units[i]
	if u.taken.Swap(true) {
		return nil
	}
	from := len(k.extents)
	n, err := k.do(j, j.piecesOf(i))
	if err != nil {
		return err
	}
	u.worker, u.from, u.to = k.index, from, len(k.extents)
	j.progress.add(n)
	return nil
}

// do stores one unit and returns how many bytes of the guest it covers.
func (k *worker) do(j *job, pieces []Range) (uint64, error) {
	began := time.Now()
	plain, bytes, err := k.gather(j, pieces)
	scanned := time.Now()
	k.scan += scanned.Sub(began)
	if err != nil || len(plain) == 0 {
		return bytes, err
	}
	stored, codec := k.comp.compress(plain, k.w.opts.Codec)
	compressed := time.Now()
	k.compress += compressed.Sub(scanned)
	pages := uint32(len(plain) / PageSize)
	err = k.put(stored, codec, pages)
	k.seal += time.Since(compressed)
	if k.runs[0].page < diskPages {
		k.stored += uint64(pages)
	} else {
		k.blocks += uint64(pages)
	}
	return bytes, err
}

// gather returns the pages of pieces that are not zero, together, and notes in
// k.runs where in the guest they are. If they lie together in the guest, the
// result is the guest's memory itself, otherwise k.stage.
func (k *worker) gather(j *job, pieces []Range) (plain []byte, total uint64, err error) {
	k.runs = k.runs[:0]
	if k.stage == nil {
		k.stage = make([]byte, 0, k.w.opts.ChunkSize)
	}
	k.stage = k.stage[:0]
	pages := uint32(0)
	for i, p := range pieces {
		mem, err := k.bytes(j, p)
		if err != nil {
			return nil, 0, err
		}
		total += p.Len
		for at := 0; at < len(mem); {
			end := len(mem)
			if !j.keepsZeros(p.GPA) {
				end = nonZero(mem, at)
			}
			if end == at {
				at += PageSize
				k.countZeros(p.GPA, 1)
				continue
			}
			n := uint32((end - at) / PageSize)
			k.runs = append(k.runs, extent{page: (p.GPA + uint64(at)) / PageSize, count: n, first: pages})
			pages += n
			if len(k.runs) == 1 && i == len(pieces)-1 && restZero(mem, end) {
				k.countZeros(p.GPA, uint64(len(mem)-end)/PageSize)
				return mem[at:end], total, nil
			}
			k.stage = append(k.stage, mem[at:end]...)
			at = end
		}
	}
	return k.stage, total, nil
}

// bytes are the bytes of a piece: the guest's memory itself, or, until the next call, what
// was read of it or of a disk.
func (k *worker) bytes(j *job, p Range) ([]byte, error) {
	d := j.diskAt(p.GPA)
	if d == nil && j.memory.View != nil {
		return j.memory.view(p)
	}
	if k.block == nil {
		k.block = make([]byte, k.w.opts.ChunkSize)
	}
	if d != nil {
		return d.read(k.block[:p.Len], p.GPA)
	}
	return j.memory.read(k.block[:p.Len], p.GPA)
}

// diskAt is the disk that an address belongs to, nil for memory.
func (j *job) diskAt(address uint64) *Disk {
	if address < DiskStride {
		return nil
	}
	return j.disks[int(address/DiskStride)-1]
}

// keepsZeros says whether blocks of zeros at an address must be stored like others.
func (j *job) keepsZeros(address uint64) bool {
	d := j.diskAt(address)
	return d != nil && d.Layered
}

// countZeros counts pages of zeros, if they are memory.
func (k *worker) countZeros(address, n uint64) {
	if address < DiskStride {
		k.zero += n
	}
}

var zeroPage [PageSize]byte

// nonZero returns the end of the run of pages from at on that are not zero.
func nonZero(mem []byte, at int) int {
	for at < len(mem) && !bytes.Equal(mem[at:at+PageSize], zeroPage[:]) {
		at += PageSize
	}
	return at
}

func restZero(mem []byte, at int) bool {
	for ; at < len(mem); at += PageSize {
		if !bytes.Equal(mem[at:at+PageSize], zeroPage[:]) {
			return false
		}
	}
	return true
}

// put appends a chunk to the worker's pack and the runs in it to the extents.
func (k *worker) put(stored []byte, codec Codec, pages uint32) error {
	if k.pack == nil {
		if err := k.startPack(); err != nil {
			return fileError("start a pack", k.w.store.packs(), err)
		}
	}
	at, err := k.pack.append(stored)
	if err != nil {
		return fileError("write pack", k.w.store.PackPath(k.pack.id), err)
	}
	for _, e := range k.runs {
		e.chunk = uint32(len(k.chunks))
		k.extents = append(k.extents, e)
	}
	k.chunks = append(k.chunks, chunkRecord{
		offset: at,
		pack:   uint32(len(k.w.inherited) + k.index),
		length: uint32(len(stored)),
		pages:  pages,
		codec:  codec,
	})
	return nil
}

func (k *worker) startPack() error {
	file, err := k.w.store.files.Stage(k.w.store.packs())
	if err != nil {
		return err
	}
	k.pack, err = newPackWriter(file, k.w.id, k.w.key.Recipient())
	return err
}
