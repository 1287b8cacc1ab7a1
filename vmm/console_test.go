//go:build linux && amd64

package vmm

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// slowDeadline is an input whose deadline takes until it is let go.
type slowDeadline struct {
	*strings.Reader
	entered, release chan struct{}
	set              atomic.Int32
}

func (s *slowDeadline) SetReadDeadline(time.Time) error {
	s.entered <- struct{}{}
	<-s.release
	s.set.Add(1)
	return nil
}

// TestInputUseEndsWithoutALateDeadline: a deadline that comes after the end would hit the next user.
func TestInputUseEndsWithoutALateDeadline(t *testing.T) {
	in := &slowDeadline{Reader: strings.NewReader("x"), entered: make(chan struct{}, 2), release: make(chan struct{})}
	use := &inputUse{in: in}
	set := make(chan error, 1)
	go func() { set <- use.SetReadDeadline(time.Unix(1, 0)) }()
	<-in.entered
	ended := make(chan int32)
	go func() {
		use.end()
		ended <- in.set.Load()
	}()
	close(in.release)
	if n := <-ended; n != 1 {
		t.Error("ended while a deadline was on its way")
	}
	if err := <-set; err != nil {
		t.Error(err)
	}
	if err := use.SetReadDeadline(time.Unix(1, 0)); err != nil || in.set.Load() != 1 {
		t.Errorf("%v; %d deadlines reached the input, want 1", err, in.set.Load())
	}
}
