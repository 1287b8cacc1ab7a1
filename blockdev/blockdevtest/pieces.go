package blockdevtest

import "math/rand/v2"

const blockBytes = 4096

// closeBytes is the length of what cutClose cuts.
const closeBytes = 6 * blockBytes

// cutClose cuts a range, which begins at a block, so that several pieces share a sector, several share a block, and some
// reach over whole blocks.
func cutClose(rng *rand.Rand, in extent) []extent {
	var pieces []extent
	for at := in.off; at < in.end; {
		block := (at - in.off) / blockBytes
		blockEnd := in.off + (block+1)*blockBytes
		var n int64
		switch block % 6 {
		case 0:
			n = 1 + rng.Int64N(300)
		case 3:
			n = 1 + rng.Int64N(1500)
		default:
			n = blockEnd - at + blockBytes*rng.Int64N(2)
		}
		pieces = append(pieces, extent{at, min(at+n, in.end)})
		at += n
	}
	return pieces
}

// cutBlocks cuts a range, which begins at a block, into blocks.
func cutBlocks(in extent) []extent {
	var pieces []extent
	for at := in.off; at < in.end; at += blockBytes {
		pieces = append(pieces, extent{at, min(at+blockBytes, in.end)})
	}
	return pieces
}

// cutWide cuts all of a disk, at any alignment, into 8 pieces or more.
func cutWide(rng *rand.Rand, size int64) []extent {
	var pieces []extent
	for at := int64(0); at < size; {
		n := 1 + rng.Int64N(size/8)
		if rng.IntN(4) > 0 {
			n = 1 + rng.Int64N(min(size/8, 10*blockBytes))
		}
		pieces = append(pieces, extent{at, min(at+n, size)})
		at += n
	}
	return pieces
}

// divide gives each of n models, which share the slices of whole, some of pieces, which are a range in its order and at
// least n. The last of them has what is outside of that range too.
func divide(rng *rand.Rand, whole *model, pieces []extent, n int) []*model {
	models := make([]*model, n)
	for i := range models {
		models[i] = &model{now: whole.now, kept: whole.kept}
	}
	rest := models[n-1]
	first, last := extent{0, pieces[0].off}, extent{pieces[len(pieces)-1].end, int64(len(whole.now))}
	for _, e := range []extent{first, last} {
		if e.len() > 0 {
			rest.own = append(rest.own, e)
		}
	}
	owner := 0
	for i, e := range pieces {
		if i < n {
			owner = i // so that each has a piece
		} else {
			owner = (owner + 1 + rng.IntN(n-1)) % n // neighbours have different ones
		}
		models[owner].own = append(models[owner].own, e)
	}
	return models
}
