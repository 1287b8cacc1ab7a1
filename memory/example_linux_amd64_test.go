package memory_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/cryovisor/cryovisor/memory"
)

// A tiny source: 1 MiB of RAM, of which the first page is in a chunk.
type tiny struct{}

func (tiny) Chunks() int64 { return 1 }

func (tiny) Lookup(gpa uint64) (start, length uint64, chunk int64) {
	if gpa < memory.PageSize {
		return 0, memory.PageSize, 0
	}
	return memory.PageSize, 1<<20 - memory.PageSize, -1
}

func (tiny) Fetch(_ context.Context, _ int64, install func(gpa uint64, pages []byte) error) error {
	page := make([]byte, memory.PageSize)
	copy(page, "hello from the snapshot")
	return install(0, page)
}

// Two machines resume from one snapshot, and each writes to its own copy.
func ExampleImage_Map() {
	ctx := context.Background()
	img, err := memory.NewImage(1<<20, tiny{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer img.Close()
	for range 2 {
		m, err := img.Map(ctx, memory.MapOptions{})
		if errors.Is(err, memory.ErrNotPermitted) || errors.Is(err, memory.ErrKernel) {
			m, err = img.Map(ctx, memory.MapOptions{Eager: true})
		}
		if err != nil {
			fmt.Println(err)
			return
		}
		defer m.Close()
		p := make([]byte, 23)
		if _, err := m.ReadAt(p, 0); err != nil {
			fmt.Println(err)
		}
		fmt.Printf("%s\n", p)
		if _, err := m.WriteAt([]byte("HELLO"), 0); err != nil {
			fmt.Println(err)
		}
		dirty, err := m.Dirty(ctx)
		fmt.Println(dirty, err)
	}
	// Output:
	// hello from the snapshot
	// [{0 4096}] <nil>
	// hello from the snapshot
	// [{0 4096}] <nil>
}
