package memory

import (
	"context"
	"time"
)

// SetBuffers sets how many pieces of 256 KiB the Still copies and nobody has read
// at most, for the time after Freeze.
func (s *Still) SetBuffers(n int) { s.buffers = n }

// SetClock sets what an Image takes for the time, and how it waits before a fetch is
// tried again.
func (img *Image) SetClock(now func() time.Time, pause func(context.Context, time.Duration) error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	img.now, img.pause = now, pause
}

// Pages is how many pages the Image takes to be in its file.
func (img *Image) Pages() int64 { return img.pages.Load() }

// Demands is how many fetches of the Image somebody waits for.
func (img *Image) Demands() int {
	img.mu.Lock()
	defer img.mu.Unlock()
	return img.demands
}

// Quiet is what happens when for a moment nobody waits.
func (img *Image) Quiet() {
	img.mu.Lock()
	defer img.mu.Unlock()
	img.quiet()
}

// Lose is what a pager does that can't read faults any more.
func (m *Memory) Lose(err error) { m.lose(m.lazy.fd, err) }

// CanCollapse says whether this kernel can move an image to huge pages.
func CanCollapse() bool { return canCollapse() }
