//go:build linux && amd64

package memory_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/memory"
)

// adopt makes a second image of the file of img, as another process would.
func adopt(t *testing.T, img *memory.Image, o *oracle) (*memory.Image, *memory.Loan) {
	t.Helper()
	var file *os.File
	loan, err := img.Lend(func(f *os.File) error {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		file = os.NewFile(uintptr(fd), "image")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	other, err := memory.AdoptImage(o.size, mapped{o}, file, io.NopCloser(nil))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := other.Close(); err != nil {
			t.Error(err)
		}
	})
	return other, loan
}

// Two that fill one file at the same time, each with its own idea of what is there, are
// exact, whatever one tries to take out meanwhile. Afterwards all goes that may.
func TestSharedIsExact(t *testing.T) {
	rng := newRand(t)
	size, data := sparse()
	o := newOracleOf(rng, 6, 4, size, data...)
	img := mappedImage(t, o)
	own := mapImage(t, img, memory.MapOptions{})
	other, loan := adopt(t, img, o)
	m := mapImage(t, other, memory.MapOptions{})
	ctx := context.Background()
	for _, i := range []*memory.Image{img, other} {
		i.SetLimit(memory.MinLimit)
	}
	again := repeat(func() error { _, err := img.Reclaim(ctx); return err })
	from := repeat(func() error { _, err := other.Reclaim(ctx); return err })
	var wg sync.WaitGroup
	for _, m := range []*memory.Memory{own, m} {
		mine := rand.New(rand.NewPCG(rng.Uint64(), 2))
		wg.Go(func() { useEverywhere(t, mine, m, o, data, 400) })
	}
	wg.Wait()
	_, err := again()
	_, ferr := from()
	if err := errors.Join(err, ferr); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*memory.Memory{own, m} {
		s := m.Stats()
		if s.ReclaimedBytes+s.EvictedBytes != 0 || s.FoundBytes == 0 {
			t.Errorf("stats %+v", s)
		}
	}
	pages := pagesOf(rng, data)
	comparePages(t, mapImage(t, other, memory.MapOptions{}), newModel(o.bytes), pages)
	if held(t, img) <= memory.MinLimit {
		t.Error("something was taken out of an image that is lent")
	}
	if _, err := other.Lend(func(*os.File) error { return nil }); !errors.Is(err, memory.ErrAdopted) {
		t.Errorf("an adopted image was lent: %v", err)
	}
	if err := m.Discard(0, data[0].Len); err != nil {
		t.Fatal(err)
	}
	comparePages(t, m, newModel(o.bytes), pagesOf(rng, data[:1]))
	if err := loan.Abandon(); err != nil {
		t.Error(err)
	}
}

// What another has fetched is known when it has gone: it counts, and can go.
func TestReturned(t *testing.T) {
	rng := newRand(t)
	o := newOracle(rng, 16*mib, memory.Range{Len: 16 * mib})
	img := mappedImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	img.SetLimit(memory.MinLimit)
	other, loan := adopt(t, img, o)
	if err := errors.Join(other.Populate(context.Background()), other.Close()); err != nil {
		t.Fatal(err)
	}
	all := held(t, img)
	if err := loan.Return(); err != nil {
		t.Fatal(err)
	}
	if n := held(t, img); n > memory.MinLimit || all <= memory.MinLimit {
		t.Errorf("the image holds %d bytes, held %d", n, all)
	}
	comparePages(t, m, newModel(o.bytes), pagesOf(rng, []memory.Range{{Len: 16 * mib}}))
}

// One whose process goes on with an image that it has lent does not take anything out, nor
// when it ends the loan because it ends itself.
func TestAbandoned(t *testing.T) {
	rng := newRand(t)
	o := newOracle(rng, 16*mib, memory.Range{Len: 16 * mib})
	img := mappedImage(t, o)
	other, loan := adopt(t, img, o)
	if err := other.Populate(context.Background()); err != nil {
		t.Fatal(err)
	}
	all := held(t, other)
	img.SetLimit(memory.MinLimit)
	if err := errors.Join(loan.Abandon(), img.Populate(context.Background())); err != nil {
		t.Fatal(err)
	}
	img.SetLimit(memory.MinLimit)
	if n := held(t, other); n != all {
		t.Errorf("the image holds %d bytes, held %d", n, all)
	}
	if _, err := img.Lend(func(*os.File) error { return errors.ErrUnsupported }); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a descriptor that can't be sent: %v", err)
	}
}
