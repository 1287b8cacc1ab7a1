// Package boot puts a kernel into guest memory and says with which registers its first vCPU starts.
//
// It loads Linux by the 64-bit boot protocol (Documentation/arch/x86/boot.rst of Linux), as a bzImage or as an ELF
// vmlinux, and flat images that start in long mode. Every byte of its input is untrusted; it knows nothing of KVM.
package boot

import (
	"errors"
	"fmt"
	"io"
)

// Image is a file to load: Size bytes that ReaderAt gives.
type Image struct {
	io.ReaderAt
	Size int64
}

// Config is what Load needs.
type Config struct {
	Kernel Image
	Initrd Image // an absent one has Size 0
	// Cmdline is the kernel's command line, without NUL bytes.
	Cmdline string
	// MemSize is the guest's memory in bytes: RAM is [0, min(MemSize, 3 GiB)), and what is left lies from 4 GiB on.
	MemSize uint64
	// RSDP is the address of the ACPI root pointer, or 0. The caller writes the tables, in [ACPIBase, ACPIEnd).
	RSDP uint64
	// Reset, if not nil, makes the reset vector work. Linux jumps there to reboot when its ACPI is hardware-reduced and
	// there is no EFI, whatever ACPI's reset register says (reboot_init in arch/x86/kernel/reboot.c).
	Reset *Reset
}

// Reset is the I/O port that resets the machine, and the byte to write there.
type Reset struct {
	Port  uint16
	Value byte
}

// Loaded describes a loaded guest.
type Loaded struct {
	CPU    CPU   // registers of vCPU 0; the others start by INIT and SIPI
	Kernel Range // what the kernel needs, its bss and scratch space included
	Initrd Range // zero without one
}

// Load puts the kernel, the initrd, the command line, boot_params, page tables and a GDT into w, which
// is guest memory addressed by guest physical address, all zero before. It writes only inside the RAM that cfg.MemSize
// gives, and below 1 MiB only what LowUsed says. Errors: ErrNotKernel, ErrMalformed, ErrTruncated,
// ErrCmdline, *UnsupportedKernelError, *TooLargeError, *OverlapError, *MemoryError for a w that fails, and
// what the readers return. After an error, guest memory is in an undefined state.
func Load(w io.WriterAt, cfg Config) (*Loaded, error) {
	k, err := parseKernel(cfg.Kernel)
	if err != nil {
		return nil, err
	}
	l := &loader{w: w, cfg: cfg, kernel: k}
	if err := l.place(); err != nil {
		return nil, err
	}
	for _, write := range []func() error{l.writeKernel, l.writeInitrd, l.writeCmdline, l.writeParams, l.writeReset} {
		if err := write(); err != nil {
			return nil, err
		}
	}
	cpu, err := writeLongMode(w, bootGiB)
	if err != nil {
		return nil, err
	}
	cpu.RIP, cpu.RSI, cpu.RSP = k.entry, paramsBase, stackTop
	return &Loaded{CPU: cpu, Kernel: k.span, Initrd: l.initrd}, nil
}

// kernel is a parsed kernel, of either kind.
type kernel struct {
	span      Range     // all that it needs of guest memory while it starts
	segments  []segment // what to copy from the file
	entry     uint64    // 64-bit entry point
	header    []byte    // setup header, from offset 0x1f1 of boot_params on
	initrdMax uint64    // highest address that a byte of the initrd may have
	cmdlineN  uint64    // longest command line in bytes, without its NUL
}

// segment is n bytes at offset off of the file, for address gpa.
type segment struct {
	off int64
	gpa uint64
	n   uint64
}

func parseKernel(img Image) (*kernel, error) {
	if img.ReaderAt == nil || img.Size <= 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrNotKernel)
	}
	// The first sector and the start of the setup header, or an ELF header: both kinds are longer than this.
	head := make([]byte, min(img.Size, headerEnd))
	if err := readFull(img, head, 0, "kernel header"); err != nil {
		return nil, err
	}
	switch {
	case isELF(head):
		return parseELF(img, head)
	case isBzImage(head):
		return parseBzImage(img, head)
	}
	return nil, fmt.Errorf("%w: neither a bzImage nor an ELF file", ErrNotKernel)
}

// loader carries one Load.
type loader struct {
	w      io.WriterAt
	cfg    Config
	kernel *kernel
	initrd Range
}

