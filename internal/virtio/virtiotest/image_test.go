package virtiotest

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func TestImage(t *testing.T) {
	for name, c := range map[string]struct {
		patches map[int][]byte
		image   []byte
	}{
		"nothing":         {nil, nil},
		"one byte":        {map[int][]byte{0x1234: {7}}, []byte{0x34, 0x12, 1, 7}},
		"the last":        {map[int][]byte{imageRAM - 1: {7}}, []byte{0xff, 0xff, 1, 7}},
		"zeros within":    {map[int][]byte{0: {1, 0, 0, 0, 2}}, []byte{0, 0, 5, 1, 0, 0, 0, 2}},
		"two with a gap":  {map[int][]byte{0: {1, 0, 0, 0, 0, 2}}, []byte{0, 0, 1, 1, 5, 0, 1, 2}},
		"longer than one": {map[int][]byte{0: bytes.Repeat([]byte{1}, 256)}, append(append([]byte{0, 0, 255}, bytes.Repeat([]byte{1}, 255)...), 255, 0, 1, 1)},
	} {
		ram := make([]byte, imageRAM)
		for at, b := range c.patches {
			copy(ram[at:], b)
		}
		if image := makeImage(ram); !bytes.Equal(image, c.image) {
			t.Errorf("%s: image %x, want %x", name, image, c.image)
		}
		again := make([]byte, imageRAM)
		if loadImage(again, c.image); !bytes.Equal(again, ram) {
			t.Errorf("%s: the image is loaded as something else", name)
		}
	}
}

// FuzzImage checks that every image can be loaded, and that what it means can be made an image.
func FuzzImage(f *testing.F) {
	f.Add([]byte{0, 1, 3, 1, 0, 2})
	f.Add(binary.LittleEndian.AppendUint32(nil, 0xff_ffff))
	f.Fuzz(func(t *testing.T, image []byte) {
		ram, again := make([]byte, imageRAM), make([]byte, imageRAM)
		loadImage(ram, image)
		if loadImage(again, makeImage(ram)); !bytes.Equal(again, ram) {
			t.Fatalf("%x is loaded as one memory, and made an image of another", image)
		}
	})
}
