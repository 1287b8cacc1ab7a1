package blockdev_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/blockdev/blockdevtest"
	"github.com/cryovisor/cryovisor/snapshot"
)

// overlayOn makes an overlay in a file, over a disk with the given content.
func overlayOn(t *testing.T, lower blockdev.Device, under []byte, opts blockdev.OverlayOptions) blockdevtest.Disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "overlay")
	o, err := blockdev.CreateOverlay(path, lower, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() }) // the suite may have closed it
	content := make([]byte, opts.Size)
	copy(content, under)
	return blockdevtest.Disk{Device: o, Content: content, Reopen: func(t *testing.T) blockdev.Device {
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		if o, err = blockdev.OpenOverlay(path, lower); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { o.Close() })
		return o
	}}
}

// overlaySizes are of the disk and of what is below it: blocks that are cut short by the end of either, and of both.
var overlaySizes = []struct{ size, below int64 }{{64 << 10, 64 << 10}, {2<<20 + 512, 2<<20 + 512}, {2 << 20, 1<<20 + 1536}, {1<<20 + 512, 0}}

func TestOverlayConformance(t *testing.T) {
	for _, s := range overlaySizes {
		for _, block := range []int{4096, 64 << 10} {
			t.Run(fmt.Sprintf("%d over %d by %d", s.size, s.below, block), func(t *testing.T) {
				blockdevtest.Run(t, func(t *testing.T) blockdevtest.Disk {
					opts := blockdev.OverlayOptions{Size: s.size, BlockSize: block}
					if s.below == 0 {
						return overlayOn(t, nil, nil, opts)
					}
					lower := rawDisk(t, int(s.below), blockdev.Options{ReadOnly: true})
					return overlayOn(t, lower.Device, lower.Content, opts)
				})
			})
		}
	}
}

func TestOverlayFaults(t *testing.T) {
	for _, s := range []struct{ size, below int64 }{{128 << 10, 128 << 10}, {96<<10 + 512, 60<<10 + 512}} {
		t.Run(fmt.Sprintf("%d over %d", s.size, s.below), func(t *testing.T) {
			lower := rawDisk(t, int(s.below), blockdev.Options{ReadOnly: true})
			closing := func(t *testing.T, o *blockdev.Overlay, err error) (blockdev.Device, error) {
				if err != nil {
					return nil, err
				}
				t.Cleanup(func() { o.Close() }) // what it lies in may have crashed
				return o, nil
			}
			blockdevtest.RunFaults(t, func(t *testing.T, m *blockdevtest.Medium) blockdevtest.Disk {
				o, err := blockdev.NewOverlayIn(m, lower.Device, blockdev.OverlayOptions{Size: s.size})
				d, err := closing(t, o, err)
				if err != nil {
					t.Fatal(err)
				}
				content := make([]byte, s.size)
				copy(content, lower.Content)
				return blockdevtest.Disk{Device: d, Content: content}
			}, func(t *testing.T, m *blockdevtest.Medium) (blockdev.Device, error) {
				o, err := blockdev.OpenOverlayIn(m, lower.Device)
				return closing(t, o, err)
			})
		})
	}
}

// history is snapshots of a disk, each a diff of the one before it.
type history struct {
	content []byte // of the last
	disk    *snapshot.DiskReader
}

// newHistory makes as many generations of a disk as depth says, over a base image.
func newHistory(t *testing.T, depth int, size int64, below blockdevtest.Disk) history {
	t.Helper()
	ctx := context.Background()
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	store, err := snapshot.OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h := history{content: make([]byte, size)}
	copy(h.content, below.Content)
	var parent *snapshot.Reader
	rnd := rand.New(rand.NewPCG(uint64(depth), uint64(size)))
	for range depth {
		lower := below.Device
		if parent != nil {
			lower = blockdev.NewLayer(parent.Disk(0), below.Device, size, 0)
		}
		o := overlayOn(t, lower, h.content, blockdev.OverlayOptions{Size: size}).Device.(*blockdev.Overlay)
		h.scribble(t, o, rnd)
		id, err := freeze(ctx, store, o, parent, key)
		if err != nil {
			t.Fatal(err)
		}
		if parent, err = store.Open(ctx, id, key); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { parent.Close() })
	}
	h.disk = parent.Disk(0)
	return h
}

