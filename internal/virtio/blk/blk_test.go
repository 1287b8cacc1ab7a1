package blk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/blk"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// disk is a blockdev.Device in memory.
type disk struct {
	mu       sync.Mutex
	mem      []byte
	readOnly bool
	fail     error         // of every operation
	flushes  int           // that were asked for
	gate     chan struct{} // every operation receives from it, if it is not nil
}

func newDisk(n int) *disk { return &disk{mem: make([]byte, n)} }

func (k *disk) do(off, n int64, move func(part []byte)) error {
	if k.gate != nil {
		<-k.gate
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return k.fail
	}
	if err := blockdev.CheckRange("access", off, n, int64(len(k.mem))); err != nil {
		return err
	}
	move(k.mem[off : off+n])
	return nil
}

func (k *disk) ReadAt(p []byte, off int64) (int, error) {
	return len(p), k.do(off, int64(len(p)), func(part []byte) { copy(p, part) })
}

func (k *disk) WriteAt(p []byte, off int64) (int, error) {
	return len(p), k.do(off, int64(len(p)), func(part []byte) { copy(part, p) })
}

func (k *disk) Discard(off, n int64) error     { return k.do(off, n, func(part []byte) { clear(part) }) }
func (k *disk) WriteZeroes(off, n int64) error { return k.Discard(off, n) }
func (k *disk) Flush() error                   { return k.do(0, 0, func([]byte) { k.flushes++ }) }
func (k *disk) Size() int64                    { return int64(len(k.mem)) }
func (k *disk) BlockSize() int                 { return 512 }
func (k *disk) ReadOnly() bool                 { return k.readOnly }

func device(t testing.TB, cfg blk.Config) virtio.Device {
	t.Helper()
	d, err := blk.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func header(kind uint32, sector uint64) []byte {
	b := binary.LittleEndian.AppendUint32(nil, kind)
	b = binary.LittleEndian.AppendUint32(b, 0)
	return binary.LittleEndian.AppendUint64(b, sector)
}

func span(sector uint64, sectors, flags uint32) []byte {
	b := binary.LittleEndian.AppendUint64(nil, sector)
	b = binary.LittleEndian.AppendUint32(b, sectors)
	return binary.LittleEndian.AppendUint32(b, flags)
}

const extent = 16 << 10 // bytes; requests under way are in different extents

// model is what a disk must contain. Extents that a reset caught in the middle of a change are unknown.
type model struct {
	mem     []byte
	busy    map[int]bool // extents; the value says that it is being changed
	unknown map[int]bool
}

func status(in []byte, written uint32, data []byte) error {
	if len(in) != len(data)+1 || in[len(data)] != 0 || int(written) != len(in) || !bytes.Equal(in[:len(data)], data) {
		return fmt.Errorf("%d bytes, %d written, status %d", len(in), written, in[len(in)-1])
	}
	return nil
}

func (m *model) next(rng *rand.Rand) virtiotest.Request {
	e := rng.IntN(len(m.mem) / extent)
	if _, busy := m.busy[e]; busy {
		return virtiotest.Request{Out: header(4, math.MaxUint64), In: 1, Check: func(in []byte, n uint32) error { return status(in, n, nil) }}
	}
	mem, sector := m.mem[e*extent:][:extent], uint64(e*extent/512)
	switch kind := rng.IntN(4); {
	case kind == 0 && !m.unknown[e]:
		return virtiotest.Request{Out: header(0, sector), In: extent + 1, Check: func(in []byte, n uint32) error {
			delete(m.busy, e)
			return status(in, n, mem)
		}}
	case kind <= 2:
		data := make([]byte, extent)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		return virtiotest.Request{Out: append(header(1, sector), data...), In: 1, Check: m.change(e, data)}
	default:
		kind := []uint32{11, 13}[rng.IntN(2)]
		out := append(header(kind, 0), span(sector, extent/512, 0)...)
		return virtiotest.Request{Out: out, In: 1, Check: m.change(e, make([]byte, extent))}
	}
}

func (m *model) change(e int, data []byte) func([]byte, uint32) error {
	return func(in []byte, n uint32) error {
		delete(m.busy, e)
		delete(m.unknown, e)
		copy(m.mem[e*extent:], data)
		return status(in, n, nil)
	}
}

func (m *model) posted(r virtiotest.Request) {
	switch sector := binary.LittleEndian.Uint64(r.Out[8:]); r.Out[0] {
	case 0, 1:
		m.busy[int(sector*512/extent)] = r.Out[0] == 1
	case 11, 13:
		m.busy[int(binary.LittleEndian.Uint64(r.Out[16:])*512/extent)] = true
	}
}

func (m *model) reset() {
	for e, changed := range m.busy {
		if changed {
			m.unknown[e] = true
		}
	}
	clear(m.busy)
}

func TestConformance(t *testing.T) {
	k := newDisk(64 * extent)
	m := &model{mem: make([]byte, len(k.mem)), busy: map[int]bool{}, unknown: map[int]bool{}}
	virtiotest.Run(t, virtiotest.Subject{
		New:  func() virtio.Device { return device(t, blk.Config{Disk: k, Workers: 3}) },
		Next: m.next, Posted: m.posted, Reset: m.reset,
	})
	for e := range len(k.mem) / extent {
		if !m.unknown[e] && !bytes.Equal(k.mem[e*extent:][:extent], m.mem[e*extent:][:extent]) {
			t.Errorf("extent %d is not what was written", e)
		}
	}
}

func driver(t *testing.T, cfg blk.Config, want virtio.Feature) *virtiotest.Driver {
	t.Helper()
	d := virtiotest.NewDriver(virtiotest.NewRAM(1<<20), rand.New(rand.NewPCG(1, 1)))
	if err := d.Attach(device(t, cfg)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Transport.Close() })
	if err := d.Init(want, 64); err != nil {
		t.Fatal(err)
	}
	return d
}

