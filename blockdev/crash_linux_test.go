package blockdev_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

// envCrash makes TestOverlaySurvivesKill write to an overlay until it is killed: the paths of its file and of what is below,
// and the number of the life.
const envCrash = "CRYOVISOR_BLOCKDEV_CRASH"

const (
	crashSectors = 128 << 10 // of the disk: 64 MiB
	crashWriters = 4
	crashMine    = crashSectors / crashWriters // of each writer
	crashRun     = 32                          // sectors that lie together in the second half
	sector       = 512
)

// crashPlace is where a writer's sector number i is. In the first half of the disk, the writers' sectors take turns, so that
// they share blocks; in the second, runs of several blocks do.
func crashPlace(writer int, i uint64) uint64 {
	if i < crashMine/2 {
		return i*crashWriters + uint64(writer)
	}
	return i/crashRun*crashRun*crashWriters + uint64(writer)*crashRun + i%crashRun
}

// crashOp is what a writer does: it writes, or zeroes, some of its own sectors.
type crashOp struct {
	first, n uint64
	zero     bool
}

// crashOps is the endless sequence of a writer in one life.
func crashOps(life, writer int) func() crashOp {
	rnd := rand.New(rand.NewPCG(uint64(life), uint64(writer)))
	return func() crashOp {
		first := rnd.Uint64N(crashMine)
		return crashOp{first, min(1+rnd.Uint64N(2*crashRun), crashMine-first), rnd.IntN(4) == 0}
	}
}

// sectorOf is the content of a sector that a writer's op number wrote.
func sectorOf(life, writer int, op, at uint64) []byte {
	b := make([]byte, 0, sector)
	for len(b) < sector {
		b = binary.LittleEndian.AppendUint64(b, uint64(life+1)<<48|uint64(writer)<<40|op)
		b = binary.LittleEndian.AppendUint64(b, at)
	}
	return b
}

