//go:build !amd64

package lz4block

// first finds the first match.
func (b *block) first() bool { return b.find() }
