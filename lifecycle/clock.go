package lifecycle

import "time"

// Clock tells the time and waits. Its methods are called from several goroutines.
type Clock interface {
	Now() time.Time
	// NewTimer returns a channel that is sent the time once it has come to t, and what gives that up.
	NewTimer(t time.Time) (c <-chan time.Time, stop func())
}

// SystemClock is the system's wall clock.
type SystemClock struct{}

// Now implements Clock.
func (SystemClock) Now() time.Time { return time.Now() }

// NewTimer implements Clock.
func (SystemClock) NewTimer(t time.Time) (c <-chan time.Time, stop func()) {
	timer := time.NewTimer(time.Until(t))
	return timer.C, func() { timer.Stop() }
}
