package lifecycle

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/snapshot"
)

// FuzzConsole: any bytes are what a console was, and then it is stored as the same bytes; or they are refused.
func FuzzConsole(f *testing.F) {
	f.Add(binary.LittleEndian.AppendUint64(nil, 0))
	f.Add(append(binary.LittleEndian.AppendUint64(nil, 1<<20), "login: "...))
	f.Add(binary.LittleEndian.AppendUint64(nil, 1<<63))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, parsed := parseConsole(b)
		if parsed != nil && !errors.Is(parsed, snapshot.ErrFormat) {
			t.Fatal(parsed)
		}
		var c console
		c.restore(func(string) (snapshot.Section, error) {
			return snapshot.Section{Version: consoleVersion, Data: b}, nil
		})
		again, err := c.sections()
		if err != nil {
			t.Fatal(err)
		}
		if parsed == nil && !bytes.Equal(again[0].Data, b) {
			t.Fatalf("%x became %x", b, again[0].Data)
		}
		if _, err := c.Write([]byte("more")); err != nil || c.offset < 0 {
			t.Fatalf("offset %d, %v", c.offset, err)
		}
	})
}

// FuzzToken: any text is a place in a list, and its token one for the same place; or it is refused.
func FuzzToken(f *testing.F) {
	f.Add(position{1700000000000000000, "0123456789abcdef"}.token())
	f.Add(position{-1, "x"}.token())
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parseToken(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if again, err := parseToken(p.token()); err != nil || again != p {
			t.Fatalf("%q is %+v, whose token is %+v, %v", s, p, again, err)
		}
	})
}
