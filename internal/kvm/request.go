//go:build linux && amd64

package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// The parts of an ioctl request number (include/uapi/asm-generic/ioctl.h).
const (
	kvmio = gokvm.KVMIO << 8
	iow   = 1<<30 | kvmio
	ior   = 2<<30 | kvmio
	iowr  = iow | ior

	sizeShift = 16

	// The requests with a list are numbered with the size of its header.
	listHdr    = 8 << sizeShift
	msrListHdr = 4 << sizeShift
)

// Request numbers. gokvm keeps its own unexported.
const (
	reqGetAPIVersion     = kvmio
	reqCreateVM          = kvmio | 0x01
	reqGetMSRIndexList   = iowr | msrListHdr | 0x02
	reqCheckExtension    = kvmio | 0x03
	reqGetVCPUMmapSize   = kvmio | 0x04
	reqGetSupportedCPUID = iowr | listHdr | 0x05

	reqCreateVCPU          = kvmio | 0x41
	reqGetDirtyLog         = iow | unsafe.Sizeof(dirtyLog{})<<sizeShift | 0x42
	reqSetUserMemoryRegion = iow | unsafe.Sizeof(gokvm.UserspaceMemoryRegion{})<<sizeShift | 0x46
	reqSetTSSAddr          = kvmio | 0x47
	reqSetIdentityMapAddr  = iow | unsafe.Sizeof(uint64(0))<<sizeShift | 0x48
	reqCreateIRQChip       = kvmio | 0x60
	reqIRQLine             = iow | unsafe.Sizeof(irqLevel{})<<sizeShift | 0x61
	reqGetIRQChip          = iowr | unsafe.Sizeof(IRQChipState{})<<sizeShift | 0x62
	// The kernel declares SET_IRQCHIP as a read: a slip that became ABI.
	reqSetIRQChip    = ior | unsafe.Sizeof(IRQChipState{})<<sizeShift | 0x63
	reqSetGSIRouting = iow | listHdr | 0x6a
	reqIRQFD         = iow | unsafe.Sizeof(irqfd{})<<sizeShift | 0x76
	reqCreatePIT2    = iow | unsafe.Sizeof(pitConfig{})<<sizeShift | 0x77
	reqSetBootCPUID  = kvmio | 0x78
	reqIOEventFD     = iow | unsafe.Sizeof(ioeventfd{})<<sizeShift | 0x79
	reqSetClock      = iow | unsafe.Sizeof(ClockData{})<<sizeShift | 0x7b
	reqGetClock      = ior | unsafe.Sizeof(ClockData{})<<sizeShift | 0x7c
	reqGetPIT2       = ior | unsafe.Sizeof(PITState{})<<sizeShift | 0x9f
	reqSetPIT2       = iow | unsafe.Sizeof(PITState{})<<sizeShift | 0xa0
	reqEnableCap     = iow | unsafe.Sizeof(enableCap{})<<sizeShift | 0xa3
	reqSignalMSI     = iow | unsafe.Sizeof(msi{})<<sizeShift | 0xa5
	reqClearDirtyLog = iowr | unsafe.Sizeof(clearDirtyLog{})<<sizeShift | 0xc0

	reqRun            = kvmio | 0x80
	reqGetRegs        = ior | unsafe.Sizeof(Regs{})<<sizeShift | 0x81
	reqSetRegs        = iow | unsafe.Sizeof(Regs{})<<sizeShift | 0x82
	reqGetSregs       = ior | unsafe.Sizeof(Sregs{})<<sizeShift | 0x83
	reqSetSregs       = iow | unsafe.Sizeof(Sregs{})<<sizeShift | 0x84
	reqGetMSRs        = iowr | listHdr | 0x88
	reqSetMSRs        = iow | listHdr | 0x89
	reqGetLAPIC       = ior | unsafe.Sizeof(LAPICState{})<<sizeShift | 0x8e
	reqSetLAPIC       = iow | unsafe.Sizeof(LAPICState{})<<sizeShift | 0x8f
	reqSetCPUID2      = iow | listHdr | 0x90
	reqGetCPUID2      = iowr | listHdr | 0x91
	reqGetMPState     = ior | unsafe.Sizeof(mpState{})<<sizeShift | 0x98
	reqSetMPState     = iow | unsafe.Sizeof(mpState{})<<sizeShift | 0x99
	reqGetVCPUEvents  = ior | unsafe.Sizeof(VCPUEvents{})<<sizeShift | 0x9f
	reqSetVCPUEvents  = iow | unsafe.Sizeof(VCPUEvents{})<<sizeShift | 0xa0
	reqGetDebugRegs   = ior | unsafe.Sizeof(DebugRegs{})<<sizeShift | 0xa1
	reqSetDebugRegs   = iow | unsafe.Sizeof(DebugRegs{})<<sizeShift | 0xa2
	reqSetTSCKHz      = kvmio | 0xa2
	reqGetTSCKHz      = kvmio | 0xa3
	reqGetXSave       = ior | xsaveSize<<sizeShift | 0xa4
	reqSetXSave       = iow | xsaveSize<<sizeShift | 0xa5
	reqGetXCRS        = ior | unsafe.Sizeof(XCRS{})<<sizeShift | 0xa6
	reqSetXCRS        = iow | unsafe.Sizeof(XCRS{})<<sizeShift | 0xa7
	reqKVMClockCtrl   = kvmio | 0xad
	reqGetNestedState = iowr | nestedHdrSize<<sizeShift | 0xbe
	reqSetNestedState = iow | nestedHdrSize<<sizeShift | 0xbf
	reqGetSregs2      = ior | unsafe.Sizeof(Sregs2{})<<sizeShift | 0xcc
	reqSetSregs2      = iow | unsafe.Sizeof(Sregs2{})<<sizeShift | 0xcd
	reqGetXSave2      = ior | xsaveSize<<sizeShift | 0xcf
)

// Requests are the numbers of all requests that this package makes, for a filter of system calls. The first is by far
// the most frequent. Some numbers mean different things for different descriptors, and are there twice.
func Requests() []uintptr {
	return []uintptr{
		reqRun, reqGetAPIVersion, reqCreateVM, reqGetMSRIndexList, reqCheckExtension, reqGetVCPUMmapSize,
		reqGetSupportedCPUID, reqCreateVCPU, reqGetDirtyLog, reqSetUserMemoryRegion, reqSetTSSAddr,
		reqSetIdentityMapAddr, reqCreateIRQChip, reqIRQLine, reqGetIRQChip, reqSetIRQChip, reqSetGSIRouting,
		reqIRQFD, reqCreatePIT2, reqSetBootCPUID, reqIOEventFD, reqSetClock, reqGetClock, reqGetPIT2, reqSetPIT2,
		reqEnableCap, reqSignalMSI, reqClearDirtyLog, reqGetRegs, reqSetRegs, reqGetSregs, reqSetSregs, reqGetMSRs,
		reqSetMSRs, reqGetLAPIC, reqSetLAPIC, reqSetCPUID2, reqGetCPUID2, reqGetMPState, reqSetMPState,
		reqGetVCPUEvents, reqSetVCPUEvents, reqGetDebugRegs, reqSetDebugRegs, reqSetTSCKHz, reqGetTSCKHz,
		reqGetXSave, reqSetXSave, reqGetXCRS, reqSetXCRS, reqKVMClockCtrl, reqGetNestedState, reqSetNestedState,
		reqGetSregs2, reqSetSregs2, reqGetXSave2,
	}
}
