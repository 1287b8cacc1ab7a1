package blockdevtest

// extent is the bytes from off up to end.
type extent struct{ off, end int64 }

func (e extent) len() int64 { return e.end - e.off }

// clip returns what of e is within limit; its length is not positive if that is nothing.
func (e extent) clip(limit extent) extent {
	return extent{max(e.off, limit.off), min(e.end, limit.end)}
}

// blocks returns the whole blocks around e.
func (e extent) blocks() extent {
	return extent{e.off &^ (blockBytes - 1), (e.end + blockBytes - 1) &^ (blockBytes - 1)}
}

const pieceBytes = 64 << 10

// contents is sparse bytes, in pieces; what is not there is zeros.
type contents map[int64]*[pieceBytes]byte

// each calls do for the part of every piece that a range touches, with where in the range it begins.
func (c contents) each(e extent, do func(number int64, part extent, at int64)) {
	for at := e.off; at < e.end; {
		number := at / pieceBytes
		next := min(e.end, (number+1)*pieceBytes)
		do(number, extent{at - number*pieceBytes, next - number*pieceBytes}, at-e.off)
		at = next
	}
}

func (c contents) read(p []byte, off int64) {
	c.each(extent{off, off + int64(len(p))}, func(number int64, part extent, at int64) {
		to := p[at : at+part.len()]
		if piece := c[number]; piece != nil {
			copy(to, piece[part.off:part.end])
		} else {
			clear(to)
		}
	})
}

func (c contents) write(p []byte, off int64) {
	c.each(extent{off, off + int64(len(p))}, func(number int64, part extent, at int64) {
		if c[number] == nil {
			c[number] = new([pieceBytes]byte)
		}
		copy(c[number][part.off:part.end], p[at:])
	})
}

func (c contents) zero(e extent) {
	c.each(e, func(number int64, part extent, _ int64) {
		if piece := c[number]; piece != nil {
			clear(piece[part.off:part.end])
		}
	})
}

// cut makes everything from size on zeros.
func (c contents) cut(size int64) {
	for number := range c {
		c.zero(extent{max(size, number*pieceBytes), (number + 1) * pieceBytes})
	}
}

func (c contents) clone() contents {
	same := make(contents, len(c))
	for number, piece := range c {
		bytes := *piece
		same[number] = &bytes
	}
	return same
}
