//go:build linux && amd64

package kvm

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

var update = flag.Bool("update", false, "write testdata/layout.txt from the kernel's headers")

// layoutFile holds one line "C expression, value" for everything that this
// package assumes about the kernel's headers.
const layoutFile = "testdata/layout.txt"

// fact is what this package believes about the kernel's headers.
type fact struct {
	expr  string // in C
	value uint64
}

// layouts pairs a Go struct with a C struct and its members, in the order of
// the Go fields. A blank Go field has no member here.
var layouts = []struct {
	goType  any
	cType   string
	members string
}{
	{Regs{}, "kvm_regs", "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"},
	{Segment{}, "kvm_segment", "base limit selector type present dpl db s l g avl unusable"},
	{Descriptor{}, "kvm_dtable", "base limit"},
	{Sregs{}, "kvm_sregs", "cs ds es fs gs ss tr ldt gdt idt cr0 cr2 cr3 cr4 cr8 efer apic_base interrupt_bitmap"},
	{Sregs2{}, "kvm_sregs2", "cs ds es fs gs ss tr ldt gdt idt cr0 cr2 cr3 cr4 cr8 efer apic_base flags pdptrs"},
	{DebugRegs{}, "kvm_debugregs", "db dr6 dr7 flags"},
	{XCRS{}, "kvm_xcrs", "nr_xcrs flags xcrs"},
	{gokvm.XRC{}, "kvm_xcr", "xcr value"},
	{LAPICState{}, "kvm_lapic_state", "regs"},
	{VCPUEvents{}, "kvm_vcpu_events", "exception interrupt nmi sipi_vector flags smi triple_fault.pending exception_has_payload exception_payload"},
	{CPUIDEntry{}, "kvm_cpuid_entry2", "function index flags eax ebx ecx edx padding"},
	{MSREntry{}, "kvm_msr_entry", "index reserved data"},
	{gokvm.PITChannelState{}, "kvm_pit_channel_state", "count latched_count count_latched status_latched status read_state write_state write_latch rw_mode mode bcd gate count_load_time"},
	{PITState{}, "kvm_pit_state2", "channels flags"},
	{IRQChipState{}, "kvm_irqchip", "chip_id chip"},
	{ClockData{}, "kvm_clock_data", "clock flags realtime host_tsc"},
	{gokvm.UserspaceMemoryRegion{}, "kvm_userspace_memory_region", "slot flags guest_phys_addr memory_size userspace_addr"},
	{irqLevel{}, "kvm_irq_level", "irq level"},
	{pitConfig{}, "kvm_pit_config", "flags"},
	{irqRoutingEntry{}, "kvm_irq_routing_entry", "gsi type flags u"},
	{irqfd{}, "kvm_irqfd", "fd gsi flags"},
	{ioeventfd{}, "kvm_ioeventfd", "datamatch addr len fd flags"},
	{msi{}, "kvm_msi", "address_lo address_hi data"},
	{dirtyLog{}, "kvm_dirty_log", "slot dirty_bitmap"},
	{clearDirtyLog{}, "kvm_clear_dirty_log", "slot num_pages first_page dirty_bitmap"},
	{enableCap{}, "kvm_enable_cap", "cap args"},
	{mpState{}, "kvm_mp_state", "mp_state"},
}

// eventParts are the anonymous structs of kvm_vcpu_events.
var eventParts = []struct {
	member string
	goType any
	fields string
}{
	{"exception", gokvm.Exception{}, "injected nr has_error_code pending error_code"},
	{"interrupt", gokvm.Interrupt{}, "injected nr soft shadow"},
	{"nmi", gokvm.NMI{}, "injected pending masked"},
	{"smi", gokvm.SMI{}, "smm pending smm_inside_nmi latched_init"},
}

func offsetOf(c, member string) string { return fmt.Sprintf("offsetof(struct %s, %s)", c, member) }
func sizeOf(c string) string           { return fmt.Sprintf("sizeof(struct %s)", c) }

func memberSize(c, member string) string {
	return fmt.Sprintf("sizeof(((struct %s *)0)->%s)", c, member)
}