// writeUntilKilled is a life: writers work, and whenever a flush has ended, their progress from before it is told.
func writeUntilKilled(file, below string, life int) error {
	lower, err := blockdev.OpenFile(below, blockdev.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	disk, err := blockdev.OpenOverlay(file, lower)
	if err != nil {
		return err
	}
	var done [crashWriters]atomic.Uint64
	failed := make(chan error, crashWriters)
	for w := range crashWriters {
		go func() {
			next := crashOps(life, w)
			for op := uint64(0); ; op++ {
				if err := doCrashOp(disk, next(), life, w, op); err != nil {
					failed <- err
					return
				}
				done[w].Store(op + 1)
			}
		}()
	}
	for {
		line := "flushed"
		for w := range done {
			line += fmt.Sprint(" ", done[w].Load())
		}
		if err := disk.Flush(); err != nil {
			return err
		}
		fmt.Println(line)
		select {
		case err := <-failed:
			return err
		default:
		}
	}
}

func doCrashOp(disk blockdev.Device, op crashOp, life, writer int, number uint64) error {
	for i := op.first; i < op.first+op.n; {
		at, n := crashPlace(writer, i), uint64(1)
		content := sectorOf(life, writer, number, at)
		for i+n < op.first+op.n && crashPlace(writer, i+n) == at+n {
			content = append(content, sectorOf(life, writer, number, at+n)...)
			n++
		}
		var err error
		if op.zero {
			err = disk.Discard(int64(at*sector), int64(n*sector))
		} else {
			_, err = disk.WriteAt(content, int64(at*sector))
		}
		if err != nil {
			return err
		}
		i += n
	}
	return nil
}

// TestOverlaySurvivesKill kills processes that write to one overlay, one after another, and checks that everything that they had
// flushed is there, and nothing else but what they wrote since.
func TestOverlaySurvivesKill(t *testing.T) {
	if job, is := os.LookupEnv(envCrash); is {
		args := strings.Split(job, "|")
		life, err := strconv.Atoi(args[2])
		if err == nil {
			err = writeUntilKilled(args[0], args[1], life)
		}
		t.Fatal(err)
	}
	dir := t.TempDir()
	file, below := filepath.Join(dir, "overlay"), filepath.Join(dir, "below")
	content := make([]byte, crashSectors*sector)
	for at := range uint64(crashSectors / 2) { // the other half of the disk is behind the end of what is below
		copy(content[at*sector:], sectorOf(-1, 0, 0, at))
	}
	if err := os.WriteFile(below, content[:len(content)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	lower, err := blockdev.OpenFile(below, blockdev.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer lower.Close()
	disk, err := blockdev.CreateOverlay(file, lower, blockdev.OverlayOptions{Size: int64(len(content))})
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	for life := range 12 {
		if err := disk.Close(); err != nil {
			t.Fatal(err)
		}
		flushed := killWriter(t, fmt.Sprintf("%s|%s|%d", file, below, life), 1+rnd.IntN(40))
		if disk, err = blockdev.OpenOverlay(file, lower); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(content))
		if _, err := disk.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		for w, n := range flushed {
			if err := checkWriter(content, got, life, w, n); err != nil {
				t.Fatalf("life %d, writer %d: %v", life, w, err)
			}
		}
		content = got
	}
	if err := disk.Remove(); err != nil {
		t.Error(err)
	}
}

// killWriter lets a life flush some times, kills it at whatever it is doing then, and returns how many operations of each writer the
// last flush that it told of has made durable.
func killWriter(t *testing.T, job string, flushes int) (flushed [crashWriters]uint64) {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), binary, "-test.run=^TestOverlaySurvivesKill$")
	cmd.Env = append(os.Environ(), envCrash+"="+job)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	killed := false
	for n := 0; lines.Scan(); n++ {
		if _, err := fmt.Sscanf(lines.Text(), "flushed %d %d %d %d", &flushed[0], &flushed[1], &flushed[2], &flushed[3]); err != nil {
			t.Fatalf("%q, %s: %v", lines.Text(), said.String(), err)
		}
		if n >= flushes && !killed {
			killed = true
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if exit, is := errors.AsType[*exec.ExitError](cmd.Wait()); !killed || !is || exit.Exited() {
		t.Fatalf("the process was not killed: %v, %s", exit, said.String())
	}
	return flushed
}

// checkWriter compares a writer's sectors with what they were before its life and with its operations, of which the first n
// are durable.
func checkWriter(before, got []byte, life, writer int, n uint64) error {
	next := crashOps(life, writer)
	last := map[uint64]uint64{} // the last of the first n operations on a sector, plus one
	zero := map[uint64]bool{}
	op := uint64(0)
	for ; op < n; op++ {
		o := next()
		for i := range o.n {
			at := crashPlace(writer, o.first+i)
			last[at], zero[at] = op+1, o.zero
		}
	}
	allowed := map[uint64][]crashWrite{} // what later operations may have written
	for ; op < n+5000; op++ {
		o := next()
		for i := range o.n {
			at := crashPlace(writer, o.first+i)
			allowed[at] = append(allowed[at], crashWrite{op, o.zero})
		}
	}
	for i := range uint64(crashMine) {
		at := crashPlace(writer, i)
		have, want := got[at*sector:(at+1)*sector], before[at*sector:(at+1)*sector]
		if last[at] > 0 {
			want = crashWrite{last[at] - 1, zero[at]}.content(life, writer, at)
		}
		ok := bytes.Equal(have, want)
		for _, w := range allowed[at] {
			ok = ok || bytes.Equal(have, w.content(life, writer, at))
		}
		if !ok {
			return fmt.Errorf("sector %d has %x, want %x, or one of %d later ones; %d operations were flushed",
				at, have[:16], want[:16], len(allowed[at]), n)
		}
	}
	return nil
}

// crashWrite is an operation on one sector.
type crashWrite struct {
	op   uint64
	zero bool
}

func (w crashWrite) content(life, writer int, at uint64) []byte {
	if w.zero {
		return make([]byte, sector)
	}
	return sectorOf(life, writer, w.op, at)
}
