//go:build linux && amd64

package kvm

import (
	"math"
	"strconv"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// Cap is a capability number for KVM_CHECK_EXTENSION (KVM_CAP_*). gokvm's own
// type has eight bits, and the kernel's numbers will outgrow them.
type Cap uint32

// Capabilities that the machine uses, or whose absence it has to know.
const (
	CapIRQChip              = Cap(gokvm.CapIRQChip)
	CapUserMemory           = Cap(gokvm.CapUserMemory)
	CapSetTSSAddr           = Cap(gokvm.CapSetTSSAddr)
	CapExtCPUID             = Cap(gokvm.CapEXTCPUID)
	CapNrVCPUs              = Cap(gokvm.CapNRVCPUS)    // recommended number of vCPUs of a VM
	CapNrMemSlots           = Cap(gokvm.CapNRMemSlots) // number of memory slots of a VM
	CapMPState              = Cap(gokvm.CapMPState)    //
	CapIRQRouting           = Cap(gokvm.CapIRQRouting) // number of GSI routes of a VM
	CapIRQFD                = Cap(gokvm.CapIRQFD)      //
	CapPIT2                 = Cap(gokvm.CapPIT2)       //
	CapSetBootCPUID         = Cap(gokvm.CapSetBootCPUID)
	CapPITState2            = Cap(gokvm.CapPITState2)
	CapIOEventFD            = Cap(gokvm.CapIOEventFD)
	CapSetIdentityMapAddr   = Cap(gokvm.CapSetIdentityMapAddr)
	CapAdjustClock          = Cap(gokvm.CapAdjustClock) // flags of ClockData that KVM knows
	CapInternalErrorData    = Cap(gokvm.CapInternalErrorData)
	CapVCPUEvents           = Cap(gokvm.CapVCPUEvents)
	CapDebugRegs            = Cap(gokvm.CapDebugRegs)
	CapEnableCap            = Cap(gokvm.CapEnableCap)
	CapXSave                = Cap(gokvm.CapXSave)
	CapXCRS                 = Cap(gokvm.CapXCRS)
	CapTSCControl           = Cap(gokvm.CapTSCControl)
	CapGetTSCKHz            = Cap(gokvm.CapGetTSCkHz)
	CapMaxVCPUs             = Cap(gokvm.CapMAXVCPUS) // highest number of vCPUs of a VM
	CapTSCDeadlineTimer     = Cap(gokvm.CapTSCDeadlineTimer)
	CapSyncRegs             = Cap(gokvm.CapSyncRegs)
	CapKVMClockCtrl         = Cap(gokvm.CapKVMClockCtrl)
	CapSignalMSI            = Cap(gokvm.CapSignalMSI)
	CapReadonlyMem          = Cap(gokvm.CapReadOnlyMEM)
	CapEnableCapVM          = Cap(gokvm.CapEnableCAPVM)
	CapX2APICAPI            = Cap(gokvm.CapX2APICAPI)
	CapImmediateExit        = Cap(gokvm.CapImmediateExit)
	CapNestedState          = Cap(gokvm.CapNestedState) // size of the nested state in bytes
	CapManualDirtyProtect2  = Cap(gokvm.CapManualDirtyLogProtect2)
	CapSregs2               = Cap(gokvm.CapSREGS2)
	CapExitOnEmulationError = Cap(gokvm.CapExitOnEmulationFailure)
	CapXSave2               = Cap(gokvm.CapXSave2) // size of the XSAVE area in bytes
	CapMemoryFaultInfo      = Cap(232)             // newer than gokvm's list
)

// String returns gokvm's name of the capability, or its number.
func (c Cap) String() string {
	if c == CapMemoryFaultInfo {
		return "CapMemoryFaultInfo"
	}
	if c > math.MaxUint8 {
		return "Cap(" + strconv.Itoa(int(c)) + ")"
	}
	return gokvm.Capability(c).String()
}