// memberFacts lists the offset and size of every field of a Go struct that is
// at the offset base of the C struct c, whose members carry the given prefix.
func memberFacts(t *testing.T, v any, c, prefix, members string, base uint64) []fact {
	t.Helper()
	names, gt := strings.Fields(members), reflect.TypeOf(v)
	var facts []fact
	for i := range gt.NumField() {
		f := gt.Field(i)
		if f.Name == "_" {
			continue
		}
		if len(names) == 0 {
			t.Fatalf("%s has no member for field %s", c, f.Name)
		}
		facts = append(facts,
			fact{offsetOf(c, prefix+names[0]), base + uint64(f.Offset)},
			fact{memberSize(c, prefix+names[0]), uint64(f.Type.Size())})
		names = names[1:]
	}
	if len(names) != 0 {
		t.Fatalf("%s: members without a field: %v", c, names)
	}
	return facts
}

func structFacts(t *testing.T) []fact {
	t.Helper()
	var facts []fact
	for _, l := range layouts {
		facts = append(facts, fact{sizeOf(l.cType), uint64(reflect.TypeOf(l.goType).Size())})
		facts = append(facts, memberFacts(t, l.goType, l.cType, "", l.members, 0)...)
	}
	events := reflect.TypeFor[VCPUEvents]()
	for i, p := range eventParts {
		// The parts are fields E, I, N and S.
		f, _ := events.FieldByName([]string{"E", "I", "N", "S"}[i])
		facts = append(facts, memberFacts(t, p.goType, "kvm_vcpu_events", p.member+".", p.fields, uint64(f.Offset))...)
	}
	return facts
}

// runFacts are about kvm_run and the parts of its union that exit.go decodes.
func runFacts() []fact {
	off := func(member string, value uintptr) fact { return fact{offsetOf("kvm_run", member), uint64(value)} }
	var r gokvm.RunData
	word := func(n uintptr) uintptr { return unionOffset + 8*n }
	return []fact{
		{sizeOf("kvm_run"), runSize},
		off("request_interrupt_window", unsafe.Offsetof(r.RequestInterruptWindow)),
		off("immediate_exit", unsafe.Offsetof(r.ImmediateExit)),
		off("exit_reason", unsafe.Offsetof(r.ExitReason)),
		off("ready_for_interrupt_injection", unsafe.Offsetof(r.ReadyForInterruptInjection)),
		off("if_flag", unsafe.Offsetof(r.IfFlag)),
		off("cr8", unsafe.Offsetof(r.CR8)),
		off("apic_base", unsafe.Offsetof(r.ApicBase)),
		off("padding", unionOffset), // the union's member that fixes its size
		{memberSize("kvm_run", "padding"), uint64(unsafe.Sizeof(r.Data))},
		off("io.direction", word(0)), off("io.size", word(0)+1), off("io.port", word(0)+2),
		off("io.count", word(0)+4), off("io.data_offset", word(1)),
		off("mmio.phys_addr", word(0)), off("mmio.data", mmioDataOffset), off("mmio.len", word(2)),
		off("mmio.is_write", word(2)+4),
		{memberSize("kvm_run", "mmio.data"), 8},
		off("internal.suberror", word(0)), off("internal.ndata", word(0)+4), off("internal.data", word(1)),
		{memberSize("kvm_run", "internal.data"), 16 * 8},
		off("emulation_failure.flags", word(1)),
		off("emulation_failure.insn_size", insnSizeOffset), off("emulation_failure.insn_bytes", insnSizeOffset+1),
		{memberSize("kvm_run", "emulation_failure.insn_bytes"), insnMax},
		off("fail_entry.hardware_entry_failure_reason", word(0)), off("fail_entry.cpu", word(1)),
		off("hw.hardware_exit_reason", word(0)),
		off("system_event.type", word(0)), off("system_event.ndata", word(0)+4), off("system_event.data", word(1)),
		{memberSize("kvm_run", "system_event.data"), 16 * 8},
	}
}

// listFacts are about structs that end in a list, which are built from words.
func listFacts() []fact {
	return []fact{
		{sizeOf("kvm_msrs"), 8},
		{offsetOf("kvm_msrs", "entries"), 8},
		{sizeOf("kvm_cpuid2"), 8},
		{offsetOf("kvm_cpuid2", "entries"), 8},
		{sizeOf("kvm_msr_list"), 4},
		{offsetOf("kvm_msr_list", "indices"), 4},
		{sizeOf("kvm_irq_routing"), 8},
		{offsetOf("kvm_irq_routing", "entries"), 8},
		{memberSize("kvm_irq_routing_entry", "u.msi"), 16},
		{offsetOf("kvm_irq_routing_entry", "u.irqchip.irqchip"), 16},
		{offsetOf("kvm_irq_routing_entry", "u.irqchip.pin"), 20},
		{offsetOf("kvm_irq_routing_entry", "u.msi.address_lo"), 16},
		{offsetOf("kvm_irq_routing_entry", "u.msi.address_hi"), 20},
		{offsetOf("kvm_irq_routing_entry", "u.msi.data"), 24},
		{sizeOf("kvm_nested_state"), nestedHdrSize},
		{offsetOf("kvm_nested_state", "size"), nestedSizeOffset},
		{memberSize("kvm_xsave", "region"), xsaveSize},
	}
}

