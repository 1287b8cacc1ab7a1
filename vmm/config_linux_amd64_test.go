package vmm_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/vmm"
)

// dumb is a port device that does nothing.
type dumb struct{}

func (dumb) In(_ uint16, data []byte) { clear(data) }
func (dumb) Out(uint16, []byte)       {}

func ports(ranges ...uint16) vmm.Hardware {
	var hw vmm.Hardware
	for i := 0; i < len(ranges); i += 2 {
		hw.Ports = append(hw.Ports, vmm.Ports{First: ranges[i], Last: ranges[i+1], Device: dumb{}})
	}
	return hw
}

// TestConfigErrors makes machines that can't be, and nothing is left of them.
func TestConfigErrors(t *testing.T) {
	host := needKVM(t)
	program := vmm.Program{Start: func(int) vmm.CPUStart { return vmm.CPUStart{} }}
	image := func(base, entry uint64, n int) vmm.Flat {
		return vmm.Flat{Image: vmm.File{ReaderAt: bytes.NewReader(make([]byte, n)), Size: int64(n)}, Base: base, Entry: entry}
	}
	load := func(gpa uint64, n int) vmm.Program {
		p := program
		p.Load = []vmm.Segment{{GPA: gpa, Data: make([]byte, n)}}
		return p
	}
	before := countResources(t)
	for _, tc := range []struct {
		name string
		cfg  vmm.Config
		want error
	}{
		{"no memory", vmm.Config{Boot: program}, vmm.ErrConfig},
		{"little memory", vmm.Config{MemoryBytes: vmm.MinMemory - 4096, Boot: program}, vmm.ErrConfig},
		{"part of a page", vmm.Config{MemoryBytes: 4*mib + 1, Boot: program}, vmm.ErrConfig},
		{"too much memory", vmm.Config{MemoryBytes: vmm.MaxMemory + 4096, Boot: program}, vmm.ErrConfig},
		{"more memory than the host", vmm.Config{MemoryBytes: host.MemoryBytes&^4095 + 4096, Boot: program}, vmm.ErrHostMemory},
		{"negative vCPUs", vmm.Config{MemoryBytes: 4 * mib, VCPUs: -1, Boot: program}, vmm.ErrConfig},
		{"too many vCPUs", vmm.Config{MemoryBytes: 4 * mib, VCPUs: vmm.MaxVCPUs + 1, Boot: program}, vmm.ErrConfig},
		{"no boot", vmm.Config{MemoryBytes: 4 * mib}, vmm.ErrConfig},
		{"empty program", vmm.Config{MemoryBytes: 4 * mib, Boot: vmm.Program{}}, vmm.ErrConfig},
		{"segment beyond memory", vmm.Config{MemoryBytes: 4 * mib, Boot: load(4*mib-1, 2)}, vmm.ErrConfig},
		{"segment at the end of the world", vmm.Config{MemoryBytes: 4 * mib, Boot: load(1<<64-1, 1)}, vmm.ErrConfig},
		{"segment in the hole", vmm.Config{MemoryBytes: 3<<30 + mib, Boot: load(3<<30, 1), Hardware: vmm.Hardware{AllowOvercommit: true}}, vmm.ErrConfig},
		{"no image", vmm.Config{MemoryBytes: 4 * mib, Boot: vmm.Flat{Base: mib, Entry: mib}}, vmm.ErrConfig},
		{"image too low", vmm.Config{MemoryBytes: 4 * mib, Boot: image(4096, 4096, 10)}, vmm.ErrConfig},
		{"image too large", vmm.Config{MemoryBytes: 4 * mib, Boot: image(mib, mib, 4*mib)}, vmm.ErrConfig},
		{"ports overlap", vmm.Config{MemoryBytes: 4 * mib, Boot: program, Hardware: ports(0x4000, 0x4010, 0x4010, 0x4020)}, vmm.ErrConfig},
		{"ports overlap the serial port", vmm.Config{MemoryBytes: 4 * mib, Boot: program, Hardware: ports(0x3ff, 0x400)}, vmm.ErrConfig},
		{"ports overlap the sleep register", vmm.Config{MemoryBytes: 4 * mib, Boot: program, Hardware: ports(0x500, 0x600)}, vmm.ErrConfig},
		{"ports upside down", vmm.Config{MemoryBytes: 4 * mib, Boot: program, Hardware: ports(2, 1)}, vmm.ErrConfig},
		{"ports without a device", vmm.Config{MemoryBytes: 4 * mib, Boot: program, Hardware: vmm.Hardware{Ports: []vmm.Ports{{First: 1, Last: 2}}}}, vmm.ErrConfig},
	} {
		t.Run(tc.name, func(t *testing.T) {
			vm, err := vmm.New(tc.cfg)
			if err == nil {
				closeVM(t, vm)
			}
			if !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
	if after := countResources(t); after != before {
		t.Errorf("%+v, before %+v", after, before)
	}
}

func TestDefaults(t *testing.T) {
	vm := newVM(t, flat(t, "echo.bin", ports(0, 0x1f, 0xfff0, 0xffff)))
	if vm.VCPUs() != 1 || vm.Memory().Size() != 2*mib {
		t.Errorf("%d vCPUs, %d bytes", vm.VCPUs(), vm.Memory().Size())
	}
}

// TestCloseLeavesNothing makes, runs, moves and closes machines with memory on both sides of the hole.
func TestCloseLeavesNothing(t *testing.T) {
	needKVM(t)
	cfg := flat(t, "echo.bin", vmm.Hardware{AllowOvercommit: true, Console: vmm.Console{Out: &screen{}}})
	cfg.MemoryBytes, cfg.VCPUs = 3<<30+4*mib, 2
	before := countResources(t)
	for range 3 {
		vm, err := vmm.New(cfg)
		must(t, err)
		if countResources(t) == before {
			t.Fatal("a machine that has nothing: the test sees no leak")
		}
		must(t, vm.Start())
		pause(t, vm)
		vm = move(t, vm, cfg.Hardware)
		must(t, vm.Resume())
		must(t, vm.Close())
		if after := countResources(t); after != before {
			t.Fatalf("%+v, before %+v", after, before)
		}
	}
}
