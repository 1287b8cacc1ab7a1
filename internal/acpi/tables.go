package acpi

// Identification that every table carries (ACPI 6.5, 5.2.6).
const (
	oemID         = "CRYOVS"
	oemTableID    = "CRYOVSOR"
	oemRevision   = 1
	creatorID     = "CRYO"
	creatorRev    = 1
	headerSize    = 36
	checksumByte  = 9
	rsdpSize      = 36
	rsdpV1Size    = 20 // the part that the first checksum covers
	rsdpSum       = 8
	rsdpSumExt    = 32
	gasSystemIO   = 1
	gasByteAccess = 1
)

// checksum is the byte that makes the sum of b zero.
func checksum(b []byte) byte {
	var sum byte
	for _, v := range b {
		sum += v
	}
	return -sum
}

// table puts a header before body.
func table(signature string, revision byte, body []byte) []byte {
	b := make([]byte, headerSize, headerSize+len(body))
	copy(b, signature)
	le.PutUint32(b[4:], uint32(headerSize+len(body)))
	b[8] = revision
	copy(b[10:16], oemID)
	copy(b[16:24], oemTableID)
	le.PutUint32(b[24:], oemRevision)
	copy(b[28:32], creatorID)
	le.PutUint32(b[32:], creatorRev)
	b = append(b, body...)
	b[checksumByte] = checksum(b)
	return b
}

// rsdp is the root pointer of revision 2 (5.2.5.3): an XSDT, and no RSDT.
func rsdp(xsdt uint64) []byte {
	b := make([]byte, rsdpSize)
	copy(b, "RSD PTR ")
	copy(b[9:15], oemID)
	b[15] = 2
	le.PutUint32(b[20:], rsdpSize)
	le.PutUint64(b[24:], xsdt)
	b[rsdpSum] = checksum(b[:rsdpV1Size])
	b[rsdpSumExt] = checksum(b)
	return b
}

// xsdt lists the tables but for the DSDT, which the FADT points to (5.2.8).
func xsdt(tables ...uint64) []byte {
	var body []byte
	for _, addr := range tables {
		body = le.AppendUint64(body, addr)
	}
	return table("XSDT", 1, body)
}

// FADT offsets and flags (5.2.9, tables 5.9 to 5.11), from the start of the table.
const (
	fadtSize          = 276
	fadtRevision      = 6
	fadtMinor         = 3
	fadtDSDT          = 40
	fadtProfile       = 45
	fadtBootArch      = 109
	fadtFlags         = 112
	fadtResetReg      = 116
	fadtResetValue    = 128
	fadtMinorVersion  = 131
	fadtXDSDT         = 140
	fadtSleepControl  = 244
	fadtSleepStatus   = 256
	fadtHypervisor    = 268
	profileServer     = 4 // enterprise server
	bootNoVGA         = 1 << 2
	bootNoRTC         = 1 << 5
	flagWBINVD        = 1 << 0
	flagNoPowerButton = 1 << 4 // no fixed-feature button
	flagNoSleepButton = 1 << 5
	flagResetReg      = 1 << 10
	flagHeadless      = 1 << 12
	flagHWReduced     = 1 << 20
)

// fadt describes the fixed hardware: hardly any. A hardware-reduced platform has no FACS (5.2.10).
func fadt(c *Config, dsdt uint64) []byte {
	b := make([]byte, fadtSize)
	le.PutUint32(b[fadtDSDT:], uint32(dsdt)) // some readers know only the 32-bit field
	le.PutUint64(b[fadtXDSDT:], dsdt)
	b[fadtProfile] = profileServer
	// Neither legacy devices nor an 8042: a guest must not poke at what is not there.
	le.PutUint16(b[fadtBootArch:], bootNoVGA|bootNoRTC)
	le.PutUint32(b[fadtFlags:],
		flagWBINVD|flagNoPowerButton|flagNoSleepButton|flagResetReg|flagHeadless|flagHWReduced)
	copy(b[fadtResetReg:], portGAS(c.Power.Reset))
	b[fadtResetValue] = ResetValue
	b[fadtMinorVersion] = fadtMinor
	copy(b[fadtSleepControl:], portGAS(c.Power.SleepControl))
	copy(b[fadtSleepStatus:], portGAS(c.Power.SleepStatus))
	copy(b[fadtHypervisor:], oemTableID)
	return table("FACP", fadtRevision, b[headerSize:])
}

// portGAS is a generic address structure (5.2.3.2) for a register of one byte in I/O space.
func portGAS(port uint16) []byte {
	return le.AppendUint64([]byte{gasSystemIO, 8, 0, gasByteAccess}, uint64(port))
}

// MADT entries (5.2.12).
const (
	madtRevision    = 5
	madtLAPIC       = 0
	madtIOAPIC      = 1
	madtLAPICNMI    = 4
	madtX2APIC      = 9
	madtX2APICNMI   = 10
	madtEnabled     = 1
	maxLAPICID      = 254 // 255 is the broadcast ID
	allProcessors   = 0xff
	allProcessors32 = 0xffffffff
	nmiLINT         = 1
)

// madt lists the interrupt controllers. There are no overrides: a GSI is the I/O APIC's pin of that number.
func madt(c *Config) []byte {
	b := le.AppendUint32(nil, lapicBase)
	b = le.AppendUint32(b, 0) // flags: no 8259 that the guest would have to disable
	for id := range c.CPUs {
		if id <= maxLAPICID {
			b = append(b, madtLAPIC, 8, byte(id), byte(id), madtEnabled, 0, 0, 0)
			continue
		}
		b = append(b, madtX2APIC, 16, 0, 0)
		b = le.AppendUint32(b, uint32(id))
		b = le.AppendUint32(b, madtEnabled)
		b = le.AppendUint32(b, uint32(id))
	}
	b = append(b, madtIOAPIC, 12, 0, 0)
	b = le.AppendUint32(b, ioapicBase)
	b = le.AppendUint32(b, 0)
	b = append(b, madtLAPICNMI, 6, allProcessors, 0, 0, nmiLINT)
	if c.CPUs > maxLAPICID+1 {
		b = append(b, madtX2APICNMI, 12, 0, 0)
		b = le.AppendUint32(b, allProcessors32)
		b = append(b, nmiLINT, 0, 0, 0)
	}
	return table("APIC", madtRevision, b)
}