func requestFacts() []fact {
	return []fact{
		{"KVM_GET_API_VERSION", reqGetAPIVersion},
		{"KVM_CREATE_VM", reqCreateVM},
		{"KVM_GET_MSR_INDEX_LIST", reqGetMSRIndexList},
		{"KVM_CHECK_EXTENSION", reqCheckExtension},
		{"KVM_GET_VCPU_MMAP_SIZE", reqGetVCPUMmapSize},
		{"KVM_GET_SUPPORTED_CPUID", reqGetSupportedCPUID},
		{"KVM_CREATE_VCPU", reqCreateVCPU},
		{"KVM_GET_DIRTY_LOG", uint64(reqGetDirtyLog)},
		{"KVM_SET_USER_MEMORY_REGION", uint64(reqSetUserMemoryRegion)},
		{"KVM_SET_TSS_ADDR", reqSetTSSAddr},
		{"KVM_SET_IDENTITY_MAP_ADDR", uint64(reqSetIdentityMapAddr)},
		{"KVM_CREATE_IRQCHIP", reqCreateIRQChip},
		{"KVM_IRQ_LINE", uint64(reqIRQLine)},
		{"KVM_GET_IRQCHIP", uint64(reqGetIRQChip)},
		{"KVM_SET_IRQCHIP", uint64(reqSetIRQChip)},
		{"KVM_SET_GSI_ROUTING", reqSetGSIRouting},
		{"KVM_IRQFD", uint64(reqIRQFD)},
		{"KVM_CREATE_PIT2", uint64(reqCreatePIT2)},
		{"KVM_SET_BOOT_CPU_ID", reqSetBootCPUID},
		{"KVM_IOEVENTFD", uint64(reqIOEventFD)},
		{"KVM_SET_CLOCK", uint64(reqSetClock)},
		{"KVM_GET_CLOCK", uint64(reqGetClock)},
		{"KVM_GET_PIT2", uint64(reqGetPIT2)},
		{"KVM_SET_PIT2", uint64(reqSetPIT2)},
		{"KVM_ENABLE_CAP", uint64(reqEnableCap)},
		{"KVM_SIGNAL_MSI", uint64(reqSignalMSI)},
		{"KVM_CLEAR_DIRTY_LOG", uint64(reqClearDirtyLog)},
		{"KVM_RUN", reqRun},
		{"KVM_GET_REGS", uint64(reqGetRegs)},
		{"KVM_SET_REGS", uint64(reqSetRegs)},
		{"KVM_GET_SREGS", uint64(reqGetSregs)},
		{"KVM_SET_SREGS", uint64(reqSetSregs)},
		{"KVM_GET_MSRS", reqGetMSRs},
		{"KVM_SET_MSRS", reqSetMSRs},
		{"KVM_GET_LAPIC", uint64(reqGetLAPIC)},
		{"KVM_SET_LAPIC", uint64(reqSetLAPIC)},
		{"KVM_SET_CPUID2", reqSetCPUID2},
		{"KVM_GET_CPUID2", reqGetCPUID2},
		{"KVM_GET_MP_STATE", uint64(reqGetMPState)},
		{"KVM_SET_MP_STATE", uint64(reqSetMPState)},
		{"KVM_GET_VCPU_EVENTS", uint64(reqGetVCPUEvents)},
		{"KVM_SET_VCPU_EVENTS", uint64(reqSetVCPUEvents)},
		{"KVM_GET_DEBUGREGS", uint64(reqGetDebugRegs)},
		{"KVM_SET_DEBUGREGS", uint64(reqSetDebugRegs)},
		{"KVM_SET_TSC_KHZ", reqSetTSCKHz},
		{"KVM_GET_TSC_KHZ", reqGetTSCKHz},
		{"KVM_GET_XSAVE", reqGetXSave},
		{"KVM_SET_XSAVE", reqSetXSave},
		{"KVM_GET_XSAVE2", reqGetXSave2},
		{"KVM_GET_XCRS", uint64(reqGetXCRS)},
		{"KVM_SET_XCRS", uint64(reqSetXCRS)},
		{"KVM_KVMCLOCK_CTRL", reqKVMClockCtrl},
		{"KVM_GET_NESTED_STATE", reqGetNestedState},
		{"KVM_SET_NESTED_STATE", reqSetNestedState},
		{"KVM_GET_SREGS2", uint64(reqGetSregs2)},
		{"KVM_SET_SREGS2", uint64(reqSetSregs2)},
	}
}

