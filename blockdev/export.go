package blockdev

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"github.com/cryovisor/cryovisor/internal/newfile"
)

// exportPiece is how much Export reads at a time, in bytes.
const exportPiece = 1 << 20

// Export writes all of a disk to a new file, a raw image, with mode 0600. Zeros become holes. progress, if not nil, is told how many
// bytes are done. Nothing has the name path before the image is complete and durable, and nothing is left after an error; one
// that wraps fs.ErrExist says that path is there already.
func Export(ctx context.Context, path string, src Device, progress func(done, total int64)) error {
	err := newfile.Create(path, func(f *os.File) error { return export(ctx, f, src, progress) })
	if err != nil {
		return fmt.Errorf("blockdev: export to %s: %w", path, err)
	}
	return nil
}

func export(ctx context.Context, f *os.File, src Device, progress func(done, total int64)) error {
	size := src.Size()
	if err := f.Truncate(size); err != nil {
		return err
	}
	buf, zeros := make([]byte, exportPiece), make([]byte, exportPiece)
	for off := int64(0); off < size; off += exportPiece {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(exportPiece, size-off)]
		if _, err := src.ReadAt(p, off); err != nil {
			return err
		}
		if !bytes.Equal(p, zeros[:len(p)]) {
			if _, err := f.WriteAt(p, off); err != nil {
				return err
			}
		}
		if progress != nil {
			progress(off+int64(len(p)), size)
		}
	}
	return nil
}