// place checks that everything fits, and finds room for the initrd: as high as it may be.
func (l *loader) place() error {
	if l.cfg.MemSize > maxMemory {
		return &TooLargeError{What: "guest memory", Need: l.cfg.MemSize, Have: maxMemory}
	}
	ram := lowRAM(l.cfg.MemSize)
	if err := checkSpan("kernel", l.kernel.span, ram); err != nil {
		return err
	}
	if n := uint64(len(l.cfg.Cmdline)); n > min(l.kernel.cmdlineN, cmdlineRoom-1) {
		return &TooLargeError{What: "command line", Need: n, Have: min(l.kernel.cmdlineN, cmdlineRoom-1)}
	}
	for i := range len(l.cfg.Cmdline) {
		if l.cfg.Cmdline[i] == 0 {
			return fmt.Errorf("%w: a NUL byte at %d", ErrCmdline, i)
		}
	}
	if r := l.cfg.RSDP; r != 0 && (r < ACPIBase || r >= ACPIEnd) {
		return fmt.Errorf("%w: RSDP at %#x, outside [%#x, %#x), which the kernel is told to leave alone",
			ErrMalformed, r, ACPIBase, ACPIEnd)
	}
	return l.placeInitrd(ram)
}

func (l *loader) placeInitrd(ram Range) error {
	if l.cfg.Initrd.Size == 0 {
		return nil
	}
	if l.cfg.Initrd.ReaderAt == nil || l.cfg.Initrd.Size < 0 {
		return fmt.Errorf("%w: initrd of %d bytes without a reader", ErrMalformed, l.cfg.Initrd.Size)
	}
	size := uint64(l.cfg.Initrd.Size)
	top := min(ram.End(), l.kernel.initrdMax+1)
	room := Range{GPA: l.kernel.span.End(), Len: top - min(l.kernel.span.End(), top)}
	if size > room.Len {
		return &TooLargeError{What: "initrd", Need: size, Have: room.Len}
	}
	l.initrd = Range{GPA: (top - size) &^ (pageSize - 1), Len: size}
	if l.initrd.overlaps(l.kernel.span) {
		return &OverlapError{A: "initrd", B: "kernel", ARange: l.initrd, BRange: l.kernel.span}
	}
	return nil
}

func (l *loader) writeKernel() error {
	for _, s := range l.kernel.segments {
		if err := copyIn(l.w, s.gpa, l.cfg.Kernel, s.off, s.n, "kernel"); err != nil {
			return err
		}
	}
	return nil
}

func (l *loader) writeInitrd() error {
	return copyIn(l.w, l.initrd.GPA, l.cfg.Initrd, 0, l.initrd.Len, "initrd")
}

func (l *loader) writeCmdline() error {
	return writeAt(l.w, append([]byte(l.cfg.Cmdline), 0), cmdlineBase, "command line")
}

// writeReset puts real-mode code at the reset vector that writes the reset port, and halts should that not end it.
func (l *loader) writeReset() error {
	r := l.cfg.Reset
	if r == nil {
		return nil
	}
	return writeAt(l.w, []byte{
		0xba, byte(r.Port), byte(r.Port >> 8), // mov $port, %dx
		0xb0, r.Value, // mov $value, %al
		0xee,       // out %al, %dx
		0xf4,       // hlt
		0xeb, 0xfd, // jmp to the hlt
	}, resetVector, "reset vector")
}

// copyIn copies n bytes of img from off on to gpa, through a buffer of bounded size.
func copyIn(w io.WriterAt, gpa uint64, img Image, off int64, n uint64, what string) error {
	buf := make([]byte, min(n, 1<<20))
	for n > 0 {
		p := buf[:min(n, uint64(len(buf)))]
		if err := readFull(img, p, off, what); err != nil {
			return err
		}
		if err := writeAt(w, p, gpa, what); err != nil {
			return err
		}
		off, gpa, n = off+int64(len(p)), gpa+uint64(len(p)), n-uint64(len(p))
	}
	return nil
}

// readFull reads len(p) bytes at off. A file shorter than it claims is ErrTruncated.
func readFull(img Image, p []byte, off int64, what string) error {
	n, err := img.ReadAt(p, off)
	switch {
	case n == len(p): // io.EOF may come with the last byte
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("%w: %s: %d of %d bytes at offset %d", ErrTruncated, what, n, len(p), off)
	}
	return fmt.Errorf("boot: read %s at offset %d: %w", what, off, err)
}

func writeAt(w io.WriterAt, p []byte, gpa uint64, what string) error {
	n, err := w.WriteAt(p, int64(gpa))
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return &MemoryError{What: what, GPA: gpa, Err: err}
	}
	return nil
}
