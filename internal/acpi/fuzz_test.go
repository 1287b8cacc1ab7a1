package acpi

import (
	"errors"
	"testing"
)

// FuzzBuild: any configuration makes tables that a guest can walk and that fit, or is refused.
func FuzzBuild(f *testing.F) {
	f.Add(uint16(2), uint16(0x600), uint16(0x3f8), uint32(4), uint32(0xd0000000), uint32(0x1000), uint32(5), uint64(0x1000ff000), uint32(testRoom))
	f.Add(uint16(300), uint16(0x600), uint16(0x3f8), uint32(4), uint32(0xd0000000), uint32(1), uint32(5), uint64(0), uint32(4096))
	f.Add(uint16(1), uint16(0xffff), uint16(0xfffa), uint32(23), uint32(0xfec00000), uint32(1<<31), uint32(22), uint64(7), uint32(testRoom))
	f.Fuzz(func(t *testing.T, cpus, power, port uint16, serial, window, size, gsi uint32, genID uint64, room uint32) {
		c := Config{
			CPUs:   int(cpus),
			Power:  Power{SleepControl: power, SleepStatus: power + 1, Reset: power + 2},
			Serial: []SerialPort{{Port: port, GSI: serial}},
			Virtio: []VirtioMMIO{{Base: window, Size: size, GSI: gsi}, {Base: window + size, Size: size, GSI: gsi + 1, Trigger: Level}},
		}
		if genID != 0 {
			c.VMGenID = &VMGenID{Addr: genID, GSI: gsi + 2}
		}
		tables, err := Build(c, testBase, uint64(room))
		if tooLarge := (*TooLargeError)(nil); err != nil {
			if !errors.Is(err, ErrConfig) && !errors.As(err, &tooLarge) {
				t.Fatal(err)
			}
			return
		}
		if len(tables.Data) > int(room) || len(readTables(t, tables)) != 4 {
			t.Fatalf("tables of %d bytes in %d", len(tables.Data), room)
		}
	})
}
