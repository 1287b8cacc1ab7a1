//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/memory"
)

// gcChild makes this test binary the child of TestCollectionsDontHang.
const gcChild = "CRYOVISOR_MEMORY_GC_CHILD"

// gcLimit is far beyond what the children need, which is seconds.
const gcLimit = 5 * time.Minute

// With one processor for Go code and a garbage collection at any instant,
// thousands of faults in system calls and thousands of accesses from Go code all
// come to an end. It runs in a process of its own, because a process that has
// this deadlock can't even be killed by its own timeout.
func TestCollectionsDontHang(t *testing.T) {
	mapImage(t, newImage(t, newOracle(newRand(t), mib)), memory.MapOptions{}) // or skip
	ctx, cancel := context.WithTimeout(t.Context(), gcLimit)
	defer cancel()
	for _, debug := range []string{"", "asyncpreemptoff=1"} {
		child := exec.CommandContext(ctx, os.Args[0])
		child.Env = append(os.Environ(), gcChild+"=1", "GOMAXPROCS=1", "GODEBUG="+debug)
		out, err := child.CombinedOutput()
		if ctx.Err() != nil {
			t.Fatalf("GODEBUG=%q: the child hangs: %s", debug, out)
		}
		if err != nil {
			t.Fatalf("GODEBUG=%q: %v: %s", debug, err, out)
		}
		t.Logf("GODEBUG=%q: %s", debug, bytes.TrimSpace(out))
	}
}

