package vsock

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

// stateless is a model of the device without connections, which the suite's model of request and answer fits: a
// packet of no connection takes a transmit buffer, and causes one reset, which takes a receive buffer. Connections
// do not fit: receive and event buffers wait for something that no request asks for, and a move
// ends all connections. TestQuiesce and TestRestore are about those.
type stateless struct {
	rng      *rand.Rand // of the run; each of the suite's runs begins with a new device
	expected []header   // resets that the device owes, in order
	posted   int        // receive buffers for them
}

// mostExpected leaves the device one below the number of resets at which it takes no more packets: the suite would wait
// for it to take them, and it for receive buffers.
var mostExpected = defaultLimits.resets - 1

func (s *stateless) next(rng *rand.Rand) virtiotest.Request {
	if s.rng != rng {
		*s = stateless{rng: rng}
	}
	if s.posted < len(s.expected) && (rng.IntN(2) == 0 || len(s.expected) >= mostExpected) {
		return virtiotest.Request{Queue: queueRX, In: headerSize + 1 + rng.IntN(5000), Check: s.check}
	}
	h := header{
		srcCID: testCID, dstCID: hostCID, srcPort: rng.Uint32(), dstPort: rng.Uint32(), typ: typeStream,
		op: uint16(rng.IntN(10)), flags: rng.Uint32(), bufAlloc: rng.Uint32(), fwdCnt: rng.Uint32(),
	}
	if rng.IntN(4) == 0 {
		h.srcCID = rng.Uint64()
	}
	payload := make([]byte, rng.IntN(5000))
	h.len = uint32(len(payload))
	if h.op == opRequest || len(s.expected) >= mostExpected {
		h.op = opReset // which is not answered; a request is answered when its socket was dialled
	}
	return virtiotest.Request{Queue: queueTX, Out: append(h.append(nil), payload...), Check: checkSent}
}

func checkSent(_ []byte, n uint32) error {
	if n != 0 {
		return fmt.Errorf("%d bytes were written to a packet that was sent", n)
	}
	return nil
}

func (s *stateless) check(in []byte, n uint32) error {
	if n != headerSize {
		return fmt.Errorf("a reset of %d bytes", n)
	}
	if h := decodeHeader((*[headerSize]byte)(in)); h != s.expected[0] {
		return fmt.Errorf("got %+v, want %+v", h, s.expected[0])
	}
	s.expected = s.expected[1:]
	s.posted--
	return nil
}

func (s *stateless) add(r virtiotest.Request) {
	if r.Queue == queueRX {
		s.posted++
		return
	}
	if h := decodeHeader((*[headerSize]byte)(r.Out)); h.op != opReset {
		s.expected = append(s.expected, h.reset())
	}
}

func TestConformance(t *testing.T) {
	s := &stateless{}
	forget := func() { *s = stateless{rng: s.rng} }
	path := testPath(t)
	virtiotest.Run(t, virtiotest.Subject{
		New: func() virtio.Device {
			d, err := New(Config{CID: testCID, Path: path})
			if err != nil {
				panic(err) // the suite has no way to say it
			}
			return d
		},
		Next:   s.next,
		Posted: s.add,
		Reset:  forget,
	})
}
