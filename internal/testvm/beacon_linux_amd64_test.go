package testvm

import (
	"errors"
	"strings"
	"testing"
)

// com1 is as much of a serial port as a beacon needs.
type com1 struct{ got chan byte }

func (c com1) In(port uint16, data []byte) {
	clear(data)
	if port == 0x3fd {
		data[0] = 0x20
	}
}

func (c com1) Out(port uint16, data []byte) {
	select {
	case c.got <- data[0]:
	default: // the test has seen enough
	}
}

func TestBeacon(t *testing.T) {
	im, err := Beacon(BeaconConfig{Memory: 4 << 20, Period: 1e6, Every: 5})
	must(t, err)
	const want = "ready\n5 ticks\n10 ticks\n15 ticks\n"
	dev := com1{make(chan byte, len(want))}
	m := newMachine(t, 4<<20, im, dev)
	m.start(t)
	var said strings.Builder
	ctx := testContext(t)
	for said.Len() < len(want) {
		select {
		case b := <-dev.got:
			said.WriteByte(b)
		case err := <-m.ends[0]:
			t.Fatal(err)
		case <-ctx.Done():
			t.Fatalf("%q in time", said.String())
		}
	}
	m.halt()
	// A host that is busy merges ticks; a line is late then, and no less a line.
	if got := said.String(); !strings.HasPrefix(got, "ready\n") || strings.Count(got, " ticks\n") < 2 {
		t.Errorf("it says %q", got)
	}
	for _, cfg := range []BeaconConfig{{Memory: 4 << 20, Every: 1}, {Memory: 4 << 20, Period: 1}, {Memory: 1, Period: 1, Every: 1}} {
		if _, err := Beacon(cfg); !errors.As(err, new(*ConfigError)) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}
