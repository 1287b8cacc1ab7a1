package virtio_test

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func echoDriver(t *testing.T, dev virtio.Device, features virtio.Feature) *virtiotest.Driver {
	t.Helper()
	d := virtiotest.NewDriver(virtiotest.NewRAM(1<<20), rand.New(rand.NewPCG(1, 1)))
	if err := d.Attach(dev); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Transport.Close() })
	if err := d.Init(features, 16); err != nil {
		t.Fatal(err)
	}
	return d
}

type desc struct {
	addr        uint64
	len         uint32
	flags, next uint16
}

// Rings of 16 elements begin at 0: the table, at 256 the available ring. Tables of descriptors are put at 64 KiB.
const (
	availAt = 256
	tableAt = 64 << 10
)

func TestHostileRings(t *testing.T) {
	const next, write, indirect = virtiotest.DescNext, virtiotest.DescWrite, virtiotest.DescIndirect
	var outside *virtiotest.RangeError
	all := ^virtio.Feature(0)
	for name, c := range map[string]struct {
		features virtio.Feature
		ring     []desc
		table    []desc
		head     uint16
		idx      uint16
		ram      bool // the error is Memory's
	}{
		"a loop":                       {all, []desc{{4096, 1, next, 0}}, nil, 0, 1, false},
		"a loop of two":                {all, []desc{{4096, 1, next, 1}, {4096, 1, next, 0}}, nil, 0, 1, false},
		"a head beyond the table":      {all, nil, nil, 16, 1, false},
		"a successor beyond the table": {all, []desc{{4096, 1, next, 99}}, nil, 0, 1, false},
		"the index jumps":              {all, nil, nil, 0, 17, false},
		"the index goes back":          {all, nil, nil, 0, 0xffff, false},
		"readable after writable":      {all, []desc{{4096, 1, write | next, 1}, {4096, 1, 0, 0}}, nil, 0, 1, false},
		"an address that wraps":        {all, []desc{{^uint64(0), 2, 0, 0}}, nil, 0, 1, false},
		"4 GiB":                        {all, []desc{{0, 1 << 31, next, 1}, {0, 1 << 31, 0, 0}}, nil, 0, 1, false},
		"a buffer out of RAM":          {all, []desc{{1 << 40, 9, next, 1}, {4096, 9, write, 0}}, nil, 0, 1, true},
		"indirect, not negotiated":     {all &^ virtio.FeatureIndirect, []desc{{tableAt, 16, indirect, 0}}, nil, 0, 1, false},
		"indirect with a successor":    {all, []desc{{tableAt, 16, indirect | next, 1}}, nil, 0, 1, false},
		"an empty table":               {all, []desc{{tableAt, 0, indirect, 0}}, nil, 0, 1, false},
		"a table and a half":           {all, []desc{{tableAt, 24, indirect, 0}}, nil, 0, 1, false},
		"a table of 4 GiB":             {all, []desc{{tableAt, 0xfffffff0, indirect, 0}}, nil, 0, 1, false},
		"a table out of RAM":           {all, []desc{{1 << 40, 16, indirect, 0}}, nil, 0, 1, true},
		"indirect in indirect":         {all, []desc{{tableAt, 16, indirect, 0}}, []desc{{tableAt, 16, indirect, 0}}, 0, 1, false},
		"a loop in a table":            {all, []desc{{tableAt, 16, indirect, 0}}, []desc{{4096, 1, next, 0}}, 0, 1, false},
		"out of a table":               {all, []desc{{tableAt, 16, indirect, 0}}, []desc{{4096, 1, next, 1}}, 0, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := echoDriver(t, &echo{}, c.features)
			for i, e := range c.ring {
				must(nil, d.Rings[0].WriteDesc(0, uint16(i), e.addr, e.len, e.flags, e.next))
			}
			for i, e := range c.table {
				must(nil, d.Rings[0].WriteDesc(tableAt, uint16(i), e.addr, e.len, e.flags, e.next))
			}
			ring := binary.LittleEndian.AppendUint16([]byte{0, 0}, c.idx)
			if _, err := d.RAM.WriteAt(binary.LittleEndian.AppendUint16(ring, c.head), availAt); err != nil {
				t.Fatal(err)
			}
			d.SetReg(virtiotest.RegQueueNotify, 0)
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if s, err := d.Wait(ctx); err != nil || s != 2 {
				t.Fatalf("interrupt status %d, %v", s, err)
			}
			err := d.Transport.Err()
			if c.ram && !errors.As(err, &outside) || !c.ram && !errors.Is(err, virtio.ErrProtocol) {
				t.Errorf("untyped: %v", err)
			}
			if d.Reg(virtiotest.RegStatus)&virtiotest.NeedsReset == 0 {
				t.Error("no reset is needed")
			}
			// Such a machine can be saved, though the request is never given back; a reset makes it well.
			must(nil, d.Transport.Quiesce(ctx))
			if _, err := d.Transport.Save(); err != nil {
				t.Error(err)
			}
			must(nil, d.Transport.Resume())
			if err := d.Init(c.features, 16); err != nil {
				t.Error(err)
			}
		})
	}
}

// stuck is a device whose Stop waits for its gate. entered has room for the word that Stop was called.
type stuck struct {
	echo
	entered, gate chan struct{}
}

func (s *stuck) Stop(ctx context.Context) error {
	select {
	case s.entered <- struct{}{}:
	default:
	}
	select {
	case <-s.gate:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func TestQuiesceCancelled(t *testing.T) {
	s := &stuck{entered: make(chan struct{}, 1), gate: make(chan struct{})}
	d := echoDriver(t, s, ^virtio.Feature(0))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.Transport.Quiesce(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("while the device is stuck: %v", err)
	}
	if _, err := d.Transport.Save(); !errors.Is(err, virtio.ErrBusy) {
		t.Fatalf("save: %v", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.SetReg(virtiotest.RegStatus, 0)
	}()
	<-s.entered // the reset holds the transport now
	if err := d.Transport.Quiesce(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("while the driver's reset is stuck: %v", err)
	}
	close(s.gate)
	<-done
	must(nil, d.Transport.Quiesce(context.Background()))
	must(nil, d.Transport.Resume())
	must(nil, d.Init(^virtio.Feature(0), 16))
}

func TestClosedIsSilent(t *testing.T) {
	e := &echo{}
	d := echoDriver(t, e, ^virtio.Feature(0))
	must(nil, d.Transport.Close())
	e.host.ConfigChanged()
	e.host.Fail(errors.New("late"))
	if d.Reg(virtiotest.RegInterruptStatus) != 0 || d.Transport.Err() != nil {
		t.Errorf("an event after Close: %v", d.Transport.Err())
	}
}
