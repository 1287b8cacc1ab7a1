package testvm

import "encoding/binary"

// Bits of page table entries (Intel SDM, volume 3, 4.5). Accessed and dirty are
// preset, so that the processor never writes to the tables and their bytes can
// be predicted.
const (
	ptePresent  = 1 << 0
	pteWrite    = 1 << 1
	pteUser     = 1 << 2
	pteWT       = 1 << 3
	pteUncached = 1 << 4
	pteAccessed = 1 << 5
	pteDirty    = 1 << 6
	pteLarge    = 1 << 7

	largePage = 2 << 20
	gib       = 1 << 30
)

const (
	minMemory = 4 << 20
	maxMemory = 511 * gib
	gdtSize   = selTSS + 16
)

// identityTables maps guest physical addresses up to end, the hole included (it
// is where MMIO is), to themselves by pages of 2 MiB. The PML4 comes first, at
// tablesAddr, then the one PDPT, then a page directory per GiB.
func identityTables(end uint64, user bool) []byte {
	flags := uint64(ptePresent | pteWrite | pteAccessed)
	if user {
		flags |= pteUser
	}
	dirs := max(4, (end+gib-1)/gib)
	t := make([]byte, (2+dirs)*pageSize)
	binary.LittleEndian.PutUint64(t, tablesAddr+pageSize|flags)
	for d := range dirs {
		binary.LittleEndian.PutUint64(t[pageSize+d*8:], tablesAddr+(2+d)*pageSize|flags)
		for i := range uint64(512) {
			addr := d*gib + i*largePage
			entry := addr | flags | pteDirty | pteLarge
			if addr >= holeStart && addr < holeEnd {
				entry |= pteWT | pteUncached
			}
			binary.LittleEndian.PutUint64(t[(2+d)*pageSize+i*8:], entry)
		}
	}
	return t
}

// gdt makes a global descriptor table with kernel and user segments for 64-bit
// mode, accessed bits preset, and vCPU 0's TSS (each vCPU's TR is preset).
func gdt() []byte {
	t := make([]byte, gdtSize)
	for sel, desc := range map[int]uint64{
		selKernelCode:    0x00af9b000000ffff,
		selKernelData:    0x00cf93000000ffff,
		selUserData &^ 3: 0x00cff3000000ffff,
		selUserCode &^ 3: 0x00affb000000ffff,
		selTSS:           0x00008b0000000000 | tssAddr<<16 | uint64(tssLimit(0)&0xffff),
	} {
		binary.LittleEndian.PutUint64(t[sel:], desc)
	}
	return t
}

// idt makes 256 interrupt gates to CPL 0; vector n is served at stubs + 16*n.
func idt(stubs uint64) []byte {
	t := make([]byte, 256*16)
	for n := range uint64(256) {
		addr := stubs + n*16
		low := addr&0xffff | selKernelCode<<16 | 0x8e<<40 | addr>>16&0xffff<<48
		binary.LittleEndian.PutUint64(t[n*16:], low)
		binary.LittleEndian.PutUint64(t[n*16+8:], addr>>32)
	}
	return t
}

// taskStates makes a TSS for each vCPU, with a stack for CPL 0, and behind them
// one I/O permission bitmap for all, which allows every port: KVM's emulator
// (string I/O) does not always see the IOPL of a guest at CPL 3.
func taskStates(vcpus int) []byte {
	t := make([]byte, ioMapAddr-tssAddr+ioMapSize)
	for v := range vcpus {
		tss := t[v*tssSize:]
		binary.LittleEndian.PutUint64(tss[4:], stackTop(v)) // RSP0
		binary.LittleEndian.PutUint16(tss[102:], uint16(ioMapAddr-tssOf(v)))
	}
	t[len(t)-1] = 0xff // the processor reads two bytes at a time
	return t
}

func tssOf(vcpu int) uint64 { return tssAddr + uint64(vcpu)*tssSize }

// tssLimit is the limit of TR: a TSS ends with the bitmap.
func tssLimit(vcpu int) uint32 { return uint32(ioMapAddr + ioMapSize - 1 - tssOf(vcpu)) }

func stackTop(vcpu int) uint64 { return stackAddr + uint64(vcpu+1)*stackSize }

func blockOf(vcpu int) uint64 { return blockAddr + uint64(vcpu)*pageSize }

// endOfRAM is the first address above the last byte of RAM of the given size.
func endOfRAM(memory uint64) uint64 {
	if memory > holeStart {
		return memory + holeEnd - holeStart
	}
	return memory
}
