package wire

import (
	"fmt"
	"hash/crc32"
	"strings"
)

// Log makes the lines of one log, or checks them: they are numbered, and each has a checksum of itself and of all lines
// before it, so that none can be missing, changed or there twice.
type Log struct {
	Name  string
	Count uint64 // lines so far
	chain uint32
}

// Entry is a line of a log.
type Entry struct {
	Monotonic int64 // the guest's clock, in nanoseconds
	Detail    string
}

// logWord begins the lines of logs.
const logWord = "log "

// Next is the next line.
func (l *Log) Next(monotonic int64, detail string) string {
	line := fmt.Sprintf("%s%s %d %d %s", logWord, l.Name, l.Count, monotonic, detail)
	l.Count++
	l.chain = crc32.Update(l.chain, table, []byte(line))
	return fmt.Sprintf("%s %08x", line, l.chain)
}

// Logs checks the lines of several logs.
type Logs map[string]*Log

// Check checks a line; ok is false for one that is not of a log.
func (ls Logs) Check(line string) (name string, e Entry, ok bool, err error) {
	if !strings.HasPrefix(line, logWord) {
		return "", Entry{}, false, nil
	}
	var n uint64
	if _, err := fmt.Sscanf(line, logWord+"%s %d %d", &name, &n, &e.Monotonic); err != nil {
		return "", Entry{}, true, fmt.Errorf("log line %q: %w", line, err)
	}
	fields := strings.SplitN(line, " ", 5)
	cut := strings.LastIndexByte(line, ' ')
	e.Detail = strings.TrimSuffix(fields[len(fields)-1], line[cut:])
	l := ls[name]
	if l == nil {
		l = &Log{Name: name}
		ls[name] = l
	}
	if n != l.Count {
		return name, e, true, fmt.Errorf("log of %s: line %d comes where %d is due: %q", name, n, l.Count, line)
	}
	if want := l.Next(e.Monotonic, e.Detail); line != want {
		return name, e, true, fmt.Errorf("log of %s: %q comes where %q is due", name, line, want)
	}
	return name, e, true, nil
}
