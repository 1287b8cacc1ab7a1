package blockdev

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// Identity says what an image holds.
type Identity struct {
	Size   int64    // in bytes
	SHA256 [32]byte // of the digests of its pieces and its size; docs/FORMAT.md, "Disks"
}

// identityPiece is the size of the pieces of which an Identity is made, in bytes.
const identityPiece = 1 << 20

// Identify reads all of a disk, by as many goroutines as there are processors, and says what is on it. It is for base
// images, which don't change.
func Identify(ctx context.Context, d Device) (Identity, error) {
	size := d.Size()
	digests := make([][sha256.Size]byte, (size+identityPiece-1)/identityPiece)
	zeros := make([]byte, identityPiece)
	ofZeros := sha256.Sum256(zeros)
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(runtime.GOMAXPROCS(0), len(digests)) {
		g.Go(func() error {
			p := make([]byte, identityPiece)
			for i := next.Add(1) - 1; i < int64(len(digests)); i = next.Add(1) - 1 {
				if err := ctx.Err(); err != nil {
					return err
				}
				p := p[:min(identityPiece, size-i*identityPiece)]
				if _, err := d.ReadAt(p, i*identityPiece); err != nil {
					return err
				}
				// Images are mostly holes, and comparing is many times faster.
				if len(p) == identityPiece && bytes.Equal(p, zeros) {
					digests[i] = ofZeros
				} else {
					digests[i] = sha256.Sum256(p)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return Identity{}, err
	}
	sum := sha256.New()
	for _, digest := range digests {
		sum.Write(digest[:])
	}
	sum.Write(binary.LittleEndian.AppendUint64(nil, uint64(size)))
	return Identity{size, [sha256.Size]byte(sum.Sum(nil))}, nil
}
