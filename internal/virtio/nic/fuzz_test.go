package nic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

// fuzzDevice returns a device with frames to deliver.
func fuzzDevice(tb testing.TB) func() virtio.Device {
	return func() virtio.Device { return newFakeTap(testFrame(1, 60), testFrame(2, 1000)).open(tb, 0) }
}

func FuzzRings(f *testing.F) {
	for _, features := range []virtio.Feature{offered, offered | virtio.FeatureIndirect | virtio.FeatureEventIdx} {
		f.Add(uint64(features), virtiotest.RingImage(f, fuzzDevice(f), features,
			virtiotest.Request{Queue: rxQueue, In: 1534},
			virtiotest.Request{Queue: rxQueue, In: 100},
			virtiotest.Request{Queue: txQueue, Out: testFrame(1, 60)},
			virtiotest.Request{Queue: txQueue, Out: header(0, flagNeedsChecksum)},
			virtiotest.Request{Queue: ctrlQueue, Out: []byte{classAnnounce, commandAnnounce}, In: 1},
			virtiotest.Request{Queue: ctrlQueue, Out: []byte{0, 0, 1}, In: 1}))
	}
	f.Fuzz(func(t *testing.T, features uint64, image []byte) {
		virtiotest.FuzzRings(t, fuzzDevice(t), virtio.Feature(features), image)
	})
}

func FuzzRegisters(f *testing.F) {
	reg := func(which byte, v uint32) []byte { return binary.LittleEndian.AppendUint32([]byte{which}, v) }
	f.Add([]byte(nil), bytes.Join([][]byte{
		reg(8, 1), reg(8, 3), reg(1, uint32(offered)), reg(2, 1), reg(1, 1), reg(8, 11), // to FEATURES_OK
		reg(3, 1), reg(4, 16), reg(9, 0x1000), reg(11, 0x2000), reg(13, 0x3000), reg(5, 1), // a queue
		reg(8, 15), reg(6, 0), reg(5, 0), reg(5, 1), reg(0x80, 0x106), reg(8, 0),
	}, nil))
	f.Fuzz(func(t *testing.T, image, ops []byte) {
		virtiotest.FuzzRegisters(t, fuzzDevice(t), image, ops)
	})
}

func FuzzRestore(f *testing.F) {
	saved, err := newFakeTap().open(f, 0).Save()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(saved)
	f.Add([]byte{stateVersion + 1, 2, 0, 0, 0, 0, 7, 0xdc, 5})
	f.Add([]byte{stateVersion, 3, 0, 0, 0, 0, 7, 0xdc, 5})
	f.Add([]byte{stateVersion, 2, 0, 0, 0, 0, 7, 67, 0})
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, state []byte) {
		d := newFakeTap().open(t, 0)
		if err := d.Restore(state); err != nil {
			if !errors.Is(err, virtio.ErrState) {
				t.Fatalf("untyped error: %v", err)
			}
			return
		}
		if again, err := d.Save(); err != nil || !bytes.Equal(again, state) {
			t.Fatalf("%x is restored, and saved as %x, %v", state, again, err)
		}
	})
}

func TestHostileVCPUs(t *testing.T) {
	virtiotest.Hostile(t, fuzzDevice(t), offered|virtio.FeatureIndirect|virtio.FeatureEventIdx,
		virtiotest.Request{Queue: rxQueue, In: 1534},
		virtiotest.Request{Queue: txQueue, Out: testFrame(1, 60)},
		virtiotest.Request{Queue: ctrlQueue, Out: []byte{classAnnounce, commandAnnounce}, In: 1})
}
