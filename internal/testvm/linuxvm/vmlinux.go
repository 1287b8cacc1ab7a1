package linuxvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"
)

// Offsets in a bzImage (Linux, Documentation/arch/x86/boot.rst).
const (
	offSetupSects    = 0x1f1
	offPayloadOffset = 0x248
	offPayloadLength = 0x24c
	sector           = 512
	sizeBytes        = 4 // behind the payload, the size that it unpacks to
)

// ErrCompression is of a kernel that is compressed by other means than LZ4, which Debian uses.
var ErrCompression = errors.New("linuxvm: the kernel is not compressed with LZ4")

// VMLinux is the ELF file in a bzImage.
func VMLinux(bzImage []byte) ([]byte, error) {
	le := binary.LittleEndian
	if len(bzImage) < offPayloadLength+4 {
		return nil, io.ErrUnexpectedEOF
	}
	begin := (int64(bzImage[offSetupSects])+1)*sector + int64(le.Uint32(bzImage[offPayloadOffset:]))
	end := begin + int64(le.Uint32(bzImage[offPayloadLength:]))
	if begin+sizeBytes > end || end > int64(len(bzImage)) {
		return nil, fmt.Errorf("payload at %d to %d of %d bytes: %w", begin, end, len(bzImage), io.ErrUnexpectedEOF)
	}
	payload := bzImage[begin:end]
	if legacy := uint32(0x184c2102); le.Uint32(payload) != legacy {
		return nil, fmt.Errorf("%w: it begins with % x", ErrCompression, payload[:4])
	}
	size := le.Uint32(payload[len(payload)-sizeBytes:])
	elf := make([]byte, size)
	if _, err := io.ReadFull(lz4.NewReader(bytes.NewReader(payload[:len(payload)-sizeBytes])), elf); err != nil {
		return nil, fmt.Errorf("unpack the kernel: %w", err)
	}
	return elf, nil
}
