package lifecycle

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"github.com/cryovisor/cryovisor/snapshot"
)

// The section in which a sandbox's snapshots have what its guest has written to its console: the offset of the first byte in all that it
// has written, as 8 bytes, little-endian, and the bytes. Whoever does not know it can do without.
const (
	consoleSection = "lifecycle/console"
	consoleVersion = 1
	// maxConsole is how much of that is kept, in bytes.
	maxConsole = 64 << 10
)

// console keeps the end of a guest's output. Its methods may be called from several goroutines.
type console struct {
	next io.Writer // what the embedder wants it to go to as well, or nil

	mu     sync.Mutex
	offset int64 // of text[0] in all of the output
	text   []byte
}

// restore goes on from a section of a snapshot, if that has one.
func (c *console) restore(section func(name string) (snapshot.Section, error)) {
	s, err := section(consoleSection)
	if err != nil || s.Version != consoleVersion {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if offset, text, err := parseConsole(s.Data); err == nil {
		c.offset, c.text = offset, append([]byte(nil), text...) // clones share the section
	}
}

func parseConsole(b []byte) (offset int64, text []byte, err error) {
	if len(b) < 8 || len(b) > 8+maxConsole || binary.LittleEndian.Uint64(b) > 1<<62 {
		return 0, nil, fmt.Errorf("%w: console of %d bytes", snapshot.ErrFormat, len(b))
	}
	return int64(binary.LittleEndian.Uint64(b)), b[8:], nil
}

// Write implements io.Writer.
func (c *console) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.text = append(c.text, b...)
	if over := len(c.text) - maxConsole; over > 0 {
		c.text = append(c.text[:0], c.text[over:]...)
		c.offset += int64(over)
	}
	c.mu.Unlock()
	if c.next == nil {
		return len(b), nil
	}
	return c.next.Write(b)
}

// end is what is kept, and its offset.
func (c *console) end() (offset int64, text []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.offset, append([]byte(nil), c.text...)
}

func (c *console) sections() ([]snapshot.Section, error) {
	offset, text := c.end()
	data := append(binary.LittleEndian.AppendUint64(nil, uint64(offset)), text...)
	return []snapshot.Section{{Name: consoleSection, Version: consoleVersion, Data: data}}, nil
}
