// Package wire is how the guest program and the tests that boot it talk: lines over the console, each with a checksum,
// among the lines of the kernel.
package wire

import (
	"fmt"
	"hash/crc32"
	"strings"
)

// mark begins the lines of the guest program; those of the kernel have another beginning.
const mark = "#"

var table = crc32.MakeTable(crc32.Castagnoli)

// Line is text, which has no line end in it, as a line with its end.
func Line(text string) string {
	return fmt.Sprintf("%s%08x %s\n", mark, crc32.Checksum([]byte(text), table), text)
}

// Parse is the text of a line without its end. ok is false for a line that Line did not make, or that was damaged.
func Parse(line string) (text string, ok bool) {
	rest, found := strings.CutPrefix(strings.TrimSuffix(line, "\r"), mark)
	sum, text, cut := strings.Cut(rest, " ")
	if !found || !cut || sum != fmt.Sprintf("%08x", crc32.Checksum([]byte(text), table)) {
		return "", false
	}
	return text, true
}
