package virtiotest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// Subject is a device type for the suite.
type Subject struct {
	// New returns a device as a machine that boots or resumes would make it. Each has the same things behind it
	// (a disk, say); no two are in use at once.
	New func() virtio.Device
	// Next returns a random request. It is not posted if there is no room for it, and if so Posted is not called.
	Next func(rng *rand.Rand) Request
	// Posted says that a request of Next is on its way, and Reset that those on their way will not be
	// answered. Both may be nil.
	Posted func(Request)
	Reset  func()
}

// Steps is how many random operations Run performs for each seed.
const Steps = 400

// Run proves that the device completes every request exactly once, and with the right answer, whatever comes
// between: being quiesced, saved in the midst of its work and restored in a fresh instance with the same memory,
// resumed as it was, reset; with and without indirect descriptors and event index, with rings of many sizes.
func Run(t *testing.T, s Subject) {
	for seed := range uint64(12) {
		for _, features := range []virtio.Feature{
			0, virtio.FeatureIndirect, virtio.FeatureEventIdx, virtio.FeatureIndirect | virtio.FeatureEventIdx,
		} {
			t.Run(fmt.Sprintf("seed %d features %#x", seed, features), func(t *testing.T) {
				r := &run{t: t, s: s, features: ^(virtio.FeatureIndirect | virtio.FeatureEventIdx) | features}
				r.rng = rand.New(rand.NewPCG(seed, uint64(features)))
				r.run()
			})
		}
	}
}

type run struct {
	t        *testing.T
	s        Subject
	rng      *rand.Rand
	d        *Driver
	features virtio.Feature // that the driver wants
	posted   int
	answered int
}

func (r *run) run() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r.d = NewDriver(NewRAM(1<<20), r.rng)
	r.must(r.d.Attach(r.s.New()))
	defer func() { r.must(r.d.Transport.Close()) }()
	r.must(r.init())
	for range Steps {
		r.must(r.step(ctx))
	}
	r.must(r.finish(ctx))
	if r.posted != r.answered {
		r.t.Fatalf("%d requests were posted, %d answered", r.posted, r.answered)
	}
	if err := r.d.Transport.Err(); err != nil {
		r.t.Fatalf("the device failed: %v", err)
	}
}

func (r *run) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *run) init() error { return r.d.Init(r.features, 8<<r.rng.IntN(5)) }

func (r *run) step(ctx context.Context) error {
	switch n := r.rng.IntN(100); {
	case n < 50:
		return r.post()
	case n < 65:
		return r.kick()
	case n < 85:
		return r.collect()
	case n < 90:
		return r.finish(ctx)
	case n < 94:
		return r.pause(ctx)
	case n < 98:
		return r.move(ctx)
	case n < 99:
		return r.drainQuiesced(ctx)
	default:
		return r.reset()
	}
}

func (r *run) post() error {
	req := r.s.Next(r.rng)
	ok, err := r.d.Rings[req.Queue].Post(req)
	if ok {
		r.posted++
		if r.s.Posted != nil {
			r.s.Posted(req)
		}
	}
	return err
}

func (r *run) kick() error {
	for _, ring := range r.d.Rings {
		if err := ring.Kick(); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) collect() error {
	for _, ring := range r.d.Rings {
		n, err := ring.Collect()
		r.answered += n
		if err != nil {
			return err
		}
	}
	return nil
}

// finish rings for everything and waits until it is done, with interrupts only: a lost one is found out.
func (r *run) finish(ctx context.Context) error {
	if err := r.kick(); err != nil {
		return err
	}
	for {
		if err := r.collect(); err != nil {
			return err
		}
		pending := 0
		for _, ring := range r.d.Rings {
			pending += ring.Pending()
		}
		if pending == 0 {
			return nil
		}
		if _, err := r.d.Wait(ctx); err != nil {
			return fmt.Errorf("%d requests are pending: %w", pending, err)
		}
	}
}

// pause is a snapshot after which the device goes on.
func (r *run) pause(ctx context.Context) error {
	if _, err := r.save(ctx); err != nil {
		return err
	}
	return r.d.Transport.Resume()
}

// save quiesces the device twice and saves it; its memory must not change any more.
func (r *run) save(ctx context.Context) ([]byte, error) {
	for range 2 {
		if err := r.d.Transport.Quiesce(ctx); err != nil {
			return nil, err
		}
	}
	s, err := r.d.Transport.Save()
	if err != nil {
		return nil, err
	}
	return s.MarshalBinary()
}

// move is a snapshot that is resumed in another process.
func (r *run) move(ctx context.Context) error {
	encoded, err := r.save(ctx)
	if err != nil {
		return err
	}
	if err := r.d.Transport.Close(); err != nil {
		return err
	}
	var s virtio.State
	if err := s.UnmarshalBinary(encoded); err != nil {
		return err
	}
	// Interrupts that the first instance sent may not have reached the guest.
	select {
	case <-r.d.irq:
	default:
	}
	if err := r.d.Attach(r.s.New()); err != nil {
		return err
	}
	if err := r.d.Transport.Restore(s); err != nil {
		return err
	}
	return r.d.Transport.Resume()
}

// drainQuiesced checks that a quiesced device does nothing, even if it is rung.
func (r *run) drainQuiesced(ctx context.Context) error {
	if err := r.d.Transport.Quiesce(ctx); err != nil {
		return err
	}
	if err := r.collect(); err != nil {
		return err
	}
	if err := r.post(); err != nil {
		return err
	}
	if err := r.kick(); err != nil {
		return err
	}
	before := r.answered
	if err := r.collect(); err != nil {
		return err
	}
	if before != r.answered {
		return fmt.Errorf("a quiesced device completed %d requests", r.answered-before)
	}
	return r.d.Transport.Resume()
}

// reset is a driver that starts anew: what it had asked for is not answered any more.
func (r *run) reset() error {
	r.posted = r.answered
	if err := r.init(); err != nil {
		return err
	}
	if r.s.Reset != nil {
		r.s.Reset()
	}
	return nil
}
