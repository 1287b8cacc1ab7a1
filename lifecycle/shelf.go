package lifecycle

import (
	"errors"
	"slices"
	"sync"

	"github.com/cryovisor/cryovisor/vmm"
)

// PoolMetrics are about VMs that are made in advance.
type PoolMetrics struct {
	Ready  int
	Taken  uint64 // by machines, which did not have to wait for theirs
	Missed uint64 // machines that found none of their size
	Err    error  // why the last could not be made, or nil
}

// shellMaker makes a VM for machines with so much memory.
type shellMaker func(memoryBytes uint64) (*vmm.Shell, error)

// shelf keeps VMs that were made in advance: one for each machine of those that were asked for last, of the same size, as the next will
// probably be like them. There are never more than that, those that are being made included. Its methods may be called from any number of goroutines.
type shelf struct {
	bound  int
	wake   chan struct{} // has a value when there may be something to do
	filler sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	build    shellMaker
	expected []uint64 // sizes of memory, of the latest machines, the oldest first: bound of them once there was one
	ready    map[uint64][]*vmm.Shell
	making   uint64 // the size of the VM that is being made, 0 if none is
	metrics  PoolMetrics
}

func newShelf(bound int) *shelf {
	return &shelf{bound: bound, build: reserveShell, wake: make(chan struct{}, 1), ready: make(map[uint64][]*vmm.Shell)}
}

// start has VMs be made, and those that nobody needs any more be closed, in the background.
func (s *shelf) start() {
	s.filler.Go(func() {
		for range s.wake {
			s.fill()
		}
	})
}

// pool is what there is for machines with so much memory.
func (s *shelf) pool(memoryBytes uint64) *Pool {
	if s == nil {
		return nil
	}
	return &Pool{shelf: s, memoryBytes: memoryBytes}
}

// expect notes that there will be machines of a size.
func (s *shelf) expect(size uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.note(size)
}

// note notes the size of a machine. The first one stands for those before it, of which nothing is known. The caller holds mu.
func (s *shelf) note(size uint64) {
	if s.expected == nil {
		s.expected = slices.Repeat([]uint64{size}, s.bound)
		return
	}
	s.expected = append(s.expected[1:], size)
}

// take takes a VM for a machine of a size, nil if there is none.
func (s *shelf) take(size uint64) *vmm.Shell {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.note(size)
	if len(s.ready[size]) == 0 {
		s.metrics.Missed++
		return nil
	}
	s.metrics.Taken++
	return s.pop(size)
}

// pop takes one of those that are ready. The caller holds mu.
func (s *shelf) pop(size uint64) *vmm.Shell {
	shells := s.ready[size]
	last := len(shells) - 1
	shell := shells[last]
	if s.ready[size] = shells[:last]; last == 0 {
		delete(s.ready, size)
	}
	s.metrics.Ready--
	return shell
}

// refill has the shelf look after itself.
func (s *shelf) refill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	select {
	case s.wake <- struct{}{}:
	default: // it is about to
	}
}

// put keeps a VM that was taken and not used, unless there are enough.
func (s *shelf) put(size uint64, shell *vmm.Shell) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.metrics.Taken--
	s.metrics.Missed++
	s.keep(size, shell)
}

// keep has a VM be ready, or closes it if there are enough. The caller holds mu.
func (s *shelf) keep(size uint64, shell *vmm.Shell) {
	if s.closed || s.surplus(size) >= 0 {
		_ = shell.Close() // nobody knows of it
		return
	}
	s.ready[size] = append(s.ready[size], shell)
	s.metrics.Ready++
}

// surplus is how many VMs of a size are there, or will be, that no machine is expected for; less than 0 if some are missing. The caller holds mu.
func (s *shelf) surplus(size uint64) int {
	n := len(s.ready[size])
	if s.making == size {
		n++
	}
	for _, expected := range s.expected {
		if expected == size {
			n--
		}
	}
	return n
}

// fill closes what is not needed any more, and then makes what is missing, until there is nothing to do. What can't be made is tried again
// when it is called again.
func (s *shelf) fill() {
	for {
		for shell := s.unneeded(); shell != nil; shell = s.unneeded() {
			_ = shell.Close() // nobody knows of it
		}
		size, build := s.missing()
		if size == 0 {
			return
		}
		shell, err := build(size)
		if !s.made(size, shell, err) {
			return
		}
	}
}

// unneeded takes a VM that no machine is expected for, nil if there is none.
func (s *shelf) unneeded() *vmm.Shell {
	s.mu.Lock()
	defer s.mu.Unlock()
	for size := range s.ready {
		if s.surplus(size) > 0 {
			return s.pop(size)
		}
	}
	return nil
}

// missing is a size of which there are too few VMs, and what makes one, which counts from now on; 0 if there is none.
func (s *shelf) missing() (memoryBytes uint64, build shellMaker) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, nil
	}
	for _, size := range slices.Backward(s.expected) {
		if s.surplus(size) < 0 {
			s.making = size
			return size, s.build
		}
	}
	return 0, nil
}

// made takes note of what has become of the VM that was being made. It says whether it is worth to go on.
func (s *shelf) made(size uint64, shell *vmm.Shell, err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.making, s.metrics.Err = 0, err
	if err == nil {
		s.keep(size, shell)
	}
	return err == nil
}

// reserveShell is a shellMaker.
func reserveShell(memoryBytes uint64) (*vmm.Shell, error) {
	shell, err := vmm.NewShell()
	if err != nil {
		return nil, err
	}
	if err := shell.Reserve(memoryBytes); err != nil {
		return nil, errors.Join(err, shell.Close())
	}
	return shell, nil
}

func (s *shelf) stats() PoolMetrics {
	if s == nil {
		return PoolMetrics{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.metrics
}

// close gives up what is ready. Whoever takes a VM then gets none. It is idempotent, and nothing to do for nil.
func (s *shelf) close() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	close(s.wake)
	s.mu.Unlock()
	s.filler.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for size := range s.ready {
		for len(s.ready[size]) > 0 {
			err = errors.Join(err, s.pop(size).Close())
		}
	}
	return err
}
