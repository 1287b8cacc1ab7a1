package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cryovisor/cryovisor/snapshot"
)

// Preparation is a pause that has begun while the machine runs on: most of what it has to store is written already. It is ended by
// Pause or by Close. Its methods may be called from any goroutine.
type Preparation struct {
	s     *storing
	ended bool // guarded by s.m.pausing
}

// ErrEnded says that a Preparation has been used up or given up.
var ErrEnded = errors.New("lifecycle: the preparation has ended")

// Passes over the memory end when they no longer help.
const (
	// fewBytes take about as long to store as the machine takes to stop.
	fewBytes = 1 << 20
	// maxPasses is for a guest that writes less and less, but not little.
	maxPasses = 8
)

// Prepare stores the machine while it runs, for a pause that will come soon: what has been written meanwhile is stored in
// further passes, until that does not make it less. The machine and, afterwards, Preparation.Pause are as if there had been none;
// only what changes between the last pass and the pause is left to be stored while the machine stands still. The machine runs a little slower
// until the preparation has ended, as it notes which pages are written.
//
// The caller ends the preparation, with Pause or Close. opts and errors are those of Machine.Pause.
func (m *Machine) Prepare(ctx context.Context, store *snapshot.Store, opts PauseOptions) (*Preparation, error) {
	var p *Preparation
	_, err := m.try(ctx, true, func(ctx context.Context, _ *attempt) (Paused, error) {
		s, err := m.newStoring(ctx, store, opts)
		if err != nil {
			return Paused{}, err
		}
		p = &Preparation{s: s}
		if err := p.first(ctx); err != nil {
			return Paused{}, errors.Join(err, p.end())
		}
		return Paused{}, nil
	})
	if err != nil {
		return nil, fmt.Errorf("prepare a pause: %w", err)
	}
	return p, nil
}

// first makes the first pass, over everything, and those that follow.
func (p *Preparation) first(ctx context.Context) error {
	epoch, err := p.s.m.ledger.begin()
	if err != nil {
		return err
	}
	// What is written from here on is in the epoch, whether this pass sees it or not.
	contents, err := p.s.contents(ctx)
	p.s.since = epoch
	if err != nil {
		return err
	}
	if err := p.write(ctx, contents); err != nil {
		return err
	}
	return p.passes(ctx)
}

// passes stores what has changed since the last pass, again and again.
func (p *Preparation) passes(ctx context.Context) error {
	last := ^uint64(0)
	for range maxPasses {
		changed, err := p.s.m.ledger.read(p.s.since)
		if err != nil {
			return err
		}
		if n := changed.size(); n <= fewBytes || n > last/2 {
			return nil
		}
		contents, err := p.s.contents(ctx)
		if err != nil {
			return err
		}
		before := p.s.paused.PreparedBytes
		if err := p.write(ctx, contents); err != nil {
			return err
		}
		last = p.s.paused.PreparedBytes - before
	}
	return nil
}

func (p *Preparation) write(ctx context.Context, contents snapshot.Contents) error {
	p.s.paused.PreparedBytes += size(contents.Memory.Data)
	for _, d := range contents.Disks {
		p.s.paused.PreparedBytes += size(d.Data)
	}
	return p.s.writer.Write(ctx, contents)
}

// Update stores what has changed since, if that is much: for a pause that is later than expected. What was stored of it before is
// left in the snapshot's files as waste. After an error the preparation has ended.
func (p *Preparation) Update(ctx context.Context) error {
	_, err := p.s.m.try(ctx, true, func(ctx context.Context, _ *attempt) (Paused, error) {
		if p.ended {
			return Paused{}, ErrEnded
		}
		if err := p.passes(ctx); err != nil {
			return Paused{}, errors.Join(err, p.end())
		}
		return Paused{}, nil
	})
	if err != nil {
		return fmt.Errorf("prepare a pause: %w", errors.Join(err, p.Close())) // which may not have been tried: of a closed machine
	}
	return nil
}

// Pause stops the machine and completes the snapshot, as Machine.Pause does. Whatever it returns, the preparation has ended.
func (p *Preparation) Pause(ctx context.Context) (Paused, error) {
	paused, err := p.s.m.try(ctx, false, func(ctx context.Context, a *attempt) (Paused, error) {
		if p.ended {
			close(a.released)
			return Paused{}, ErrEnded
		}
		p.ended = true
		return p.s.pause(ctx, a, time.Now())
	})
	if err != nil {
		return Paused{}, fmt.Errorf("pause: %w", errors.Join(err, p.Close())) // as in Update
	}
	return paused, nil
}

// Close gives the preparation up, and removes what was written. After Pause, or a second time, it does nothing. It waits for a call
// of Update or Pause under way.
func (p *Preparation) Close() error {
	p.s.m.pausing.Lock()
	defer p.s.m.pausing.Unlock()
	return p.end()
}

// end ends a preparation that has not ended. The caller holds pausing.
func (p *Preparation) end() error {
	if p.ended {
		return nil
	}
	p.ended = true
	return p.s.clear()
}