// ask posts a request and returns the answer.
func ask(t *testing.T, d *virtiotest.Driver, out []byte, in int) (data []byte, written uint32) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ok, err := d.Rings[0].Post(virtiotest.Request{Out: out, In: in, Check: func(b []byte, n uint32) error {
		data, written = b, n
		return nil
	}})
	if !ok || err != nil {
		t.Fatalf("no room: %v", err)
	}
	if err := d.Rings[0].Kick(); err != nil {
		t.Fatal(err)
	}
	for data == nil {
		if _, err := d.Rings[0].Collect(); err != nil {
			t.Fatal(err)
		}
		if data == nil {
			if _, err := d.Wait(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	return data, written
}

const all = ^virtio.Feature(0)

func TestStatus(t *testing.T) {
	const sectors = 16
	join := func(b ...[]byte) []byte { return bytes.Join(b, nil) }
	sector := make([]byte, 512)
	for name, c := range map[string]struct {
		out      []byte
		in       int
		readOnly bool
		want     byte
		written  uint32
	}{
		"read the last":            {header(0, sectors-1), 513, false, 0, 513},
		"read past the end":        {header(0, sectors-1), 1025, false, 1, 0},
		"read far away":            {header(0, math.MaxUint64), 513, false, 1, 0},
		"read where bytes wrap":    {header(0, 1<<55), 513, false, 1, 0},
		"read half a sector":       {header(0, 0), 257, false, 1, 0},
		"read nothing":             {header(0, 0), 1, false, 0, 1},
		"write":                    {join(header(1, 3), sector), 1, false, 0, 1},
		"write half a sector":      {join(header(1, 3), sector[:100]), 1, false, 1, 1},
		"write past the end":       {join(header(1, sectors), sector), 1, false, 1, 1},
		"write read-only":          {join(header(1, 3), sector), 1, true, 1, 1},
		"flush":                    {header(4, 0), 1, false, 0, 1},
		"id":                       {header(8, 0), 21, false, 0, 21},
		"id, more room":            {header(8, 0), 31, false, 0, 20},
		"unknown":                  {header(99, 0), 1, false, 2, 1},
		"discard":                  {join(header(11, 0), span(0, 4, 0)), 1, false, 0, 1},
		"discard with unmap":       {join(header(11, 0), span(0, 4, 1)), 1, false, 2, 1},
		"discard read-only":        {join(header(11, 0), span(0, 4, 0)), 1, true, 2, 1},
		"discard nothing":          {header(11, 0), 1, false, 1, 1},
		"discard half a segment":   {join(header(11, 0), sector[:8]), 1, false, 1, 1},
		"discard too many":         {join(header(11, 0), sector), 1, false, 1, 1},
		"discard past the end":     {join(header(11, 0), span(0, 1, 0), span(sectors, 1, 0)), 1, false, 1, 1},
		"write zeroes":             {join(header(13, 0), span(0, 4, 0)), 1, false, 0, 1},
		"write zeroes, unmap":      {join(header(13, 0), span(0, 4, 1)), 1, false, 0, 1},
		"write zeroes, bad flag":   {join(header(13, 0), span(0, 4, 2)), 1, false, 2, 1},
		"write zeroes, long range": {join(header(13, 0), span(0, math.MaxUint32, 0)), 1, false, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			k := newDisk(sectors * 512)
			k.readOnly = c.readOnly
			for i := range k.mem {
				k.mem[i] = 7
			}
			d := driver(t, blk.Config{Disk: k, Serial: "a serial"}, all)
			in, written := ask(t, d, c.out, c.in)
			if in[len(in)-1] != c.want || written != c.written {
				t.Errorf("status %d, %d written; want %d, %d", in[len(in)-1], written, c.want, c.written)
			}
			if c.want != 0 && !bytes.Equal(k.mem, bytes.Repeat([]byte{7}, len(k.mem))) {
				t.Error("the disk was changed")
			}
			if c.out[0] == 8 && !bytes.Equal(in[:20], append([]byte("a serial"), make([]byte, 12)...)) {
				t.Errorf("serial number %q", in[:20])
			}
		})
	}
}

func TestProtocolErrors(t *testing.T) {
	for name, r := range map[string]virtiotest.Request{
		"no status":    {Out: header(0, 0)},
		"short header": {Out: header(0, 0)[:15], In: 1},
	} {
		d := driver(t, blk.Config{Disk: newDisk(4096)}, all)
		if ok, err := d.Rings[0].Post(r); !ok || err != nil {
			t.Fatal(err)
		}
		if err := d.Rings[0].Kick(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		if s, err := d.Wait(ctx); err != nil || s != 2 {
			t.Fatalf("%s: interrupt status %d, %v", name, s, err)
		}
		if !errors.Is(d.Transport.Err(), virtio.ErrProtocol) || d.Reg(virtiotest.RegStatus)&virtiotest.NeedsReset == 0 {
			t.Errorf("%s: %v", name, d.Transport.Err())
		}
		// The request is never given back, and the machine can be saved even so.
		if err := d.Transport.Quiesce(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Transport.Save(); err != nil {
			t.Errorf("%s: save: %v", name, err)
		}
		cancel()
	}
}

func TestDiskErrors(t *testing.T) {
	k := newDisk(4096)
	k.fail = errors.New("injected")
	var got []error
	d := driver(t, blk.Config{Disk: k, Workers: 1, OnError: func(err error) { got = append(got, err) }}, all)
	outs := [][]byte{
		append(header(1, 0), make([]byte, 512)...), header(4, 0),
		append(header(11, 0), span(0, 1, 0)...), append(header(13, 0), span(0, 1, 0)...),
	}
	for _, out := range outs {
		if in, _ := ask(t, d, out, 1); in[0] != 1 {
			t.Errorf("type %d: status %d", out[0], in[0])
		}
	}
	if in, n := ask(t, d, header(0, 0), 513); in[512] != 1 || n != 0 {
		t.Errorf("read: status %d, %d written", in[512], n)
	}
	if err := d.Transport.Quiesce(context.Background()); !errors.Is(err, k.fail) {
		t.Errorf("quiesce with a disk that can't be flushed: %v", err)
	}
	if len(got) != len(outs)+1 {
		t.Fatalf("%d errors were reported: %v", len(got), got)
	}
	for _, err := range got {
		if !errors.Is(err, k.fail) {
			t.Error(err)
		}
	}
	k.mu.Lock()
	k.fail = nil
	k.mu.Unlock()
	if in, _ := ask(t, d, outs[0], 1); in[0] != 0 {
		t.Errorf("status %d once the disk works", in[0])
	}
}

func TestWriteThrough(t *testing.T) {
	for want, flushes := range map[virtio.Feature]int{all: 0, all &^ blk.FeatureFlush: 1} {
		k := newDisk(4096)
		d := driver(t, blk.Config{Disk: k}, want)
		ask(t, d, append(header(1, 0), make([]byte, 512)...), 1)
		if k.flushes != flushes {
			t.Errorf("features %#x: %d flushes", want, k.flushes)
		}
	}
}

// Discards and writes of zeros are for drivers that have negotiated them, each by itself.
func TestNotNegotiated(t *testing.T) {
	for name, c := range map[string]struct {
		kind   uint32
		want   virtio.Feature
		status byte
	}{
		"discard":                   {11, all &^ blk.FeatureDiscard, 2},
		"discard, not zeroes":       {11, all &^ blk.FeatureWriteZeroes, 0},
		"write zeroes":              {13, all &^ blk.FeatureWriteZeroes, 2},
		"write zeroes, not discard": {13, all &^ blk.FeatureDiscard, 0},
	} {
		k := newDisk(4096)
		k.mem[0] = 7
		d := driver(t, blk.Config{Disk: k}, c.want)
		in, _ := ask(t, d, append(header(c.kind, 0), span(0, 1, 0)...), 1)
		if in[0] != c.status || (k.mem[0] == 7) != (c.status != 0) {
			t.Errorf("%s: status %d, want %d; the disk has %d", name, in[0], c.status, k.mem[0])
		}
	}
}

// A pause that gives up on a disk that hangs leaves a device that works on, and can be paused later.
func TestStuckDisk(t *testing.T) {
	k := newDisk(4096)
	k.gate = make(chan struct{})
	d := driver(t, blk.Config{Disk: k, Workers: 1}, all)
	done := 0
	for range 3 {
		ok, err := d.Rings[0].Post(virtiotest.Request{Out: header(0, 0), In: 513, Check: func(in []byte, _ uint32) error {
			done++
			return status(in, 513, make([]byte, 512))
		}})
		if !ok || err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Rings[0].Kick(); err != nil {
		t.Fatal(err)
	}
	d.Idle() // the worker has taken one and does not wait for it
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.Transport.Quiesce(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("quiesce: %v", err)
	}
	close(k.gate)
	ctx, cancel = context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		if _, err := d.Rings[0].Collect(); err != nil {
			t.Fatal(err)
		}
		if done == 3 {
			break
		}
		if _, err := d.Wait(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Transport.Quiesce(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestConfigErrors(t *testing.T) {
	for name, cfg := range map[string]blk.Config{
		"no disk":     {},
		"empty disk":  {Disk: newDisk(0)},
		"odd disk":    {Disk: newDisk(700)},
		"long serial": {Disk: newDisk(512), Serial: "123456789012345678901"},
		"workers":     {Disk: newDisk(512), Workers: -1},
	} {
		if _, err := blk.New(cfg); !errors.Is(err, blk.ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRestoreOnAnotherDisk(t *testing.T) {
	state, err := device(t, blk.Config{Disk: newDisk(4096)}).Save()
	if err != nil {
		t.Fatal(err)
	}
	if err := device(t, blk.Config{Disk: newDisk(4096)}).Restore(state); err != nil {
		t.Error(err)
	}
	for _, s := range [][]byte{nil, state[1:], append(state[:len(state):len(state)], 0), append([]byte{2}, state[1:]...)} {
		if err := device(t, blk.Config{Disk: newDisk(4096)}).Restore(s); !errors.Is(err, virtio.ErrState) {
			t.Errorf("%d bytes: %v", len(s), err)
		}
	}
	if err := device(t, blk.Config{Disk: newDisk(8192)}).Restore(state); !errors.Is(err, virtio.ErrState) {
		t.Error(err)
	}
}

func fresh() virtio.Device {
	d, err := blk.New(blk.Config{Disk: newDisk(8 << 10), Workers: 1})
	if err != nil {
		panic(err)
	}
	return d
}

func FuzzRings(f *testing.F) {
	f.Add(uint64(all), virtiotest.RingImage(f, fresh, all,
		virtiotest.Request{Out: header(0, 1), In: 1025},
		virtiotest.Request{Out: append(header(1, 1), make([]byte, 512)...), In: 1},
		virtiotest.Request{Out: append(header(13, 0), span(0, 4, 1)...), In: 1}))
	f.Fuzz(func(t *testing.T, features uint64, image []byte) {
		virtiotest.FuzzRings(t, fresh, virtio.Feature(features), image)
	})
}

func FuzzRegisters(f *testing.F) {
	f.Add([]byte(nil), []byte{8, 1, 0, 0, 0, 8, 3, 0, 0, 0, 2, 1, 0, 0, 0, 1, 1, 0, 0, 0, 8, 15, 0, 0, 0})
	f.Fuzz(func(t *testing.T, image, ops []byte) {
		virtiotest.FuzzRegisters(t, fresh, image, ops)
	})
}

func TestHostileVCPUs(t *testing.T) {
	several := func() virtio.Device { return device(t, blk.Config{Disk: newDisk(64 << 10), Workers: 3}) }
	virtiotest.Hostile(t, several, all,
		virtiotest.Request{Out: header(0, 1), In: 1025},
		virtiotest.Request{Out: append(header(1, 1), make([]byte, 4096)...), In: 1},
		virtiotest.Request{Out: append(header(13, 0), span(0, 4, 1)...), In: 1},
		virtiotest.Request{Out: header(4, 0), In: 1})
}
