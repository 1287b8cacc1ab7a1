package boot

import (
	"encoding/binary"
	"fmt"
)

// Offsets of the setup header, in the file and in boot_params alike (boot.rst, "The Real-Mode Kernel Header").
const (
	offSetupSects   = 0x1f1
	offSysSize      = 0x1f4
	offVidMode      = 0x1fa
	offBootFlag     = 0x1fe
	offJump         = 0x200 // its second byte is the length of the header behind 0x202
	offMagic        = 0x202
	offVersion      = 0x206
	offLoaderType   = 0x210
	offLoadFlags    = 0x211
	offCode32Start  = 0x214
	offRamdiskImage = 0x218
	offRamdiskSize  = 0x21c
	offCmdlinePtr   = 0x228
	offInitrdMax    = 0x22c
	offAlignment    = 0x230
	offRelocatable  = 0x234
	offXLoadFlags   = 0x236
	offCmdlineSize  = 0x238
	offSubarch      = 0x23c
	offSubarchData  = 0x240
	offSetupData    = 0x250
	offPrefAddress  = 0x258
	offInitSize     = 0x260
	// headerMin is the end of the header of protocol 2.12, and headerEnd the end of what boot_params has room for.
	headerMin = 0x268
	headerEnd = 0x290
)

const (
	bootFlag       = 0xaa55
	headerMagic    = "HdrS"
	minVersion     = 0x020c // 2.12, the first with xloadflags
	loadedHigh     = 1 << 0 // loadflags: protected-mode code goes to 1 MiB and above
	keepSegments   = 1 << 6 // loadflags: of use to the 32-bit entry only
	canUseHeap     = 1 << 7 // loadflags: of use to the 16-bit entry only
	xlfKernel64    = 1 << 0 // xloadflags: there is a 64-bit entry at +0x200
	entry64        = 0x200
	unknownLoader  = 0xff
	vidModeNormal  = 0xffff
	sector         = 512
	defaultSetup   = 4 // what a setup_sects of 0 means
	maxAlign       = 1 << 30
	paragraphBytes = 16
)

func isBzImage(head []byte) bool {
	return len(head) >= offMagic+4 && binary.LittleEndian.Uint16(head[offBootFlag:]) == bootFlag &&
		string(head[offMagic:offMagic+4]) == headerMagic
}

// parseBzImage reads the setup header in head, the first headerEnd bytes of img (fewer if it has fewer).
func parseBzImage(img Image, head []byte) (*kernel, error) {
	if err := checkHeader(head); err != nil {
		return nil, err
	}
	off, n, err := payload(img, head)
	if err != nil {
		return nil, err
	}
	addr, err := loadAddress(head)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	// init_size counts from the load address; the file's part alone may be longer only in a broken header.
	need := max(uint64(le.Uint32(head[offInitSize:])), n)
	k := &kernel{
		span:      Range{GPA: addr, Len: need},
		segments:  []segment{{off: off, gpa: addr, n: n}},
		entry:     addr + entry64,
		header:    make([]byte, headerEnd-offSetupSects),
		initrdMax: uint64(le.Uint32(head[offInitrdMax:])),
		cmdlineN:  uint64(le.Uint32(head[offCmdlineSize:])),
	}
	end := offMagic + int(head[offJump+1])
	copy(k.header, head[offSetupSects:min(end, len(head))])
	le.PutUint32(k.header[offCode32Start-offSetupSects:], uint32(addr))
	return k, nil
}

// checkHeader checks that the kernel can be entered in 64-bit mode.
func checkHeader(head []byte) error {
	if len(head) < headerMin {
		return fmt.Errorf("%w: %d bytes are no whole setup header", ErrTruncated, len(head))
	}
	le := binary.LittleEndian
	v := le.Uint16(head[offVersion:])
	switch {
	case v < minVersion:
		return &UnsupportedKernelError{What: fmt.Sprintf("boot protocol %d.%d, older than 2.12", v>>8, v&0xff)}
	case offMagic+int(head[offJump+1]) < headerMin:
		return fmt.Errorf("%w: the setup header ends at %#x, which is too short for protocol %d.%d",
			ErrMalformed, offMagic+int(head[offJump+1]), v>>8, v&0xff)
	case le.Uint16(head[offXLoadFlags:])&xlfKernel64 == 0:
		return &UnsupportedKernelError{What: "it has no 64-bit entry point (XLF_KERNEL_64)"}
	case head[offLoadFlags]&loadedHigh == 0:
		return &UnsupportedKernelError{What: "it is a zImage, loaded below 1 MiB"}
	}
	return nil
}

// payload finds the protected-mode code in the file.
func payload(img Image, head []byte) (off int64, n uint64, err error) {
	setup := int64(head[offSetupSects])
	if setup == 0 {
		setup = defaultSetup
	}
	off = (setup + 1) * sector
	if off >= img.Size {
		return 0, 0, fmt.Errorf("%w: %d bytes, and the code starts at %d", ErrTruncated, img.Size, off)
	}
	rest := uint64(img.Size - off)
	n = uint64(binary.LittleEndian.Uint32(head[offSysSize:])) * paragraphBytes
	if n > rest+paragraphBytes-1 { // the last paragraph need not be full
		return 0, 0, fmt.Errorf("%w: %d bytes of code, and the header says %d", ErrTruncated, rest, n)
	}
	if n <= entry64 {
		return 0, 0, fmt.Errorf("%w: %d bytes of code", ErrMalformed, n)
	}
	return off, min(n, rest), nil
}

// loadAddress is the address that the kernel prefers, aligned as it wants if it can be moved at all.
func loadAddress(head []byte) (uint64, error) {
	le := binary.LittleEndian
	addr := le.Uint64(head[offPrefAddress:])
	if addr >= holeStart {
		return 0, &UnsupportedKernelError{What: fmt.Sprintf("it prefers address %#x, beyond the 32-bit hole", addr)}
	}
	if head[offRelocatable] == 0 {
		return addr, nil
	}
	align := uint64(le.Uint32(head[offAlignment:]))
	if align == 0 || align&(align-1) != 0 || align > maxAlign {
		return 0, fmt.Errorf("%w: kernel alignment %#x", ErrMalformed, align)
	}
	return (max(addr, LowEnd) + align - 1) &^ (align - 1), nil
}
