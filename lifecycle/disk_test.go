//go:build linux && amd64

package lifecycle_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/blockdev/qcow2"
	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
)

// diskModel is what must be on a machine's disk.
type diskModel struct {
	name    string
	content []byte
}

func (d *diskModel) clone() *diskModel { return &diskModel{d.name, slices.Clone(d.content)} }

// change does to the machine's disk, and to the model, what a guest may do.
func (d *diskModel) change(t *testing.T, m *lifecycle.Machine, rnd *rand.Rand) {
	t.Helper()
	dev := m.DiskDevice(d.name)
	for range 40 {
		off := rnd.Int64N(int64(len(d.content)))
		n := min(1+rnd.Int64N(1<<rnd.IntN(18)), int64(len(d.content))-off)
		part := d.content[off : off+n]
		var err error
		switch rnd.IntN(5) {
		case 0:
			clear(part)
			err = dev.Discard(off, n)
		case 1:
			clear(part)
			err = dev.WriteZeroes(off, n)
		default:
			for i := range part {
				part[i] = byte(rnd.Uint32())
			}
			_, err = dev.WriteAt(part, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (d *diskModel) check(t *testing.T, dev blockdev.Device) {
	t.Helper()
	got := make([]byte, len(d.content))
	if dev.Size() != int64(len(got)) {
		t.Fatalf("disk %q has %d bytes, want %d", d.name, dev.Size(), len(got))
	}
	if _, err := dev.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, d.content) {
		for i := range got {
			if got[i] != d.content[i] {
				t.Fatalf("disk %q differs from byte %d on: %#x, want %#x", d.name, i, got[i], d.content[i])
			}
		}
	}
}

func testRand(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("seed", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

// newImage makes a raw image with something in it.
func newImage(t *testing.T, rnd *rand.Rand, size int) (string, []byte) {
	t.Helper()
	content := make([]byte, size)
	for i := 0; i < size; i += 8192 { // half of it
		for j := i; j < min(i+4096, size); j++ {
			content[j] = byte(rnd.Uint32())
		}
	}
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, content, 0o400); err != nil {
		t.Fatal(err)
	}
	return path, content
}

// diskGuest is a guest with a disk on a raw image, one on a smaller qcow2 image, and one that is blank.
func diskGuest(t *testing.T) (*guest, []*diskModel, *rand.Rand) {
	t.Helper()
	g, rnd := newGuest(t, testvm.WorkerConfig{Memory: 16 << 20}), testRand(t)
	raw, rawContent := newImage(t, rnd, 3<<20+512)
	other, otherContent := newImage(t, rnd, 1<<20)
	src, err := blockdev.OpenFile(other, blockdev.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	cow := filepath.Join(t.TempDir(), "image.qcow2")
	if err := errors.Join(qcow2.Write(t.Context(), cow, src), src.Close()); err != nil {
		t.Fatal(err)
	}
	g.disks = lifecycle.Disks{Dir: filepath.Join(t.TempDir(), "disks"), Boot: []lifecycle.Disk{
		{Name: "raw", Image: raw}, {Name: "larger", Image: cow, Size: 2 << 20}, {Name: "blank", Size: 1<<20 + 4096},
	}}
	return g, []*diskModel{
		{"raw", rawContent}, {"larger", append(otherContent, make([]byte, 1<<20)...)}, {"blank", make([]byte, 1<<20+4096)},
	}, rnd
}

// overlays are the files with changes that are in the directory for disks.
func overlays(t *testing.T, g *guest) []string {
	t.Helper()
	return slices.DeleteFunc(files(t, g.disks.Dir), func(f string) bool { return filepath.Ext(f) != ".overlay" })
}

func checkDisks(t *testing.T, m *lifecycle.Machine, models []*diskModel) {
	t.Helper()
	for _, d := range models {
		d.check(t, m.DiskDevice(d.name))
	}
}

// TestDisksFreeze lets the disks of a guest change between many pauses, and goes back to every one of them.
func TestDisksFreeze(t *testing.T) {
	checkLeaks(t)
	g, models, rnd := diskGuest(t)
	m := g.boot(t, testvm.NoLimit)
	checkDisks(t, m, models)
	type moment struct {
		id     snapshot.ID
		models []*diskModel
	}
	var moments []moment
	for n := range 17 {
		g.work(t, m, 2)
		for _, d := range models {
			if n%3 != 2 { // sometimes nothing changes
				d.change(t, m, rnd)
			}
		}
		p := g.pause(t, m)
		if n%3 == 2 && (p.DiskBytes != 0 || p.DiskBlocks != 0) {
			t.Errorf("disks that have not changed: %d bytes looked at, %d blocks stored", p.DiskBytes, p.DiskBlocks)
		}
		checkDisks(t, m, models)
		closeMachine(t, m)
		if left := overlays(t, g); len(left) > 0 {
			t.Fatalf("a pause leaves %q", left)
		}
		now := moment{id: p.ID}
		for _, d := range models {
			now.models = append(now.models, d.clone())
		}
		moments = append(moments, now)
		m = g.resume(t, p.ID, n%2 == 0, testvm.NoLimit)
		checkDisks(t, m, models)
	}
	g.work(t, m, 2)
	closeMachine(t, m)
	for _, then := range moments {
		m := g.resume(t, then.id, false, testvm.NoLimit)
		checkDisks(t, m, then.models)
		closeMachine(t, m)
	}
	// What is read of the oldest ancestors and of the copy is the same.
	r := g.open(t, moments[len(moments)-1].id)
	info, err := g.store.Flatten(t.Context(), r, snapshot.Options{Recipients: []age.Recipient{g.key.Recipient()}})
	if err != nil {
		t.Fatal(err)
	}
	for _, old := range moments {
		if err := g.store.Delete(t.Context(), old.id); err != nil {
			t.Fatal(err)
		}
	}
	m = g.resume(t, info.ID, false, testvm.NoLimit)
	checkDisks(t, m, models)
	closeMachine(t, m)
}

func (g *guest) open(t *testing.T, id snapshot.ID) *snapshot.Reader {
	t.Helper()
	r, err := g.store.Open(t.Context(), id, g.key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// TestDisksOfClones: machines that go on from one snapshot don't see each other's disks; a full snapshot of one depends on no other.
func TestDisksOfClones(t *testing.T) {
	checkLeaks(t)
	g, models, rnd := diskGuest(t)
	m := g.boot(t, testvm.NoLimit)
	models[0].change(t, m, rnd)
	models[1].change(t, m, rnd)
	first := g.pause(t, m).ID
	closeMachine(t, m)
	var last snapshot.ID
	var want []*diskModel
	for range 2 {
		clone := g.resume(t, first, false, testvm.NoLimit)
		want = nil
		for _, d := range models {
			d = d.clone()
			d.check(t, clone.DiskDevice(d.name))
			d.change(t, clone, rnd)
			want = append(want, d)
		}
		defer checkDisks(t, clone, want)
		p, err := clone.Pause(t.Context(), g.store, lifecycle.PauseOptions{Recipients: []age.Recipient{g.key.Recipient()}, Full: true})
		if err != nil {
			t.Fatal(err)
		}
		last = p.ID
	}
	again := g.resume(t, last, false, testvm.NoLimit)
	checkDisks(t, again, want)
	closeMachine(t, again)
}

// TestDiskImageIsChecked: a base image may move, and must not be another.
func TestDiskImageIsChecked(t *testing.T) {
	checkLeaks(t)
	g, models, rnd := diskGuest(t)
	m := g.boot(t, testvm.NoLimit)
	models[0].change(t, m, rnd)
	id := g.pause(t, m).ID
	closeMachine(t, m)

	image := g.disks.Boot[0].Image
	moved := filepath.Join(t.TempDir(), "moved")
	if err := os.Rename(image, moved); err != nil {
		t.Fatal(err)
	}
	resume := func() error {
		m, err := lifecycle.Resume(t.Context(), g.store, id, lifecycle.ResumeOptions{
			Identities: []age.Identity{g.key}, Hardware: g.hardware(testvm.NoLimit), Disks: g.disks, Eager: true,
		})
		if err == nil {
			checkDisks(t, m, models)
			closeMachine(t, m)
		}
		if left := overlays(t, g); len(left) > 0 {
			t.Fatalf("a resume leaves %q", left)
		}
		return err
	}
	if err := resume(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without its image: %v", err)
	}
	g.disks.Images = map[string]string{"raw": moved}
	if err := resume(); err != nil {
		t.Errorf("with its image at another place: %v", err)
	}
	g.disks.Images["blank"] = moved
	if err := resume(); !errors.Is(err, blockdev.ErrNotDisk) {
		t.Errorf("with an image for a disk that has none: %v", err)
	}
	g.disks.Images = map[string]string{"raw": moved, "other": moved}
	if err := resume(); err == nil {
		t.Error("with an image for a disk that there is none of: no error")
	}
	delete(g.disks.Images, "other")

	content, err := os.ReadFile(moved)
	if err != nil {
		t.Fatal(err)
	}
	content[len(content)-1] ^= 1
	for name, changed := range map[string][]byte{"changed": content, "longer": append(content, make([]byte, 512)...)} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		g.disks.Images["raw"] = path
		err := resume()
		if wrong, is := errors.AsType[*blockdev.BaseError](err); !is || !errors.Is(err, blockdev.ErrBase) || wrong.Path != path {
			t.Errorf("with an image that is %s: %v", name, err)
		}
	}
}

// TestDiskChangesStay: what a machine has written, and no pause has stored, is in its overlay, which can be exported or gone on with.
func TestDiskChangesStay(t *testing.T) {
	checkLeaks(t)
	g, models, rnd := diskGuest(t)
	boot := g.disks.Boot
	m := g.boot(t, testvm.NoLimit)
	for _, d := range models {
		d.change(t, m, rnd)
	}
	closeMachine(t, m) // as if its guest had powered off
	left := overlays(t, g)
	if len(left) != len(models) {
		t.Fatalf("left are %q", left)
	}
	for i, d := range models {
		path := left[slices.IndexFunc(left, func(f string) bool { return filepath.Base(f)[:len(d.name)+1] == d.name+"-" })]
		g.disks.Boot[i] = lifecycle.Disk{Name: d.name, Overlay: path}
	}
	m = g.boot(t, testvm.NoLimit)
	checkDisks(t, m, models)
	models[0].change(t, m, rnd)
	id := g.pause(t, m).ID
	closeMachine(t, m)
	if left := overlays(t, g); len(left) > 0 {
		t.Fatalf("a pause leaves %q", left)
	}

	g.disks.Boot = boot
	m = g.resume(t, id, false, testvm.NoLimit)
	before := models[1].clone()
	models[1].change(t, m, rnd)
	closeMachine(t, m)
	if left = overlays(t, g); len(left) != 1 {
		t.Fatalf("one disk was written to, left are %q", left)
	}
	opts := lifecycle.OpenDiskOptions{Store: g.store, Identities: []age.Identity{g.key}, Dir: g.disks.Dir}
	overlay, err := lifecycle.OpenOverlay(t.Context(), left[0], opts)
	if err != nil {
		t.Fatal(err)
	}
	models[1].check(t, overlay)
	exported := filepath.Join(t.TempDir(), "exported")
	if err := errors.Join(blockdev.Export(t.Context(), exported, overlay, nil), overlay.Close()); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(exported); err != nil || !bytes.Equal(b, models[1].content) {
		t.Errorf("the exported disk differs: %v", err)
	}
	disk, err := lifecycle.OpenDisk(t.Context(), g.open(t, id), before.name, opts)
	if err != nil {
		t.Fatal(err)
	}
	before.check(t, disk)
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
	if _, err := lifecycle.OpenDisk(t.Context(), g.open(t, id), "other", opts); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("a disk that there is none of: %v", err)
	}
}

// TestDiskPauseFails: a pause that fails leaves the disks as they are, and the next one has all of their changes.
func TestDiskPauseFails(t *testing.T) {
	checkLeaks(t)
	g, models, rnd := diskGuest(t)
	m := g.boot(t, testvm.NoLimit)
	for _, d := range models {
		d.change(t, m, rnd)
	}
	for i := range 4 {
		ctx, cancel := context.WithCancel(t.Context())
		_, err := m.Pause(ctx, g.store, lifecycle.PauseOptions{
			Recipients: []age.Recipient{g.key.Recipient()},
			Progress: func(done, total uint64) {
				if done >= total-uint64(i)<<20 { // while disks are being written
					cancel()
				}
			},
		})
		cancel()
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		checkDisks(t, m, models)
		models[i%3].change(t, m, rnd)
	}
	id := g.pause(t, m).ID
	closeMachine(t, m)
	m = g.resume(t, id, false, testvm.NoLimit)
	checkDisks(t, m, models)
	closeMachine(t, m)
}

// TestDisksSection: what docs/FORMAT.md, "Disks", says of the section, rule by rule.
func TestDisksSection(t *testing.T) {
	const sum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	disk := func(fields string) string { return `[{"name":"root","size":1048576` + fields + `}]` }
	base := func(fields string) string { return disk(`,"base":{"path":"/a",` + fields + `}`) }
	many := func(n int) string {
		var out []string
		for i := range n {
			out = append(out, fmt.Sprintf(`{"name":"d%d","size":512}`, i))
		}
		return "[" + strings.Join(out, ",") + "]"
	}
	for _, good := range []string{
		"[]", disk(""), many(15), base(`"size":1048576,"sha256":"` + sum + `"`), `[{"name":"A-z_.9","size":281474976710656}]`,
	} {
		if _, err := lifecycle.ParseDisks([]byte(good)); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", "null", "{}", `"root"`, "[null]", disk("") + "[]", disk("") + "x", many(16), disk(`,"serial":"1"`),
		`[{"name":"root","size":512},{"name":"root","size":512}]`, `[{"size":512}]`, `[{"name":"","size":512}]`,
		`[{"name":"ro ot","size":512}]`, `[{"name":"` + strings.Repeat("r", 33) + `","size":512}]`, `[{"name":"root"}]`,
		`[{"name":"root","size":0}]`, `[{"name":"root","size":-512}]`, `[{"name":"root","size":513}]`,
		`[{"name":"root","size":281474976711168}]`, `[{"name":"root","size":"512"}]`, disk(`,"base":[]`),
		base(`"size":1048577,"sha256":"` + sum + `"`), base(`"size":0,"sha256":"` + sum + `"`), base(`"size":512`),
		base(`"size":512,"sha256":"` + sum[2:] + `"`), base(`"size":512,"sha256":"` + sum + `00"`),
		base(`"size":512,"sha256":"` + strings.ToUpper(sum) + `"`), base(`"size":512,"sha256":"` + sum + `","mode":1`),
	} {
		if disks, err := lifecycle.ParseDisks([]byte(bad)); err == nil {
			t.Errorf("%s: %+v", bad, disks)
		}
	}
}

// TestDisksOfAnotherVersion: what a later version may say of disks is not taken for damage, nor for none.
func TestDisksOfAnotherVersion(t *testing.T) {
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	store, err := snapshot.OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for version, want := range map[uint32]error{0: snapshot.ErrVersion, 1: snapshot.ErrFormat, 2: snapshot.ErrVersion} {
		w, err := store.Create(t.Context(), snapshot.Options{Recipients: []age.Recipient{key.Recipient()}})
		if err != nil {
			t.Fatal(err)
		}
		err = errors.Join(
			w.AddSection(snapshot.Section{Name: "disks", Version: version, Critical: true, Data: []byte(`{"new":1}`)}),
			w.Write(t.Context(), snapshot.Contents{Memory: &snapshot.Memory{Size: snapshot.PageSize}}),
		)
		if err != nil {
			t.Fatal(err)
		}
		info, err := w.Commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r, err := store.Open(t.Context(), info.ID, key)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if disks, err := lifecycle.DisksOf(r); !errors.Is(err, want) {
			t.Errorf("version %d: %+v, %v, want %v", version, disks, err, want)
		}
	}
}

// FuzzDisks reads any bytes as the section of disks.
func FuzzDisks(f *testing.F) {
	f.Add([]byte(`[{"name":"root","size":1048576}]`))
	f.Add([]byte(`[{"name":"root","size":1048576,"base":{"path":"/a","size":512,"sha256":"` +
		`e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		disks, err := lifecycle.ParseDisks(b)
		if err != nil {
			return
		}
		for _, d := range disks {
			if d.Size <= 0 || filepath.Base(d.Name+"x") != d.Name+"x" {
				t.Errorf("%+v", d)
			}
			if d.Base != nil && d.Base.Identity().Size > d.Size {
				t.Errorf("%+v", d.Base)
			}
		}
	})
}