// newerConstants define what headers older than Linux 6.8 lack.
const newerConstants = `
#ifndef KVM_CAP_MEMORY_FAULT_INFO
#define KVM_CAP_MEMORY_FAULT_INFO 232
#endif
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
`

func constantFacts() []fact {
	return []fact{
		{"KVM_API_VERSION", APIVersion},
		{"KVM_CAP_IRQCHIP", uint64(CapIRQChip)},
		{"KVM_CAP_USER_MEMORY", uint64(CapUserMemory)},
		{"KVM_CAP_SET_TSS_ADDR", uint64(CapSetTSSAddr)},
		{"KVM_CAP_EXT_CPUID", uint64(CapExtCPUID)},
		{"KVM_CAP_NR_VCPUS", uint64(CapNrVCPUs)},
		{"KVM_CAP_NR_MEMSLOTS", uint64(CapNrMemSlots)},
		{"KVM_CAP_MP_STATE", uint64(CapMPState)},
		{"KVM_CAP_IRQ_ROUTING", uint64(CapIRQRouting)},
		{"KVM_CAP_IRQFD", uint64(CapIRQFD)},
		{"KVM_CAP_PIT2", uint64(CapPIT2)},
		{"KVM_CAP_SET_BOOT_CPU_ID", uint64(CapSetBootCPUID)},
		{"KVM_CAP_PIT_STATE2", uint64(CapPITState2)},
		{"KVM_CAP_IOEVENTFD", uint64(CapIOEventFD)},
		{"KVM_CAP_SET_IDENTITY_MAP_ADDR", uint64(CapSetIdentityMapAddr)},
		{"KVM_CAP_ADJUST_CLOCK", uint64(CapAdjustClock)},
		{"KVM_CAP_INTERNAL_ERROR_DATA", uint64(CapInternalErrorData)},
		{"KVM_CAP_VCPU_EVENTS", uint64(CapVCPUEvents)},
		{"KVM_CAP_DEBUGREGS", uint64(CapDebugRegs)},
		{"KVM_CAP_ENABLE_CAP", uint64(CapEnableCap)},
		{"KVM_CAP_XSAVE", uint64(CapXSave)},
		{"KVM_CAP_XCRS", uint64(CapXCRS)},
		{"KVM_CAP_TSC_CONTROL", uint64(CapTSCControl)},
		{"KVM_CAP_GET_TSC_KHZ", uint64(CapGetTSCKHz)},
		{"KVM_CAP_MAX_VCPUS", uint64(CapMaxVCPUs)},
		{"KVM_CAP_TSC_DEADLINE_TIMER", uint64(CapTSCDeadlineTimer)},
		{"KVM_CAP_SYNC_REGS", uint64(CapSyncRegs)},
		{"KVM_CAP_KVMCLOCK_CTRL", uint64(CapKVMClockCtrl)},
		{"KVM_CAP_SIGNAL_MSI", uint64(CapSignalMSI)},
		{"KVM_CAP_READONLY_MEM", uint64(CapReadonlyMem)},
		{"KVM_CAP_ENABLE_CAP_VM", uint64(CapEnableCapVM)},
		{"KVM_CAP_X2APIC_API", uint64(CapX2APICAPI)},
		{"KVM_CAP_IMMEDIATE_EXIT", uint64(CapImmediateExit)},
		{"KVM_CAP_NESTED_STATE", uint64(CapNestedState)},
		{"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", uint64(CapManualDirtyProtect2)},
		{"KVM_CAP_SREGS2", uint64(CapSregs2)},
		{"KVM_CAP_EXIT_ON_EMULATION_FAILURE", uint64(CapExitOnEmulationError)},
		{"KVM_CAP_XSAVE2", uint64(CapXSave2)},
		{"KVM_CAP_MEMORY_FAULT_INFO", uint64(CapMemoryFaultInfo)},
		{"KVM_EXIT_MEMORY_FAULT", uint64(ExitMemoryFault)},
		{"KVM_EXIT_UNKNOWN", uint64(ExitUnknown)},
		{"KVM_EXIT_EXCEPTION", uint64(ExitException)},
		{"KVM_EXIT_IO", uint64(ExitIO)},
		{"KVM_EXIT_IO_OUT", gokvm.EXITIOOUT},
		{"KVM_EXIT_HYPERCALL", uint64(ExitHypercall)},
		{"KVM_EXIT_DEBUG", uint64(ExitDebug)},
		{"KVM_EXIT_HLT", uint64(ExitHLT)},
		{"KVM_EXIT_MMIO", uint64(ExitMMIO)},
		{"KVM_EXIT_IRQ_WINDOW_OPEN", uint64(ExitIRQWindowOpen)},
		{"KVM_EXIT_SHUTDOWN", uint64(ExitShutdown)},
		{"KVM_EXIT_FAIL_ENTRY", uint64(ExitFailEntry)},
		{"KVM_EXIT_INTR", uint64(ExitIntr)},
		{"KVM_EXIT_INTERNAL_ERROR", uint64(ExitInternalError)},
		{"KVM_EXIT_SYSTEM_EVENT", uint64(ExitSystemEvent)},
		{"KVM_INTERNAL_ERROR_EMULATION", InternalEmulation},
		{"KVM_INTERNAL_ERROR_SIMUL_EX", InternalSimulEx},
		{"KVM_INTERNAL_ERROR_DELIVERY_EV", InternalDeliveryEv},
		{"KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON", InternalUnexpectedExit},
		{"KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES", insnBytesValid},
		{"KVM_SYSTEM_EVENT_SHUTDOWN", EventShutdown},
		{"KVM_SYSTEM_EVENT_RESET", EventReset},
		{"KVM_SYSTEM_EVENT_CRASH", EventCrash},
		{"KVM_MP_STATE_RUNNABLE", uint64(MPRunnable)},
		{"KVM_MP_STATE_UNINITIALIZED", uint64(MPUninitialized)},
		{"KVM_MP_STATE_INIT_RECEIVED", uint64(MPInitReceived)},
		{"KVM_MP_STATE_HALTED", uint64(MPHalted)},
		{"KVM_MP_STATE_SIPI_RECEIVED", uint64(MPSipiReceived)},
		{"KVM_MEM_LOG_DIRTY_PAGES", uint64(MemLogDirtyPages)},
		{"KVM_MEM_READONLY", uint64(MemReadonly)},
		{"KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE", DirtyLogManualProtect},
		{"KVM_DIRTY_LOG_INITIALLY_SET", DirtyLogInitiallySet},
		{"KVM_IRQCHIP_PIC_MASTER", uint64(PICMaster)},
		{"KVM_IRQCHIP_PIC_SLAVE", uint64(PICSlave)},
		{"KVM_IRQCHIP_IOAPIC", uint64(IOAPIC)},
		{"KVM_IOAPIC_NUM_PINS", IOAPICPins},
		{"KVM_PIT_SPEAKER_DUMMY", uint64(PITSpeakerDummy)},
		{"KVM_IRQ_ROUTING_IRQCHIP", routeIRQChip},
		{"KVM_IRQ_ROUTING_MSI", routeMSI},
		{"KVM_IRQFD_FLAG_DEASSIGN", irqfdDeassign},
		{"KVM_IOEVENTFD_FLAG_DATAMATCH", ioeventDatamatch},
		{"KVM_IOEVENTFD_FLAG_PIO", ioeventPIO},
		{"KVM_IOEVENTFD_FLAG_DEASSIGN", ioeventDeassign},
		{"KVM_CLOCK_TSC_STABLE", ClockTSCStable},
		{"KVM_CLOCK_REALTIME", ClockRealtime},
		{"KVM_CLOCK_HOST_TSC", ClockHostTSC},
		{"KVM_CPUID_FLAG_SIGNIFCANT_INDEX", CPUIDIndexed},
		{"KVM_SREGS2_FLAGS_PDPTRS_VALID", Sregs2PDPtrsValid},
	}
}

