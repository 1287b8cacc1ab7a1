package vmm

import (
	"bytes"
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// FuzzVirtioState: any bytes are a virtio device in a state, which is written as the same bytes if it has nothing to skip;
// or they are refused.
func FuzzVirtioState(f *testing.F) {
	transport, err := (&virtio.State{}).MarshalBinary()
	if err != nil {
		f.Fatal(err)
	}
	good := virtioState{slot: 3, transport: transport}
	f.Add(uint32(virtioVersion), encodeParts(good.parts()))
	f.Add(uint32(virtioVersion), encodeParts(good.parts()[:1]))
	f.Add(uint32(virtioVersion+1), []byte{})
	f.Fuzz(func(t *testing.T, version uint32, b []byte) {
		d := DeviceState{Name: "disk/root", Version: version, Data: b}
		places, err := rosterOf([]DeviceState{d})
		if err != nil {
			if !errors.Is(err, ErrState) && !errors.Is(err, ErrStateVersion) {
				t.Fatal(err)
			}
			return
		}
		if len(places) != 1 || places[0].slot >= maxVirtio {
			t.Fatalf("%+v", places)
		}
		s, err := decodeVirtio(d)
		if err != nil {
			t.Fatal(err)
		}
		out := encodeParts(s.parts())
		if len(out) == len(b) && !bytes.Equal(out, b) {
			t.Fatalf("%x became %x", b, out)
		}
		var state virtio.State
		if err := virtioError("x", state.UnmarshalBinary(s.transport)); err != nil {
			if !errors.Is(err, ErrState) && !errors.Is(err, ErrStateVersion) {
				t.Fatal(err)
			}
			return
		}
		if again, err := state.MarshalBinary(); err != nil || !bytes.Equal(again, s.transport) {
			t.Fatalf("transport %x became %x, %v", s.transport, again, err)
		}
	})
}
