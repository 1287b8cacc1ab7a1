package lifecycle

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/cryovisor/cryovisor/internal/elfcore"
	"github.com/cryovisor/cryovisor/internal/newfile"
	"github.com/cryovisor/cryovisor/internal/pagetable"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// CoreOptions are the choices of ExportCore.
type CoreOptions struct {
	// Physical leaves the guest's page tables alone: the addresses of the core are guest physical ones.
	Physical bool
	// Overwrite replaces what has the file's name already.
	Overwrite bool
	// Progress, if not nil, is told how many bytes of memory are done, of those that the snapshot holds. It is called from one
	// goroutine at a time and should return soon.
	Progress func(done, total uint64)
}

// CoreInfo says what ExportCore has written.
type CoreInfo struct {
	VCPUs       int
	MemoryBytes uint64
	// Mappings is how many runs of virtual addresses the core shows memory at; 0 if its addresses are physical.
	Mappings int
	// Incomplete says that the guest's tables map more than is followed, or than the file has room for. All of the memory is in
	// the core, but some virtual addresses are missing; the kernel's, in the upper half, come first.
	Incomplete bool
}

// CorePhysical is where a core whose addresses are virtual shows guest physical memory: at this plus the physical address. No
// processor can have a virtual address there: it is not canonical, with 4 or with 5 levels of page tables.
const CorePhysical = 1 << 56

// coreTables bounds how many of a guest's page tables are read: as many as a guest of 256 GiB that maps half of it by the smallest pages
// has, and no more than a second's work where hostile tables go in circles.
const coreTables = 1 << 18

// coreBatch is how many chunks of a snapshot are read at once: those that lie near each other are decrypted together.
const coreBatch = 16

// ExportCore writes the memory and the processors of a snapshot to a file, as an ELF core that gdb and crash open. It is not
// encrypted; its mode is 0600. What the snapshot does not hold, as it is zero, is a hole in the file.
//
// The memory is there at physical addresses (p_paddr). Where a vCPU pages, in 64-bit mode, it is at the virtual addresses of the
// vCPUs, too; where two of them disagree, the first has it.
//
// The file has its name when it is complete and durable, and not before; with an error there is none. Errors: fs.ErrExist if the name
// is taken; vmm.ErrState and vmm.ErrStateVersion; those of snapshot.Reader.FetchBatch; snapshot.ErrFormat if the snapshot has memory
// where the machine has none.
func ExportCore(ctx context.Context, path string, r *snapshot.Reader, opts CoreOptions) (CoreInfo, error) {
	info, err := exportCore(ctx, path, r, opts)
	if err != nil {
		return CoreInfo{}, fmt.Errorf("core of snapshot %v: %w", r.Header().ID, err)
	}
	return info, nil
}

func exportCore(ctx context.Context, path string, r *snapshot.Reader, opts CoreOptions) (CoreInfo, error) {
	state, err := parseState(r)
	if err != nil {
		return CoreInfo{}, err
	}
	create := newfile.Create
	if opts.Overwrite {
		create = newfile.Replace
	}
	var info CoreInfo
	err = create(path, func(f *os.File) (err error) {
		c := core{file: f, state: state, progress: opts.Progress}
		info, err = c.write(ctx, r, opts.Physical)
		return err
	})
	return info, err
}

// core is an ExportCore under way.
type core struct {
	file   *os.File
	state  *vmm.State
	ram    []memory.Range
	layout *elfcore.Layout

	mu          sync.Mutex // for progress
	progress    func(done, total uint64)
	done, total uint64
}

// write writes memory first: page tables are then read from the file, and not once more from the snapshot.
func (c *core) write(ctx context.Context, r *snapshot.Reader, physical bool) (CoreInfo, error) {
	size := c.state.Machine.MemoryBytes
	if size == 0 || size%memory.PageSize != 0 || size > memory.MaxSize {
		return CoreInfo{}, fmt.Errorf("%w: %w", vmm.ErrState, &memory.SizeError{Size: size})
	}
	c.ram = memory.Layout(size)
	roots := coreRoots(c.state.VCPUs)
	if physical {
		roots = nil
	}
	segments := len(c.ram)
	if len(roots) > 0 {
		segments = elfcore.MaxSegments
	}
	var err error
	if c.layout, err = elfcore.NewLayout(coreCPUs(c.state.VCPUs), coreRanges(c.ram), segments); err != nil {
		return CoreInfo{}, err
	}
	if err := c.file.Truncate(c.layout.Size()); err != nil {
		return CoreInfo{}, err
	}
	if err := c.memory(ctx, r); err != nil {
		return CoreInfo{}, err
	}
	return c.headers(roots)
}

// memory writes what the snapshot holds.
func (c *core) memory(ctx context.Context, r *snapshot.Reader) error {
	c.total = r.Header().PagesMapped * snapshot.PageSize
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for first := int64(0); first < r.Chunks(); first += coreBatch {
		var batch []int64
		for chunk := first; chunk < min(first+coreBatch, r.Chunks()); chunk++ {
			batch = append(batch, chunk)
		}
		g.Go(func() error { return r.FetchBatch(ctx, batch, c.put) })
	}
	return g.Wait()
}

// put writes a run of pages.
func (c *core) put(gpa uint64, pages []byte) error {
	off, ok := c.layout.Offset(gpa, uint64(len(pages)))
	if !ok {
		return fmt.Errorf("%w: it holds %d bytes at GPA %#x, where the machine has no memory", snapshot.ErrFormat, len(pages), gpa)
	}
	if _, err := c.file.WriteAt(pages, off); err != nil {
		return err
	}
	if c.progress == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done += uint64(len(pages))
	c.progress(c.done, c.total)
	return nil
}

// headers writes what the file begins with.
func (c *core) headers(roots []pagetable.Root) (CoreInfo, error) {
	info := CoreInfo{VCPUs: len(c.state.VCPUs), MemoryBytes: c.state.Machine.MemoryBytes}
	limits := pagetable.Limits{Tables: coreTables, Mappings: elfcore.MaxSegments - len(c.ram)}
	mappings, complete, err := pagetable.Walk(c, tableRanges(c.ram), roots, limits)
	if err != nil {
		return CoreInfo{}, err
	}
	base := uint64(0)
	if len(mappings) > 0 {
		base = CorePhysical
	}
	var segments []elfcore.Segment
	for _, r := range c.ram {
		segments = append(segments, elfcore.Segment{Virtual: base + r.GPA, GPA: r.GPA, Len: r.Len})
	}
	for _, m := range mappings {
		segments = append(segments, elfcore.Segment{Virtual: m.Linear, GPA: m.GPA, Len: m.Len})
	}
	info.Mappings, info.Incomplete = len(mappings), !complete
	b, err := c.layout.Headers(segments)
	if err == nil {
		_, err = c.file.WriteAt(b, 0)
	}
	return info, err
}

// ReadAt reads memory that has been written, at a guest physical address.
func (c *core) ReadAt(p []byte, gpa int64) (int, error) {
	off, ok := c.layout.Offset(uint64(gpa), uint64(len(p)))
	if !ok {
		return 0, io.EOF
	}
	return c.file.ReadAt(p, off)
}