// scribble changes a disk and the content that it must have.
func (h *history) scribble(t *testing.T, d blockdev.Device, rnd *rand.Rand) {
	t.Helper()
	for range 30 {
		off := rnd.Int64N(int64(len(h.content)))
		part := h.content[off:min(int64(len(h.content)), off+1+rnd.Int64N(20000))]
		var err error
		if rnd.IntN(3) == 0 {
			clear(part)
			err = d.Discard(off, int64(len(part)))
		} else {
			part[rnd.IntN(len(part))] ^= byte(1 + rnd.IntN(255))
			_, err = d.WriteAt(part, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// freeze stores the changes of an overlay as a diff.
func freeze(
	ctx context.Context, store *snapshot.Store, o *blockdev.Overlay, parent *snapshot.Reader, key *age.X25519Identity,
) (snapshot.ID, error) {
	w, err := store.Create(ctx, snapshot.Options{Recipients: []age.Recipient{key.Recipient()}, Parent: parent})
	if err != nil {
		return snapshot.ID{}, err
	}
	defer w.Abort() //nolint:errcheck // it does nothing after a Commit
	if err := w.WriteMemory(ctx, snapshot.PageSize, nil, nil); err != nil {
		return snapshot.ID{}, err
	}
	d := snapshot.Disk{Size: uint64(o.Size()), Layered: true, ReadAt: o.ReadAt}
	data, zeros := o.Changes()
	for _, e := range data {
		d.Data = append(d.Data, snapshot.Range{GPA: uint64(e.Off), Len: uint64(e.Len)})
	}
	for _, e := range zeros {
		d.Zeros = append(d.Zeros, snapshot.Range{GPA: uint64(e.Off), Len: uint64(e.Len)})
	}
	if err := w.WriteDisk(ctx, d); err != nil {
		return snapshot.ID{}, err
	}
	info, err := w.Commit(ctx)
	return info.ID, err
}

// TestStackConformance: a disk over a history of snapshots of any depth, over an image.
func TestStackConformance(t *testing.T) {
	for _, depth := range []int{1, 2, 16} {
		for _, size := range []int64{1 << 20, 1<<20 + 512} {
			below := rawDisk(t, 700<<10+512, blockdev.Options{ReadOnly: true})
			h := newHistory(t, depth, size, below)
			// A cache of one chunk, so that it gives up what another reader may be reading.
			layer := func() *blockdev.Layer { return blockdev.NewLayer(h.disk, below.Device, size, 1) }
			t.Run(fmt.Sprintf("depth %d, %d bytes", depth, size), func(t *testing.T) {
				blockdevtest.Run(t, func(t *testing.T) blockdevtest.Disk {
					return overlayOn(t, layer(), h.content, blockdev.OverlayOptions{Size: size})
				})
			})
			t.Run(fmt.Sprintf("depth %d, %d bytes, read-only", depth, size), func(t *testing.T) {
				blockdevtest.RunReadOnly(t, func(t *testing.T) blockdevtest.Disk {
					return blockdevtest.Disk{Device: layer(), Content: slices.Clone(h.content)}
				})
			})
		}
	}
}

// TestOverlayFile: what a file must be to be opened, and who may.
func TestOverlayFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "overlay")
	opts := blockdev.OverlayOptions{Size: 1 << 20, Lower: blockdev.Lower{
		Kind: "image", Name: "/somewhere", Identity: blockdev.Identity{Size: 512, SHA256: [32]byte{1, 2, 3}},
	}}
	o, err := blockdev.CreateOverlay(path, nil, opts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt([]byte("something"), 1<<20-9); err != nil {
		t.Fatal(err)
	}
	if _, err := blockdev.CreateOverlay(path, nil, opts); !errors.Is(err, os.ErrExist) {
		t.Errorf("made twice: %v", err)
	}
	if _, err := blockdev.OpenOverlay(path, nil); !errors.Is(err, blockdev.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	info, err := blockdev.ReadOverlay(path)
	if err != nil || info.Size != opts.Size || info.BlockSize != 4096 || info.Lower != opts.Lower {
		t.Errorf("%+v, %v", info, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt([]byte{1}, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("written when it was closed: %v", err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(b []byte) []byte
		want   error
	}{
		"empty":     {func([]byte) []byte { return nil }, blockdev.ErrOverlay},
		"short":     {func(b []byte) []byte { return b[:5000] }, blockdev.ErrOverlay},
		"a picture": {func(b []byte) []byte { return append([]byte("\x89PNG"), b[4:]...) }, blockdev.ErrOverlay},
		"newer":     {func(b []byte) []byte { b[8] = 2; return b }, blockdev.ErrVersion},
		"bit":       {func(b []byte) []byte { b[24] ^= 1; return b }, blockdev.ErrOverlay},
		"map":       {func(b []byte) []byte { b[4096] = 3; return b }, blockdev.ErrOverlay},
	} {
		if err := os.WriteFile(path, c.change(slices.Clone(good)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := blockdev.OpenOverlay(path, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOverlayRefuses(t *testing.T) {
	lower := rawDisk(t, 64<<10, blockdev.Options{ReadOnly: true}).Device
	for name, opts := range map[string]blockdev.OverlayOptions{
		"no size":        {},
		"odd size":       {Size: 1<<20 + 1},
		"too small":      {Size: 32 << 10},
		"too large":      {Size: 1 << 49},
		"odd block":      {Size: 1 << 20, BlockSize: 5000},
		"small block":    {Size: 1 << 20, BlockSize: 512},
		"negative block": {Size: 1 << 20, BlockSize: -4096},
		"large block":    {Size: 1 << 20, BlockSize: 128 << 10},
		"long kind":      {Size: 1 << 20, Lower: blockdev.Lower{Kind: "a kind that is too long"}},
		"long name":      {Size: 1 << 20, Lower: blockdev.Lower{Name: string(make([]byte, 3000))}},
	} {
		path := filepath.Join(t.TempDir(), "overlay")
		if _, err := blockdev.CreateOverlay(path, lower, opts); !errors.Is(err, blockdev.ErrNotDisk) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: a file is left: %v", name, err)
		}
	}
}

// TestOverlaySpace: the file takes the space of what is in it, and no more.
func TestOverlaySpace(t *testing.T) {
	const size = 1 << 40
	o := overlayOnNothing(t, size)
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i)
	}
	if _, err := o.WriteAt(data, size/2); err != nil {
		t.Fatal(err)
	}
	if err := o.Discard(0, size/4); err != nil {
		t.Fatal(err)
	}
	got, zeros := o.Changes()
	if !slices.Equal(got, []blockdev.Extent{{Off: size / 2, Len: 1 << 20}}) || !slices.Equal(zeros, []blockdev.Extent{{Off: 0, Len: size / 4}}) {
		t.Errorf("changes are %v and %v", got, zeros)
	}
	full := 512 * blocks(t, o.Path())
	if full < 1<<20 || full > 2<<20 {
		t.Errorf("1 MiB takes %d bytes", full)
	}
	if err := o.Discard(size/2, 1<<20); err != nil {
		t.Fatal(err)
	}
	if left := 512 * blocks(t, o.Path()); left > full-1<<20 {
		t.Errorf("of %d bytes, %d are left", full, left)
	}
}

func overlayOnNothing(t *testing.T, size int64) *blockdev.Overlay {
	t.Helper()
	o, err := blockdev.CreateOverlay(filepath.Join(t.TempDir(), "overlay"), nil, blockdev.OverlayOptions{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := o.Remove(); err != nil {
			t.Error(err)
		}
	})
	return o
}

// FuzzOverlay opens any bytes as an overlay, and reads it.
func FuzzOverlay(f *testing.F) {
	m := blockdevtest.NewMedium()
	o, err := blockdev.NewOverlayIn(m, nil, blockdev.OverlayOptions{Size: 64 << 10})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := o.WriteAt([]byte("something"), 5000); err != nil {
		f.Fatal(err)
	}
	if err := o.Flush(); err != nil {
		f.Fatal(err)
	}
	head := make([]byte, 8192)
	if _, err := m.ReadAt(head, 0); err != nil {
		f.Fatal(err)
	}
	f.Add(head[:4096], head[4096:], false)
	f.Fuzz(func(t *testing.T, header, rest []byte, seal bool) {
		m := blockdevtest.NewMedium()
		if seal && len(header) == 4096 {
			header = blockdev.SealOverlayHeader(header)
		}
		if _, err := m.WriteAt(header, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := m.WriteAt(rest, 4096); err != nil {
			t.Fatal(err)
		}
		if err := m.Truncate(1 << 20); err != nil {
			t.Fatal(err)
		}
		o, err := blockdev.OpenOverlayIn(m, nil)
		if err != nil {
			if !errors.Is(err, blockdev.ErrOverlay) && !errors.Is(err, blockdev.ErrVersion) && !errors.Is(err, blockdev.ErrNotDisk) {
				t.Fatal(err)
			}
			return
		}
		p := make([]byte, min(o.Size(), 1<<20))
		for _, off := range []int64{0, o.Size() - int64(len(p))} {
			if _, err := o.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		_, _ = o.Changes()
	})
}
