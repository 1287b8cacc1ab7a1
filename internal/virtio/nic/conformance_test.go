package nic

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

// TestConformance sends frames and commands: each frame comes out of the tap once, in order, and before its buffer
// is given back; those that can't be sent never do.
func TestConformance(t *testing.T) {
	tap := newFakeTap()
	var log [][]byte // that came out and whose buffers were not seen to come back
	var number uint64
	virtiotest.Run(t, virtiotest.Subject{
		New: func() virtio.Device { return tap.open(t, 0) },
		Next: func(rng *rand.Rand) virtiotest.Request {
			if rng.IntN(4) == 0 {
				return randomCommand(rng)
			}
			number++
			frame := testFrame(number, 22+rng.IntN(1500))
			bad := rng.IntN(5) == 0
			if bad {
				frame[rng.IntN(2)] = 1 // no checksum, or to be segmented
			}
			return virtiotest.Request{Queue: txQueue, Out: frame, Check: func([]byte, uint32) error {
				log = append(log, tap.sent()...)
				switch {
				case bad:
					return nil
				case len(log) == 0:
					return fmt.Errorf("the buffer of a frame came back, and it did not come out")
				case !bytes.Equal(log[0], frame):
					return fmt.Errorf("frame %x came out in place of %x", log[0], frame)
				}
				log = log[1:]
				return nil
			}}
		},
		Reset: func() {
			tap.sent()
			log = nil
		},
	})
	if log = append(log, tap.sent()...); len(log) > 0 {
		t.Fatalf("%d frames too many came out", len(log))
	}
}

func randomCommand(rng *rand.Rand) virtiotest.Request {
	c := []struct {
		out    []byte
		answer byte
	}{
		{[]byte{classAnnounce, commandAnnounce}, answerOK},
		{[]byte{classAnnounce, 1}, answerErr},
		{[]byte{0, 0, 1}, answerErr},
		{[]byte{1, 1, 2, 0, 0, 0, 0, 9}, answerErr},
	}[rng.IntN(4)]
	return virtiotest.Request{Queue: ctrlQueue, Out: c.out, In: 1, Check: func(in []byte, n uint32) error {
		if n != 1 || in[0] != c.answer {
			return fmt.Errorf("command %x was answered by %x (%d bytes)", c.out, in, n)
		}
		return nil
	}}
}

// TestReceive proves that each frame that is sent to the tap reaches the driver once and in order, whatever comes
// between, but for those in the backlog of a device that is moved to another process, which are known.
func TestReceive(t *testing.T) {
	for seed := range uint64(8) {
		for _, features := range []virtio.Feature{0, virtio.FeatureIndirect, virtio.FeatureEventIdx} {
			t.Run(fmt.Sprintf("seed %d features %#x", seed, features), func(t *testing.T) {
				r := &receiver{guest: newGuest(t, seed), tap: newFakeTap()}
				r.dev = r.tap.open(t, 0)
				r.must(r.Attach(r.dev))
				defer func() { r.must(r.Transport.Close()) }()
				r.must(r.Init(offered|virtio.FeatureVersion1|features, 8<<r.Rand.IntN(5)))
				for range 600 {
					r.step()
				}
				r.finish()
			})
		}
	}
}

type receiver struct {
	*guest
	tap    *fakeTap
	dev    *Device
	number uint64
	want   [][]byte // on their way, as the driver should get them
}

func (r *receiver) step() {
	switch n := r.Rand.IntN(100); {
	case n < 35:
		r.feed(1 + r.Rand.IntN(2*backlogFrames/(1+r.Rand.IntN(30))))
	case n < 65:
		r.buffers(1 + r.Rand.IntN(8))
	case n < 75:
		r.must(r.Rings[rxQueue].Kick())
	case n < 92:
		_, err := r.Rings[rxQueue].Collect()
		r.must(err)
	case n < 97:
		r.must(r.Transport.Quiesce(r.ctx))
		r.must(r.Transport.Resume())
	default:
		r.move(r.next)
	}
}

func (r *receiver) feed(n int) {
	for range n {
		r.number++
		frame := testFrame(r.number, 22+r.Rand.IntN(1500))
		r.tap.feed(frame)
		seen := bytes.Clone(frame)
		seen[headerNumBuffers] = 1
		r.want = append(r.want, seen)
	}
}

// buffers posts up to n buffers, as many as there is room for.
func (r *receiver) buffers(n int) {
	for range n {
		ok, err := r.Rings[rxQueue].Post(virtiotest.Request{Queue: rxQueue, In: bufferSize(DefaultMTU), Check: r.check})
		r.must(err)
		if !ok {
			return
		}
	}
}

func (r *receiver) check(in []byte, n uint32) error {
	if len(r.want) == 0 {
		return fmt.Errorf("frame %x was not sent", in[:n])
	}
	if !bytes.Equal(in[:n], r.want[0]) {
		return fmt.Errorf("frame %x\nin place of %x", in[:n], r.want[0])
	}
	r.want = r.want[1:]
	return nil
}

// next opens the tap for another device, and strikes off what the old one had not delivered.
func (r *receiver) next() *Device {
	for {
		lost := r.dev.backlog.head()
		if lost == nil {
			break
		}
		r.dev.backlog.take()
		setHeader(lost, 1)
		at := 0
		for at < len(r.want) && !bytes.Equal(r.want[at], lost) {
			at++
		}
		if at == len(r.want) {
			r.t.Fatalf("the backlog has a frame that was delivered, or not sent: %x", lost)
		}
		r.want = append(r.want[:at:at], r.want[at+1:]...)
	}
	r.dev = r.tap.open(r.t, 0)
	return r.dev
}

// finish offers buffers until all frames have come, told by interrupts only.
func (r *receiver) finish() {
	for {
		_, err := r.Rings[rxQueue].Collect()
		r.must(err)
		if len(r.want) == 0 {
			break
		}
		if r.Rings[rxQueue].Pending() == 0 {
			r.buffers(4)
			r.must(r.Rings[rxQueue].Kick())
			continue
		}
		r.must(r.Rings[rxQueue].Kick())
		_, err = r.Wait(r.ctx)
		r.must(err)
	}
	r.must(r.Transport.Quiesce(r.ctx))
	if n, err := r.Rings[rxQueue].Collect(); n != 0 || err != nil {
		r.t.Fatalf("%d frames too many, %v", n, err)
	}
	if s := r.dev.Stats(); s.RxDropped != 0 || r.Transport.Err() != nil {
		r.t.Fatalf("%+v, %v", s, r.Transport.Err())
	}
}
