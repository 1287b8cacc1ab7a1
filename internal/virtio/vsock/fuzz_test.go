package vsock

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

// fresh returns devices at a path of their own, for the fuzzers.
func fresh(t testing.TB) func() virtio.Device {
	path := testPath(t)
	return func() virtio.Device {
		d, err := newDevice(Config{CID: testCID, Path: path}, small())
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
}

func packet(op uint16, port uint32, payload string) []byte {
	h := header{
		srcCID: testCID, dstCID: hostCID, srcPort: port, dstPort: 1, typ: typeStream, op: op,
		len: uint32(len(payload)), bufAlloc: 4096,
	}
	return append(h.append(nil), payload...)
}

func FuzzRings(f *testing.F) {
	for _, features := range []virtio.Feature{0, virtio.FeatureIndirect | virtio.FeatureEventIdx} {
		f.Add(uint64(features), virtiotest.RingImage(f, fresh(f), features,
			virtiotest.Request{Queue: queueTX, Out: packet(opRequest, 1, "")},
			virtiotest.Request{Queue: queueTX, Out: packet(opRW, 2, "bytes")},
			virtiotest.Request{Queue: queueRX, In: 200},
			virtiotest.Request{Queue: queueRX, In: 5000},
			virtiotest.Request{Queue: queueEvent, In: 4}))
	}
	f.Fuzz(func(t *testing.T, features uint64, image []byte) {
		virtiotest.FuzzRings(t, fresh(t), virtio.Feature(features), image)
	})
}

func FuzzRegisters(f *testing.F) {
	reg := func(which byte, v uint32) []byte { return binary.LittleEndian.AppendUint32([]byte{which}, v) }
	f.Add([]byte(nil), bytes.Join([][]byte{
		reg(8, 1), reg(8, 3), reg(2, 1), reg(1, 1), reg(8, 11), // to FEATURES_OK
		reg(3, 0), reg(4, 16), reg(9, 0x1000), reg(11, 0x2000), reg(13, 0x3000), reg(5, 1), // a queue
		reg(3, 1), reg(4, 16), reg(9, 0x4000), reg(11, 0x5000), reg(13, 0x6000), reg(5, 1), // another
		reg(8, 15), reg(6, 0), reg(5, 0), reg(5, 1), reg(0x80, 0x101), reg(8, 0),
	}, nil))
	f.Fuzz(func(t *testing.T, image, ops []byte) {
		virtiotest.FuzzRegisters(t, fresh(t), image, ops)
	})
}

// FuzzPackets sends packets that are well placed in their ring. They must not fail the device, nor bring it to send
// what is no packet (which the peer checks); and it must still make a connection afterwards.
func FuzzPackets(f *testing.F) {
	f.Add(bytes.Join([][]byte{
		packet(opRequest, 1, ""), packet(opRW, 1, strings.Repeat("x", headerSize)), packet(opCreditRequest, 1, ""),
		packet(opShutdown, 1, ""), packet(opReset, 1, ""),
	}, nil))
	f.Add(packet(opRW, 1, "short"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := newPeer(t, small())
		l := listenOn(t, p, 1)
		for ; len(b) >= headerSize; b = b[headerSize:] {
			h := decodeHeader((*[headerSize]byte)(b))
			if again := h.append(nil); !bytes.Equal(again, b[:headerSize]) {
				t.Fatalf("%x is decoded and encoded as %x", b[:headerSize], again)
			}
			n := min(int(h.len), len(b)-headerSize, 8<<10)
			p.transmit(h, b[headerSize:headerSize+n])
			p.settle()
		}
		c := p.connect(key{0x12345678, 1})
		p.until("a connection", func() bool { return c.open || c.closed })
		if err := p.d.Transport.Err(); err != nil || !c.open {
			t.Fatalf("after all, a connection is open: %v, error %v", c.open, err)
		}
		l.Close()
	})
}

func FuzzConnectLine(f *testing.F) {
	for _, s := range []string{
		"CONNECT 52\n", "CONNECT 4294967294\nbytes", "CONNECT 4294967295\n", "connect 1\n", "CONNECT  1\n", "CONNECT 1", "",
		"CONNECT +1\n", "CONNECT 0x1\n", "CONNECT 1_0\n", "CONNECT 00000000000000000001\n", "CONNECT 0000000001\n",
	} {
		f.Add([]byte(s))
	}
	valid := regexp.MustCompile(`^CONNECT [0-9]{1,10}\n`)
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		port, err := readConnect(r)
		if taken := len(b) - r.Len(); taken > maxConnectLine+1 {
			t.Fatalf("%d bytes were read", taken)
		}
		if err != nil {
			if !errors.Is(err, ErrConnectLine) {
				t.Fatalf("untyped error: %v", err)
			}
			return
		}
		line := valid.Find(b)
		var want uint32
		if _, scanErr := fmt.Sscanf(string(line), "CONNECT %d\n", &want); scanErr != nil || port != want || port == anyPort {
			t.Fatalf("%q gives port %d, want %d, %v", b, port, want, scanErr)
		}
		if r.Len() != len(b)-len(line) {
			t.Fatalf("%q: %d bytes are left", b, r.Len())
		}
	})
}

func FuzzState(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 0x40})
	f.Add(append([]byte{1, 9, 0, 0, 0x40}, packet(opReset, 1, "")...))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := fresh(t)().(*Device)
		defer d.Close()
		if err := d.Restore(b); err != nil {
			if !errors.Is(err, virtio.ErrState) {
				t.Fatalf("untyped error: %v", err)
			}
			return
		}
		if again, err := d.Save(); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x is restored, and saved as %x, %v", b, again, err)
		}
	})
}

// TestHostileVCPUs: with a host program at one port that sends back what it gets, so that there are connections.
func TestHostileVCPUs(t *testing.T) {
	path := testPath(t)
	l, err := net.Listen("unix", path+"_1")
	if err != nil {
		t.Fatal(err)
	}
	var programs sync.WaitGroup
	programs.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			programs.Go(func() {
				defer c.Close()
				_, _ = io.Copy(c, c) // until the guest, or the device, has had enough
			})
		}
	})
	defer programs.Wait()
	defer l.Close()
	fresh := func() virtio.Device {
		d, err := newDevice(Config{CID: testCID, Path: path}, small())
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	var reqs []virtiotest.Request
	for port := range uint32(3) {
		for _, op := range []uint16{opRequest, opRW, opRW, opCreditRequest, opShutdown, opReset} {
			reqs = append(reqs, virtiotest.Request{Queue: queueTX, Out: packet(op, port, "bytes")})
		}
		reqs = append(reqs, virtiotest.Request{Queue: queueRX, In: 200}, virtiotest.Request{Queue: queueRX, In: 200})
	}
	reqs = append(reqs, virtiotest.Request{Queue: queueEvent, In: 4})
	virtiotest.Hostile(t, fresh, virtio.FeatureIndirect|virtio.FeatureEventIdx, reqs...)
}