func allFacts(t *testing.T) []fact {
	t.Helper()
	facts := structFacts(t)
	for _, more := range [][]fact{runFacts(), listFacts(), requestFacts(), constantFacts()} {
		facts = append(facts, more...)
	}
	return facts
}

// TestLayoutTable proves the checked-in table by compiling a program against
// the kernel's headers. With -update it writes the table, for TestLayout to read.
func TestLayoutTable(t *testing.T) {
	var src bytes.Buffer
	src.WriteString("#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n" + newerConstants + "int main(void) {\n")
	for _, f := range allFacts(t) {
		fmt.Fprintf(&src, "printf(\"%%s %%lu\\n\", %q, (unsigned long)(%s));\n", f.expr, f.expr)
	}
	src.WriteString("return 0;\n}\n")
	out := runC(t, src.Bytes())
	if *update {
		must(t, os.MkdirAll(filepath.Dir(layoutFile), 0o755))
		must(t, os.WriteFile(layoutFile, out, 0o644))
		return
	}
	if table := must1(os.ReadFile(layoutFile))(t); !bytes.Equal(table, out) {
		t.Errorf("%s is not what the kernel's headers say; they say:\n%s", layoutFile, out)
	}
}

// TestLayout compares what this package assumes with the checked-in table.
func TestLayout(t *testing.T) {
	var believed bytes.Buffer
	for _, f := range allFacts(t) {
		fmt.Fprintf(&believed, "%s %d\n", f.expr, f.value)
	}
	table := must1(os.ReadFile(layoutFile))(t)
	want := strings.Split(string(table), "\n")
	have := strings.Split(believed.String(), "\n")
	for i := range max(len(want), len(have)) {
		w, h := "nothing", "nothing"
		if i < len(want) {
			w = want[i]
		}
		if i < len(have) {
			h = have[i]
		}
		if w != h {
			t.Errorf("line %d: this package has %q, the kernel %q (after adding a fact, run with -update)", i+1, h, w)
		}
	}
}