// gcMain is the child: its exit code.
func gcMain() int {
	for _, f := range []func() error{faultAndCollect, discardAndCollect, freezeAndCollect} {
		if err := f(); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	return 0
}

// mapLazily makes a lazy Memory of o, which keeps its image alive.
func mapLazily(o *oracle) (*memory.Image, *memory.Memory, error) {
	img, err := memory.NewImage(o.size, o)
	if err != nil {
		return nil, nil, err
	}
	m, err := img.Map(context.Background(), memory.MapOptions{})
	return img, m, errors.Join(err, img.Close())
}

func faultAndCollect() error {
	rng := rand.New(rand.NewPCG(7, 7))
	data := memory.Range{Len: 48 * mib}
	o := newOracleOf(rng, 1, 1, 64*mib, data)
	_, m, err := mapLazily(o)
	if err != nil {
		return err
	}
	defer m.Close()

	stop := repeat(func() error { runtime.GC(); return nil })
	err = faultFromEverywhere(rng, m, o, data)
	n, _ := stop()
	s := m.Stats()
	fmt.Printf("%d faults, %d of them woken only, %d chunks, %d collections\n", s.Faults, s.WakeOnly, s.ChunksFetched, n)
	if err == nil && (s.Faults < 1000 || s.ChunksFetched < 2000 || n < 20) {
		err = errors.New("that is too little to prove anything")
	}
	return err
}

// repeat calls f on a goroutine until it fails or stop is called, which says how
// often that was and why it failed.
func repeat(f func() error) (stop func() (int, error)) {
	var end atomic.Bool
	var err error
	done := make(chan int)
	go func() {
		n := 0
		for ; err == nil && !end.Load(); n++ {
			err = f()
		}
		done <- n
	}()
	return func() (int, error) {
		end.Store(true)
		return <-done, err
	}
}

// discardAndCollect is the same while pages are taken away, from the machine and
// from the image, so that each is missing again and again, also between being served
// and being touched.
func discardAndCollect() error {
	rng := rand.New(rand.NewPCG(8, 8))
	data := memory.Range{Len: 3 * mib}
	o := newOracleOf(rng, 8, 4, 4*mib, data)
	img, m, err := mapLazily(o)
	if err != nil {
		return err
	}
	defer m.Close()

	collect := repeat(func() error { runtime.GC(); return nil })
	reclaim := repeat(func() error { _, err := img.Reclaim(context.Background()); return err })
	scan := repeat(func() error { _, err := m.Dirty(context.Background()); return err })
	mine := rand.New(rand.NewPCG(9, 9))
	var taken atomic.Int64
	discard := repeat(func() error {
		taken.Add(1)
		gpa := mine.Uint64N(data.Len/page) * page
		runtime.Gosched() // or the others never get on
		return m.Discard(gpa, min(uint64(1+mine.IntN(256))*page, data.Len-gpa))
	})
	// Until there was enough of everything, or the parent loses patience.
	for err == nil && (taken.Load() < 100 || m.Stats().Faults < 100) {
		err = faultFromEverywhere(rng, m, o, data)
	}
	discards, derr := discard()
	scans, serr := scan()
	_, rerr := reclaim()
	collections, _ := collect()
	s := m.Stats()
	fmt.Printf("%d discards, %d scans, %d faults, %d collections, %d KiB reclaimed\n",
		discards, scans, s.Faults, collections, s.ReclaimedBytes>>10)
	if err = errors.Join(err, derr, serr, rerr, discardAll(m, o, data)); err != nil {
		return err
	}
	if scans == 0 || collections == 0 || s.ReclaimedBytes == 0 {
		return errors.New("that is too little to prove anything")
	}
	return nil
}

// freezeAndCollect is the same while pages are write-protected again and again, and
// let go before they are frozen and afterwards.
func freezeAndCollect() error {
	rng := rand.New(rand.NewPCG(10, 10))
	data := memory.Range{Len: 3 * mib}
	o := newOracleOf(rng, 8, 4, 4*mib, data)
	_, m, err := mapLazily(o)
	if err != nil {
		return err
	}
	defer m.Close()

	collect := repeat(func() error { runtime.GC(); return nil })
	write := repeat(func() error { return faultFromEverywhere(rng, m, o, data) })
	held, stills, enough := uint64(0), 0, uint64(40)
	if raceEnabled { // with one processor, a write is seldom there in time
		enough = 8
	}
	for ; err == nil && held < enough; stills++ {
		held, err = freezeOnce(m, held)
		if errors.Is(err, memory.ErrNoWriteProtect) {
			fmt.Println(err)
			err = nil
			break
		}
	}
	_, werr := write()
	collections, _ := collect()
	fmt.Printf("%d stills, %d writes held, %d collections\n", stills, held, collections)
	return errors.Join(err, werr)
}

// freezeOnce makes a Still, under writers, and reads what it wants.
func freezeOnce(m *memory.Memory, held uint64) (uint64, error) {
	ctx := context.Background()
	dirty, err := m.Dirty(ctx)
	if err != nil {
		return held, err
	}
	s, err := m.Protect(ctx, dirty)
	if err != nil {
		return held, err
	}
	defer s.Close()
	s.SetBuffers(1)
	if err := s.Freeze(dirty, nil); err != nil {
		return held, err
	}
	got := make([]byte, page)
	for _, r := range dirty {
		for gpa := r.GPA; gpa < r.End(); gpa += page {
			if _, err := s.ReadAt(got, int64(gpa)); err != nil {
				return held, err
			}
			runtime.Gosched() // or there is nobody to be held
		}
	}
	return held + s.Stats().Held, s.Close()
}

// discardAll checks that what was discarded is the image again.
func discardAll(m *memory.Memory, o *oracle, data memory.Range) error {
	if err := m.Discard(data.GPA, data.Len); err != nil {
		return err
	}
	dirty, err := m.Dirty(context.Background())
	if err != nil || len(dirty) != 0 {
		return fmt.Errorf("dirty after all was discarded: %v, %w", dirty, err)
	}
	got := make([]byte, data.Len)
	if _, err := m.ReadAt(got, int64(data.GPA)); err != nil {
		return err
	}
	if !bytes.Equal(got, o.bytes(data.GPA, len(got))) {
		return errors.New("discarded pages are not those of the image")
	}
	return nil
}

// faultFromEverywhere has two threads in system calls and two goroutines in the
// accessor go over two thirds of the pages each, in their own order. One third
// is for both.
func faultFromEverywhere(rng *rand.Rand, m *memory.Memory, o *oracle, data memory.Range) error {
	errs := make([]error, 4)
	var wg sync.WaitGroup
	for i := range errs {
		part := memory.Range{GPA: data.GPA, Len: data.Len / 3 * 2}
		if i >= 2 {
			part.GPA += data.Len / 3
		}
		pages := pagesOf(rng, []memory.Range{part})
		wg.Go(func() {
			tc, err := newToucher(m)
			if err != nil {
				errs[i] = err
				return
			}
			defer tc.close()
			errs[i] = goOver(tc, o, pages, i < 2)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func goOver(tc *toucher, o *oracle, pages []uint64, bySystemCall bool) error {
	for _, gpa := range pages {
		got := make([]byte, 512) // garbage, for the collector
		var err error
		if bySystemCall {
			if got, err = tc.load(gpa, len(got)); err == nil {
				err = tc.store([]byte("kernel"), gpa+page-12)
			}
		} else if _, err = tc.m.ReadAt(got, int64(gpa)); err == nil {
			_, err = tc.m.WriteAt([]byte("device"), int64(gpa+page-6))
		}
		if err != nil {
			return err
		}
		if !bytes.Equal(got, o.bytes(gpa, len(got))) {
			return fmt.Errorf("page %#x is wrong", gpa)
		}
	}
	return nil
}
