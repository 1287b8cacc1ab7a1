package virtio_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo copies the readable part of a request to the writable one, as far as mostEchoed: on its worker for queue 0, on other goroutines,
// in any order, for queue 1.
type echo struct {
	host   virtio.Host
	queues []*virtio.Queue
	wg     sync.WaitGroup
	config byte
}

// mostEchoed bounds what an answer takes, in bytes: a driver that means ill has chains of 4 GiB.
const mostEchoed = 64 << 10

func (e *echo) Type() virtio.DeviceType  { return 0x1234 }
func (e *echo) Features() virtio.Feature { return 1 << 3 }
func (e *echo) QueueSizes() []uint16     { return []uint16{64, 128} }
func (e *echo) Attach(h virtio.Host)     { e.host = h }

func (e *echo) ReadConfig(off uint64, p []byte) {
	clear(p)
	if off == 0 && len(p) > 0 {
		p[0] = e.config
	}
}
func (e *echo) WriteConfig(uint64, []byte) {}

func (e *echo) Start(_ virtio.Feature, queues []*virtio.Queue) { e.queues = queues }

func (e *echo) Serve() error {
	for i, q := range e.queues {
		for q != nil {
			c, err := q.Pop()
			if err != nil {
				return err
			}
			if c == nil {
				break
			}
			if i == 0 {
				err = e.answer(q, c)
			} else {
				e.wg.Go(func() {
					if err := e.answer(q, c); err != nil {
						e.host.Fail(err)
					}
				})
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (e *echo) answer(q *virtio.Queue, c *virtio.Chain) error {
	b := make([]byte, min(c.Readable.Len(), c.Writable.Len(), mostEchoed))
	if err := c.Readable.ReadAt(b, 0); err != nil {
		return err
	}
	if err := c.Writable.WriteAt(b, 0); err != nil {
		return err
	}
	if err := q.Push(c, uint32(len(b))); err != nil {
		return err
	}
	return q.Notify()
}

func (e *echo) Stop(context.Context) error {
	e.wg.Wait()
	return nil
}
func (e *echo) Reset()                {}
func (e *echo) Save() ([]byte, error) { return []byte{e.config}, nil }
func (e *echo) Restore(b []byte) error {
	if len(b) != 1 {
		return virtio.StateErrorf("%d bytes", len(b))
	}
	e.config = b[0]
	return nil
}
func (e *echo) Close() error { return nil }

func TestEchoConformance(t *testing.T) {
	virtiotest.Run(t, virtiotest.Subject{
		New: func() virtio.Device { return &echo{} },
		Next: func(rng *rand.Rand) virtiotest.Request {
			out := make([]byte, 1+rng.IntN(9000))
			for i := range out {
				out[i] = byte(rng.Uint32())
			}
			return virtiotest.Request{
				Queue: rng.IntN(2), Out: out, In: len(out),
				Check: func(in []byte, n uint32) error {
					if int(n) != len(out) || !bytes.Equal(in, out) {
						return fmt.Errorf("an echo of %d bytes is not that of %d", n, len(out))
					}
					return nil
				},
			}
		},
	})
}