// runC compiles and runs a C program and returns its output. The test is
// skipped on a host without a C compiler or the kernel's headers.
func runC(t *testing.T, src []byte) []byte {
	t.Helper()
	cc, err := exec.LookPath("cc")
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("no C compiler (cc) on this host: the table of layouts can't be proved, only used")
	}
	must(t, err)
	dir := t.TempDir()
	headers := filepath.Join(dir, "headers.c")
	must(t, os.WriteFile(headers, []byte("#include <stdio.h>\n#include <linux/kvm.h>\n"), 0o600))
	if out, err := exec.Command(cc, "-E", "-o", os.DevNull, headers).CombinedOutput(); err != nil {
		t.Skipf("no kernel headers (linux-libc-dev) on this host: %v\n%s", err, out)
	}
	file, bin := filepath.Join(dir, "layout.c"), filepath.Join(dir, "layout")
	must(t, os.WriteFile(file, src, 0o600))
	if out, err := exec.Command(cc, "-o", bin, file).CombinedOutput(); err != nil {
		t.Fatalf("the kernel's headers lack something: %v\n%s", err, out)
	}
	return must1(exec.Command(bin).Output())(t)
}

// TestRejectedLayouts holds README.md to its word about what in gokvm is not
// the kernel's layout, so that an update of gokvm which mends it is noticed.
func TestRejectedLayouts(t *testing.T) {
	kernel := make(map[string]uint64)
	for _, f := range allFacts(t) {
		kernel[f.expr] = f.value
	}
	if size := uint64(unsafe.Sizeof(gokvm.IRQRoutingEntry{})); size == kernel[sizeOf("kvm_irq_routing_entry")] {
		t.Errorf("gokvm.IRQRoutingEntry has the kernel's %d bytes", size)
	}
	if size := uint64(unsafe.Sizeof(gokvm.RunData{})); size >= kernel[sizeOf("kvm_run")] {
		t.Errorf("gokvm.RunData has %d bytes and may reach to the end of kvm_run", size)
	}
	if reflect.TypeFor[gokvm.DirtyLog]().Field(2).Type.Kind() != reflect.Uint64 {
		t.Error("gokvm.DirtyLog.BitMap is no plain number any more")
	}
	if reflect.TypeFor[gokvm.Capability]().Size() != 1 {
		t.Error("gokvm.Capability has more than 8 bits")
	}
}
