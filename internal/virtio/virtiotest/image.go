package virtiotest

import "encoding/binary"

// An image is what a fuzzer makes guest memory of: patches of zeroed RAM, each of them an address (2 bytes,
// little-endian), a number of bytes (1), and the bytes. It is some hundred bytes long where the memory has
// 64 KiB, so that a mutation mostly hits a ring, a descriptor or a request, and so that the fuzzer, which tries to leave
// out each part of an input that is new to it, gets done with that.
const (
	imageRAM  = 1 << 16 // what the address of a patch can reach
	patchHead = 3
	patchMax  = 0xff
	// patchGap is how many zeros part two patches: fewer are cheaper within one.
	patchGap = patchHead + 1
)

// loadImage makes ram, which is zero and has imageRAM bytes, what image says. Every image means something: a patch ends
// with the image or with the RAM.
func loadImage(ram, image []byte) {
	for len(image) >= patchHead {
		at, n := binary.LittleEndian.Uint16(image), int(image[2])
		image = image[patchHead:]
		n = min(n, len(image))
		copy(ram[at:], image[:n])
		image = image[n:]
	}
}

// makeImage is the opposite of loadImage.
func makeImage(ram []byte) []byte {
	var image []byte
	for at := 0; at < len(ram); {
		n := patchLen(ram[at:])
		if n > 0 {
			image = binary.LittleEndian.AppendUint16(image, uint16(at))
			image = append(image, byte(n))
			image = append(image, ram[at:at+n]...)
		}
		at += max(n, 1)
	}
	return image
}

// patchLen is the length of the patch that ram begins with: none if its first byte is zero, else all up to a gap.
func patchLen(ram []byte) int {
	n := 0
	for i, b := range ram[:min(patchMax, len(ram))] {
		if b != 0 && i-n < patchGap && (n > 0 || i == 0) {
			n = i + 1
		}
	}
	return n
}
