// Package wire is what the lab's host and its init program say to each other: a Spec, handed over
// as a file in the initramfs, and a stream of frames, which the init program writes to a serial
// port.
package wire

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Places in the lab's file system.
const (
	SpecPath   = "/lab/spec.json" // the Spec, JSON
	ModulesDir = "/lab/modules"   // the lab's own kernel modules
	BinDir     = "/lab/bin"       // the binary that runs
	CacheDir   = "/lab/cache"     // kernels for guests, laid out as in the cache outside
	WorkDir    = "/lab/work"      // the binary's working directory
)

// Spec says what the init program does.
type Spec struct {
	Modules     []string // files in ModulesDir, in the order in which to load them
	Binary      string   // absolute path in the lab
	Args        []string // without the name of the binary
	Env         []string
	Dir         string // working directory
	MergeStderr bool   // standard error goes where standard output goes
}

// Status is how the binary ended.
type Status struct {
	Code   int    // exit code, when Signal is empty
	Signal string // name of the signal that killed it
	Number int    // number of that signal
}

// Kind is the type of a frame.
type Kind byte

// The kinds of frames, with what they carry.
const (
	Ready  Kind = 'R' // nothing: the binary is about to start
	Stdout Kind = 'O' // standard output
	Stderr Kind = 'E' // standard error
	Exit   Kind = 'X' // Status, JSON: the last frame
	Failed Kind = 'F' // text: the init program could not do its work; the last frame
)

// Quit is a byte that the outside sends to the init program: the time is up, the binary shall say
// what it is doing (SIGQUIT: a Go program prints its goroutines) and end.
const Quit = 'Q'

// preamble comes before the first frame: whatever the firmware or the kernel's probing wrote to
// the serial port before it is skipped.
const preamble = "cryovisor-lab\x00\x01\n"

// maxPayload is the longest payload of a frame, in bytes: its length has 16 bits.
const maxPayload = 1<<16 - 1

// headerLen is the length of a frame's header: kind, then length (little-endian).
const headerLen = 3

// ErrFrame means that the stream holds something that is not a frame.
var ErrFrame = errors.New("lab: not a frame")

// Writer writes frames. It is not safe for concurrent use.
type Writer struct{ w io.Writer }

// NewWriter writes the preamble and returns a Writer.
func NewWriter(w io.Writer) (*Writer, error) {
	if _, err := io.WriteString(w, preamble); err != nil {
		return nil, fmt.Errorf("lab: write preamble: %w", err)
	}
	return &Writer{w: w}, nil
}

// Write writes payload in as many frames of one kind as it takes, one if it is empty.
func (w *Writer) Write(kind Kind, payload []byte) error {
	for {
		n := min(len(payload), maxPayload)
		frame := make([]byte, headerLen, headerLen+n)
		frame[0] = byte(kind)
		binary.LittleEndian.PutUint16(frame[1:], uint16(n))
		if _, err := w.w.Write(append(frame, payload[:n]...)); err != nil {
			return fmt.Errorf("lab: write frame: %w", err)
		}
		if payload = payload[n:]; len(payload) == 0 {
			return nil
		}
	}
}

// WriteExit writes the frame that ends the stream of a binary that ran.
func (w *Writer) WriteExit(s Status) error {
	payload, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("lab: encode status: %w", err)
	}
	return w.Write(Exit, payload)
}

// ParseExit decodes the payload of an Exit frame.
func ParseExit(payload []byte) (Status, error) {
	var s Status
	if err := json.Unmarshal(payload, &s); err != nil {
		return Status{}, fmt.Errorf("%w: status: %w", ErrFrame, err)
	}
	return s, nil
}

// Reader reads frames. It is not safe for concurrent use.
type Reader struct {
	r      *bufio.Reader
	synced bool
	buf    [maxPayload]byte
}

// NewReader returns a Reader of the frames in r.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReader(r)} }

// Next returns the next frame; its payload is valid until the next call. At the end of the stream
// between two frames, or before the first, the error is io.EOF; within a frame it is
// io.ErrUnexpectedEOF; of an unknown kind it wraps ErrFrame.
func (r *Reader) Next() (Kind, []byte, error) {
	if err := r.sync(); err != nil {
		return 0, nil, err
	}
	var header [headerLen]byte
	if _, err := io.ReadFull(r.r, header[:]); err != nil {
		return 0, nil, err
	}
	kind := Kind(header[0])
	switch kind {
	case Ready, Stdout, Stderr, Exit, Failed:
	default:
		return 0, nil, fmt.Errorf("%w: kind %#x", ErrFrame, header[0])
	}
	payload := r.buf[:binary.LittleEndian.Uint16(header[1:])]
	if _, err := io.ReadFull(r.r, payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return kind, payload, nil
}

// sync reads up to the end of the preamble. The preamble's first byte occurs in it only once, so
// that after a mismatch only the byte that did not match can start it anew.
func (r *Reader) sync() error {
	for matched := 0; !r.synced; {
		b, err := r.r.ReadByte()
		if err != nil {
			return err
		}
		switch b {
		case preamble[matched]:
			matched++
		case preamble[0]:
			matched = 1
		default:
			matched = 0
		}
		r.synced = matched == len(preamble)
	}
	return nil
}
