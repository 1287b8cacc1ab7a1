package wire

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
)

type frame struct {
	kind    Kind
	payload string
}

// readAll returns the frames in stream and the error that ended it.
func readAll(stream []byte) ([]frame, error) {
	var frames []frame
	for r := NewReader(bytes.NewReader(stream)); ; {
		kind, payload, err := r.Next()
		if err != nil {
			return frames, err
		}
		frames = append(frames, frame{kind, string(payload)})
	}
}

// written returns the stream of the given frames.
func written(t testing.TB, frames ...frame) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := NewWriter(&buf)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range frames {
		if err := w.Write(f.kind, []byte(f.payload)); err != nil {
			t.Fatal(err)
		}
	}
	return buf.Bytes()
}

func TestRoundTrip(t *testing.T) {
	long := strings.Repeat("x", maxPayload+5)
	stream := written(t, frame{Ready, ""}, frame{Stdout, "a\x00b"}, frame{Stderr, long}, frame{Exit, "{}"})
	// A false start of the preamble, as a probed port may leave it.
	stream = append([]byte("\xff\x00cryocryovisor-labcc"), stream...)
	got, err := readAll(stream)
	if !errors.Is(err, io.EOF) {
		t.Fatalf("ended with %v, want io.EOF", err)
	}
	want := []frame{{Ready, ""}, {Stdout, "a\x00b"}, {Stderr, long[:maxPayload]}, {Stderr, "xxxxx"}, {Exit, "{}"}}
	if len(got) != len(want) {
		t.Fatalf("%d frames, want %d", len(got), len(want))
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("frame %d is %q, want %q", i, got[i], want[i])
		}
	}
}

func TestBrokenStreams(t *testing.T) {
	whole := written(t, frame{Stdout, "hello"})
	for name, tc := range map[string]struct {
		stream []byte
		want   error
	}{
		"empty":       {nil, io.EOF},
		"no preamble": {[]byte("console noise"), io.EOF},
		"in header":   {whole[:len(preamble)+2], io.ErrUnexpectedEOF},
		"no payload":  {whole[:len(preamble)+headerLen], io.ErrUnexpectedEOF},
		"in payload":  {whole[:len(whole)-1], io.ErrUnexpectedEOF},
		"kind":        {append([]byte(preamble), 'z', 0, 0), ErrFrame},
	} {
		if _, err := readAll(tc.stream); !errors.Is(err, tc.want) {
			t.Errorf("%s: ended with %v, want %v", name, err, tc.want)
		}
	}
}

func TestExitStatus(t *testing.T) {
	want := Status{Signal: "killed", Number: 9}
	var buf bytes.Buffer
	w, err := NewWriter(&buf)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WriteExit(want); err != nil {
		t.Fatal(err)
	}
	frames, _ := readAll(buf.Bytes())
	if len(frames) != 1 || frames[0].kind != Exit {
		t.Fatalf("frames %q, want one Exit", frames)
	}
	if got, err := ParseExit([]byte(frames[0].payload)); err != nil || got != want {
		t.Errorf("ParseExit = %+v, %v, want %+v", got, err, want)
	}
	if _, err := ParseExit([]byte("{")); !errors.Is(err, ErrFrame) {
		t.Errorf("ParseExit of a torn payload: %v, want ErrFrame", err)
	}
}

// FuzzReader: what the Reader accepts, the Writer writes again as the same frames.
func FuzzReader(f *testing.F) {
	f.Add(written(f, frame{Ready, ""}, frame{Stdout, "out"}, frame{Exit, `{"Code":3}`}))
	f.Add([]byte(preamble + "O\xff\xffshort"))
	f.Add([]byte("noise"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		frames, err := readAll(stream)
		if err == nil {
			t.Fatal("the stream has no end")
		}
		again, err := readAll(written(t, frames...))
		if !errors.Is(err, io.EOF) || len(again) != len(frames) {
			t.Fatalf("%d frames and %v, want %d and io.EOF", len(again), err, len(frames))
		}
		for i := range frames {
			if again[i] != frames[i] {
				t.Fatalf("frame %d is %q, want %q", i, again[i], frames[i])
			}
		}
	})
}
