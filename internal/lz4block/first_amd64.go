package lz4block

//go:generate go -C gen run . -out ../search_amd64.s -stubs ../search_amd64.go -pkg lz4block

// first makes the block as far as it can without care about the ends of dst and
// src, and returns whether it left a match.
func (b *block) first() bool {
	b.used, b.done, b.start, b.end, b.offset = search((*[1 << tableBits]uint16)(b.table), b.dst, b.src)
	return b.end != 0
}
