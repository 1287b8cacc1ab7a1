package snapshot

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/agessh"
)

// goldenMaker writes testdata/golden/v1. Contents of memory and disks follow from a seed; ids, keys and what encryption
// adds are random. What vectors say comes from the models that were written, not from a reader.
type goldenMaker struct {
	*testing.T
	*Store
	rnd     *rand.Rand
	own     *age.X25519Identity // the key of all snapshots but those that show other kinds
	vectors []vector
}

func makeGolden(t *testing.T) {
	if _, err := os.Stat(goldenDir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("%s exists, and is not to be changed: snapshots of a new version get a directory of their own (%v)", goldenDir, err)
	}
	if err := os.MkdirAll(filepath.Join(goldenDir, "keys"), 0o755); err != nil {
		t.Fatal(err)
	}
	s, err := OpenStore(filepath.Join(goldenDir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	m := &goldenMaker{T: t, Store: s, rnd: rand.New(rand.NewPCG(2026, 1)), own: newKey(t)}
	m.keep("keys/x25519.txt", m.own.String()+"\n")
	m.keep("keys/other.txt", newKey(t).String()+"\n")
	m.keep("keys/passphrase-other.txt", "not the passphrase")

	full, model := m.full()
	m.diffs(full, model)
	m.stored()
	m.sparse()
	m.disks()
	m.recipients(model)
	m.forgeries(full, model)
	m.damages(full)
	b, err := json.MarshalIndent(m.vectors, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	m.keep("vectors.json", string(b)+"\n")
	if err := os.Remove(filepath.Join(m.dir, lockName)); err != nil {
		t.Fatal(err)
	}
}

func (m *goldenMaker) keep(name, contents string) {
	m.Helper()
	writeFile(m, filepath.Join(goldenDir, name), []byte(contents))
}

// save writes a snapshot of a guest, of whose memory these ranges may have changed.
func (m *goldenMaker) save(opts Options, g *guest, ranges []Range, view View, disks ...Disk) ID {
	m.Helper()
	if opts.Recipients == nil {
		opts.Recipients = []age.Recipient{m.own.Recipient()}
	}
	if opts.Workers == 0 {
		opts.Workers = 1
	}
	if view == nil {
		view = g.view
	}
	w, err := m.Create(context.Background(), opts)
	if err != nil {
		m.Fatal(err)
	}
	defer w.Abort()
	sections := []Section{
		{Name: "golden/state", Version: 1, Critical: true, Data: []byte("registers")},
		{Name: "golden/note", Version: 3, Data: []byte("nobody needs to know this")},
	}
	if len(disks) > 0 {
		sections = append(sections, Section{Name: "disks", Version: 1, Critical: true, Data: []byte(m.diskSection(disks))})
	}
	for _, s := range sections {
		if err := w.AddSection(s); err != nil {
			m.Fatal(err)
		}
	}
	c := Contents{Memory: &Memory{Size: g.size, Data: ranges, View: view}, Disks: disks}
	if err := w.Write(context.Background(), c); err != nil {
		m.Fatal(err)
	}
	info, err := w.Commit(context.Background())
	if err != nil {
		m.Fatal(err)
	}
	return info.ID
}

func (m *goldenMaker) add(v vector) {
	if v.Want == "ok" && v.Restore == "" {
		v.Restore = "ok"
	}
	if v.Keys == nil {
		v.Keys = []string{"x25519.txt"}
	}
	m.vectors = append(m.vectors, v)
}

func (m *goldenMaker) good(name string, id ID, g *guest) {
	m.add(vector{Name: name, ID: id, Want: "ok", Memory: digestPages(g.pages)})
}

// random returns a page that LZ4 does not shrink, text one that it does.
func (m *goldenMaker) random() []byte {
	b := make([]byte, PageSize)
	fillRandom(m.rnd, b)
	return b
}

func (m *goldenMaker) text() []byte {
	word := make([]byte, 32)
	fillRandom(m.rnd, word)
	return bytes.Repeat(word, PageSize/len(word))
}

// full has chunks of both codecs, and pages that are zero before, between and behind them.
func (m *goldenMaker) full() (ID, *guest) {
	g := newGuest(64 * PageSize)
	for p := uint64(2); p < 40; p++ {
		if p%7 != 0 {
			g.set(p, m.text())
		}
	}
	for p := uint64(40); p < 44; p++ {
		g.set(p, m.random())
	}
	id := m.save(Options{ChunkSize: 4 * PageSize}, g, g.layout(), nil)
	m.good("full", id, g)
	empty := newGuest(16 * PageSize)
	m.good("all zero, and no pack", m.save(Options{}, empty, empty.layout(), nil), empty)
	return id, g
}

// diffs is a diff of a diff, and what becomes of it when its ancestors' manifests, and then packs, are gone.
func (m *goldenMaker) diffs(full ID, g *guest) {
	id, ids := full, []ID{full}
	for depth := range uint64(2) {
		r, err := m.Open(context.Background(), id, m.own)
		if err != nil {
			m.Fatal(err)
		}
		g = g.clone()
		g.set(3+depth, m.text())
		g.set(10+depth, m.random())
		g.set(20+depth, make([]byte, PageSize))
		g.set(60+depth, m.text())
		var ranges []Range
		for _, p := range []uint64{3, 10, 20, 60} {
			ranges = append(ranges, Range{(p + depth) * PageSize, PageSize})
		}
		id = m.save(Options{Parent: r}, g, ranges, nil)
		r.Close()
		ids = append(ids, id)
		m.good(fmt.Sprintf("diff of depth %d", depth+1), id, g)
	}
	gone := []edit{{File: manifestName(ids[0]), Remove: true}, {File: manifestName(ids[1]), Remove: true}}
	m.add(vector{Name: "gap in the ancestry: manifests", ID: id, Want: "ok", Edits: gone, Memory: digestPages(g.pages)})
	m.add(vector{Name: "gap in the ancestry: a pack", ID: id, Want: "ErrCorrupt", Edits: []edit{{File: packName(m.pack(full)), Remove: true}}})
}

// pack is the first pack that a snapshot wrote.
func (m *goldenMaker) pack(id ID) ID {
	r, err := m.Open(context.Background(), id, m.own)
	if err != nil {
		m.Fatal(err)
	}
	defer r.Close()
	for _, p := range r.packs {
		if p.rec.origin == id {
			return p.rec.id
		}
	}
	m.Fatalf("%v wrote no pack", id)
	return ID{}
}

// stored has a pack of more than one of age's segments, and none of LZ4; another has two packs that look alike.
func (m *goldenMaker) stored() {
	g := newGuest(32 * PageSize)
	for p := range uint64(18) {
		g.set(p, m.random())
	}
	id := m.save(Options{Codec: CodecStored, ChunkSize: 8 * PageSize}, g, g.layout(), nil)
	m.good("stored", id, g)
	m.packDamages(id)

	g = newGuest(2 * PageSize)
	g.set(0, m.random())
	g.set(1, m.random())
	var meet barrier
	meet.wait.Add(2)
	id = m.save(Options{Workers: 2, ChunkSize: PageSize}, g, g.layout(), func(gpa uint64, n int) ([]byte, error) {
		meet.once()
		return g.view(gpa, n)
	})
	e, err := m.Header(id)
	if err != nil || len(e.Packs) != 2 {
		m.Fatalf("%d packs, %v", len(e.Packs), err)
	}
	m.good("two packs", id, g)
	m.add(vector{Name: "pack in another's place", ID: id, Want: "ErrCorrupt", Edits: []edit{
		{File: packName(e.Packs[0]), Copy: packName(e.Packs[1])},
	}})
}

// sparse has 6 GiB of RAM, on both sides of a hole below 4 GiB, and a page at the end of the address space.
func (m *goldenMaker) sparse() {
	g := newGuest(6 << 30)
	var ranges []Range
	for _, gpa := range []uint64{0, 1 << 20, 3<<30 - PageSize, 4 << 30, 4<<30 + 2*PageSize, 7<<30 - PageSize, DiskStride - PageSize} {
		g.set(gpa/PageSize, m.text())
		ranges = append(ranges, Range{gpa, PageSize})
	}
	m.good("RAM above 4 GiB", m.save(Options{}, g, ranges, nil), g)
}

// disks has a disk on a base image, which hides some of it with zeros, and a blank one; no size is whole blocks.
func (m *goldenMaker) disks() {
	base := make([]byte, 4*PageSize+2560)
	fillRandom(m.rnd, base)
	m.keep("base.img", string(base))
	contents := [][]byte{make([]byte, 10*PageSize+512), make([]byte, 3*PageSize+1024)}
	copy(contents[0], base)
	copy(contents[0][PageSize:], m.random())
	clear(contents[0][2*PageSize : 3*PageSize])
	copy(contents[0][8*PageSize:], m.text())
	copy(contents[0][10*PageSize:], m.text()[:512])
	copy(contents[1], m.random())
	copy(contents[1][3*PageSize:], m.random()[:1024])
	block := func(n uint64) Range { return Range{n * PageSize, PageSize} }
	disks := []Disk{
		{Index: 0, Layered: true, Data: []Range{block(1), block(8), block(10)}, Zeros: []Range{block(2)}},
		{Index: 1, Data: []Range{block(0), block(3)}},
	}
	for i := range disks {
		disks[i].Size, disks[i].ReadAt = uint64(len(contents[i])), bytes.NewReader(contents[i]).ReadAt
	}
	g := newGuest(16 * PageSize)
	g.set(5, m.text())
	id := m.save(Options{}, g, g.layout(), nil, disks...)
	m.add(vector{Name: "disks", ID: id, Want: "ok", Memory: digestPages(g.pages), Disks: []vectorDisk{
		{Size: int64(len(contents[0])), Base: "base.img", SHA256: digest(contents[0])},
		{Size: int64(len(contents[1])), SHA256: digest(contents[1])},
	}})
}

// diskSection says which disks there are.
func (m *goldenMaker) diskSection(disks []Disk) string {
	base := readFile(m, filepath.Join(goldenDir, "base.img"))
	piece := sha256.Sum256(base) // one, as it is less than 1 MiB
	identity := digest(binary.LittleEndian.AppendUint64(piece[:], uint64(len(base))))
	return fmt.Sprintf(`[{"name":"root","size":%d,"base":{"path":"/images/base.img","size":%d,"sha256":%q}},{"name":"data","size":%d}]`,
		disks[0].Size, len(base), identity, disks[1].Size)
}

// recipients are snapshots for others than one X25519 key.
func (m *goldenMaker) recipients(g *guest) {
	hybrid, err := age.GenerateHybridIdentity()
	if err != nil {
		m.Fatal(err)
	}
	m.keep("keys/hybrid.txt", hybrid.String()+"\n")
	passphrase := "correct horse battery staple"
	m.keep("keys/passphrase.txt", passphrase)
	scrypt, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		m.Fatal(err)
	}
	scrypt.SetWorkFactor(8)
	one := []Range{{2 * PageSize, PageSize}}
	small := newGuest(g.size)
	small.set(2, g.pages[2])
	save := func(to ...age.Recipient) ID { return m.save(Options{Recipients: to}, small, one, nil) }

	id := save(m.sshRecipient(), m.own.Recipient())
	for _, keys := range [][]string{{"ssh_ed25519"}, {"x25519.txt"}, {"other.txt", "ssh_ed25519"}} {
		m.add(vector{
			Name: "two recipients: " + strings.Join(keys, " and "), ID: id, Keys: keys, Want: "ok", Memory: digestPages(small.pages),
		})
	}
	m.add(vector{Name: "two recipients: none fits", ID: id, Keys: []string{"other.txt", "hybrid.txt"}, Want: "ErrKey"})
	id = save(hybrid.Recipient())
	m.add(vector{Name: "post-quantum", ID: id, Keys: []string{"hybrid.txt"}, Want: "ok", Memory: digestPages(small.pages)})
	m.add(vector{Name: "post-quantum: wrong key", ID: id, Keys: []string{"x25519.txt"}, Want: "ErrKey"})
	id = save(scrypt)
	m.add(vector{Name: "passphrase", ID: id, Keys: []string{"passphrase.txt"}, Want: "ok", Memory: digestPages(small.pages)})
	m.add(vector{Name: "passphrase: wrong", ID: id, Keys: []string{"passphrase-other.txt"}, Want: "ErrKey"})
}

func (m *goldenMaker) sshRecipient() age.Recipient {
	seed := make([]byte, ed25519.SeedSize)
	fillRandom(m.rnd, seed)
	key := ed25519.NewKeyFromSeed(seed)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		m.Fatal(err)
	}
	m.keep("keys/ssh_ed25519", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	identity, err := agessh.NewEd25519Identity(key)
	if err != nil {
		m.Fatal(err)
	}
	return identity.Recipient()
}
