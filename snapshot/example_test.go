package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/snapshot"
)

// tempStore returns an empty store and a key for the examples.
func tempStore() (*snapshot.Store, *age.X25519Identity, func()) {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	store, err := snapshot.OpenStore(dir)
	if err != nil {
		log.Fatal(err)
	}
	key, err := age.GenerateX25519Identity()
	if err != nil {
		log.Fatal(err)
	}
	return store, key, func() { os.RemoveAll(dir) }
}

// save stores mem and one section.
func save(store *snapshot.Store, opts snapshot.Options, mem []byte, ranges ...snapshot.Range) (snapshot.Info, error) {
	ctx := context.Background()
	w, err := store.Create(ctx, opts)
	if err != nil {
		return snapshot.Info{}, err
	}
	defer w.Abort() // does nothing after a successful Commit
	err = w.AddSection(snapshot.Section{Name: "config", Version: 1, Critical: true, Data: []byte("2 vCPUs")})
	if err != nil {
		return snapshot.Info{}, err
	}
	view := func(gpa uint64, n int) ([]byte, error) { return mem[gpa:][:n], nil }
	if err := w.WriteMemory(ctx, uint64(len(mem)), ranges, view); err != nil {
		return snapshot.Info{}, err
	}
	return w.Commit(ctx)
}

// Store a guest's memory, and read it back.
func Example() {
	store, key, cleanup := tempStore()
	defer cleanup()
	mem := make([]byte, 1<<20)
	copy(mem[64<<10:], "hello")

	opts := snapshot.Options{Recipients: []age.Recipient{key.Recipient()}}
	info, err := save(store, opts, mem, snapshot.Range{GPA: 0, Len: 1 << 20})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(info.PagesStored, "page stored,", info.ZeroPages, "zero")

	r, err := store.Open(context.Background(), info.ID, key)
	if err != nil {
		log.Fatal(err)
	}
	defer r.Close()
	config, err := r.ReadSection("config")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("config: %s\n", config.Data)
	start, length, chunk := r.Lookup(64 << 10)
	fmt.Printf("%d bytes at %#x are in chunk %d\n", length, start, chunk)
	err = r.Fetch(context.Background(), chunk, func(gpa uint64, pages []byte) error {
		fmt.Printf("%s\n", pages[:5])
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// 1 page stored, 255 zero
	// config: 2 vCPUs
	// 4096 bytes at 0x10000 are in chunk 0
	// hello
}

// Store only what was written since the parent. The parent can be deleted: the
// child needs its packs, not its manifest, and keeps them.
func ExampleOptions_parent() {
	store, key, cleanup := tempStore()
	defer cleanup()
	mem := make([]byte, 1<<20)
	copy(mem, "written first")
	opts := snapshot.Options{Recipients: []age.Recipient{key.Recipient()}}
	first, err := save(store, opts, mem, snapshot.Range{GPA: 0, Len: 1 << 20})
	if err != nil {
		log.Fatal(err)
	}
	parent, err := store.Open(context.Background(), first.ID, key)
	if err != nil {
		log.Fatal(err)
	}
	defer parent.Close()

	copy(mem[4096:], "written since")
	opts.Parent = parent
	second, err := save(store, opts, mem, snapshot.Range{GPA: 4096, Len: 4096})
	if err != nil {
		log.Fatal(err)
	}
	if err := store.Delete(context.Background(), first.ID); err != nil {
		log.Fatal(err)
	}
	child, err := store.Open(context.Background(), second.ID, key)
	if err != nil {
		log.Fatal(err)
	}
	defer child.Close()
	for c := range child.Chunks() {
		err := child.Fetch(context.Background(), c, func(gpa uint64, pages []byte) error {
			fmt.Printf("%#x: %s\n", gpa, pages[:13])
			return nil
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	// Unordered output:
	// 0x0: written first
	// 0x1000: written since
}

// What a snapshot is can be seen without a key; what is in it can't.
func ExampleStore_Header() {
	store, key, cleanup := tempStore()
	defer cleanup()
	info, err := save(store, snapshot.Options{Recipients: []age.Recipient{key.Recipient()}}, make([]byte, 2<<20))
	if err != nil {
		log.Fatal(err)
	}
	entry, err := store.Header(info.ID)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("format", entry.Version, "memory", entry.RAMBytes)

	other, err := age.GenerateX25519Identity()
	if err != nil {
		log.Fatal(err)
	}
	_, err = store.Open(context.Background(), info.ID, other)
	fmt.Println(errors.Is(err, snapshot.ErrKey))
	// Output:
	// format 1 memory 2097152
	// true
}

// Verify reads every byte and says what is lost.
func ExampleReader_Verify() {
	store, key, cleanup := tempStore()
	defer cleanup()
	mem := make([]byte, 64<<10)
	copy(mem[8192:], "precious")
	info, err := save(store, snapshot.Options{Recipients: []age.Recipient{key.Recipient()}}, mem, snapshot.Range{GPA: 0, Len: 64 << 10})
	if err != nil {
		log.Fatal(err)
	}
	r, err := store.Open(context.Background(), info.ID, key)
	if err != nil {
		log.Fatal(err)
	}
	defer r.Close()

	pack := store.PackPath(r.Header().Packs[0])
	if err := os.Truncate(pack, 100); err != nil {
		log.Fatal(err)
	}
	report, err := r.Verify(context.Background(), nil)
	if err != nil {
		log.Fatal(err)
	}
	for _, d := range report.Damage {
		fmt.Println(errors.Is(d.Err, snapshot.ErrCorrupt), d.Ranges)
	}
	// Output:
	// true [{8192 4096}]
}
