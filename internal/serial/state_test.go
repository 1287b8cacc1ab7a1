package serial

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestSaveRestore moves a busy UART to a new one, through the encoding: the guest sees no difference.
func TestSaveRestore(t *testing.T) {
	a := newPort(t)
	a.outb(regLCR, lcrDLAB)
	a.outb(regData, 0x0c)
	a.outb(regLCR, 3)
	a.outb(regIIR, fcrEnable|0x80)
	a.outb(regMCR, mcrDTR|mcrRTS|mcrOUT2)
	a.outb(regSCR, 0x5a)
	a.outb(regIER, ierRDA|ierTHRE)
	in := bytes.Repeat([]byte("typed ahead "), 20)
	if a.Enqueue(in) != len(in) {
		t.Fatal("input refused")
	}
	enc, err := a.Save().MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	var s State
	if err := s.UnmarshalBinary(enc); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(a.Save(), s); d != "" {
		t.Fatalf("decoded state differs: %s", d)
	}
	b := newPort(t)
	if err := b.Restore(s); err != nil {
		t.Fatal(err)
	}
	b.wantLevel(true)
	if d := cmp.Diff(a.Save(), b.Save()); d != "" {
		t.Fatalf("restored state differs: %s", d)
	}
	b.want(regIIR, iirFIFO|iirRDA)
	b.want(regSCR, 0x5a)
	for _, c := range in {
		b.want(regData, c)
	}
	b.want(regIIR, iirFIFO|iirTHRE)
	b.wantLevel(false)
}

// TestRestoreDrivesLine: a restored interrupt controller does not know its lines, so a low line is driven too.
func TestRestoreDrivesLine(t *testing.T) {
	p := newPort(t)
	if err := p.Restore(p.Save()); err != nil {
		t.Fatal(err)
	}
	if len(p.edges) != 1 || p.edges[0] {
		t.Fatalf("line was set to %v", p.edges)
	}
}

func TestStateGolden(t *testing.T) {
	s := State{
		IER: 5, FCR: 0x81, LCR: 3, MCR: 0x0b, MSR: 0xb0, SCR: 0x5a, DLL: 12, DLM: 1, LineErrors: lsrOE,
		THREPending: true, Handshake: true, FIFO: []byte("ab"), Backlog: []byte("c"),
	}
	want := "\x01\x00\x05\x81\x03\x0b\xb0\x5a\x0c\x01\x02\x03\x02\x00\x01\x00abc"
	got, err := s.MarshalBinary()
	if err != nil || string(got) != want {
		t.Fatalf("encoding is %q, %v; want %q", got, err, want)
	}
}

func TestStateRejected(t *testing.T) {
	good, err := newPort(t).Save().MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	with := func(i int, v byte) []byte {
		b := bytes.Clone(good)
		b[i] = v
		return b
	}
	for name, b := range map[string][]byte{
		"empty": nil, "short": good[:len(good)-1], "long": append(bytes.Clone(good), 0), "version only": good[:2],
		"version 0": with(0, 0), "IER": with(2, 0x10), "FCR": with(3, 0x80), "FCR bit": with(3, 0x03),
		"MCR": with(5, 0x20), "errors": with(10, 0x80), "flag": with(11, 4), "length": with(12, 1),
		"deep FIFO": append(with(12, 17), make([]byte, 17)...),
		"backlog":   append(with(15, 0x11), make([]byte, 0x1100)...),
	} {
		var s State
		if err := s.UnmarshalBinary(b); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var ver *StateVersionError
	if err := new(State).UnmarshalBinary(with(0, 2)); !errors.As(err, &ver) || ver.Version != 2 || ver.Newest != 1 {
		t.Errorf("newer version: %v", err)
	}
	bad := State{IER: 0xff}
	if _, err := bad.MarshalBinary(); !errors.Is(err, ErrState) {
		t.Errorf("marshal of a bad state: %v", err)
	}
	p := newPort(t)
	if err := p.Restore(bad); !errors.Is(err, ErrState) || p.Save().IER != 0 {
		t.Errorf("restore of a bad state: %v", err)
	}
}

func FuzzState(f *testing.F) {
	for _, s := range []State{{}, {IER: 15, FCR: 0xc1, MCR: 0x1f, MSR: 0xff, THREPending: true, FIFO: []byte("0123456789abcdef"), Backlog: []byte("more")}} {
		b, err := s.MarshalBinary()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	u := New(Config{})
	f.Cleanup(func() { _ = u.Close(context.Background()) })
	f.Fuzz(func(t *testing.T, b []byte) {
		var s State
		if err := s.UnmarshalBinary(b); err != nil {
			var ver *StateVersionError
			if !errors.Is(err, ErrState) && !errors.As(err, &ver) {
				t.Fatalf("untyped error: %v", err)
			}
			return
		}
		again, err := s.MarshalBinary()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("accepted %x, which encodes as %x, %v", b, again, err)
		}
		if err := u.Restore(s); err != nil {
			t.Fatal(err)
		}
		for off := range uint16(Ports) {
			if _, err := u.Read(off); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzRegisters plays random guest accesses: no panic, bounded buffers, and what is saved restores.
func FuzzRegisters(f *testing.F) {
	f.Add([]byte{0x81, 0x0f, 0x82, 0x01, 0x80, 'x', 2, 0, 5, 0})
	f.Add([]byte{0x84, 0x10, 0x80, 'a', 0x80, 'b', 5, 0, 0, 0, 0x84, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		u := New(Config{})
		defer closeUART(t, u)
		for ; len(ops) >= 2; ops = ops[2:] {
			off := uint16(ops[0] & 7)
			switch {
			case ops[0]&0x80 != 0:
				_ = u.Write(off, ops[1])
			case ops[0]&0x40 != 0:
				u.Enqueue(bytes.Repeat(ops[1:2], int(ops[0])))
			default:
				_, _ = u.Read(off)
			}
			if u.line != (u.pending() != iirNone) {
				t.Fatal("the line does not match the pending interrupts")
			}
		}
		s := u.Save()
		if err := u.Restore(s); err != nil {
			t.Fatalf("saved state %+v: %v", s, err)
		}
	})
}
