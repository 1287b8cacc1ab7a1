//go:build linux && amd64

package lifecycle_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/cryovisor/cryovisor/memory"
)

// contentAt is where the test guest's own pages end, its page tables last, and its content begins, which it works on whatever it is.
const contentAt = 2 << 20

// someActions makes a list of things to do, the last of which are a pause and some work.
func someActions(rnd *rand.Rand) []action {
	var list []action
	for range 5 {
		for range 2 + rnd.IntN(3) {
			list = append(list, someAction(rnd))
		}
		// More may change before the pause.
		list = slices.Insert(list, len(list)-rnd.IntN(3), marking(rnd))
		if rnd.IntN(3) == 0 {
			seed := rnd.Uint64()
			list = append(list, action{"fork", func(v *traveller) { v.fork(rand.New(rand.NewPCG(seed, 0))) }})
		} else {
			list = append(list, action{"pause", (*traveller).pause})
		}
	}
	return append(list, running(rnd))
}

func someAction(rnd *rand.Rand) action {
	switch rnd.IntN(6) {
	case 0:
		return running(rnd)
	case 1:
		return zeroing(rnd)
	case 2:
		return discarding(rnd)
	case 3, 4:
		return changingDisk(rnd)
	}
	return writing(rnd)
}

func running(rnd *rand.Rand) action {
	steps := 1 + rnd.Uint64N(40)
	return action{fmt.Sprintf("run %d steps", steps), func(v *traveller) { v.run(steps) }}
}

// somePages are pages of the content.
func somePages(rnd *rand.Rand) memory.Range {
	const pages = (travelMemory - contentAt) / memory.PageSize
	n := 1 + rnd.Uint64N(64)
	return memory.Range{GPA: contentAt + rnd.Uint64N(pages-n)*memory.PageSize, Len: n * memory.PageSize}
}

// someBytes are of a kind: random, which does not compress, or much the same.
func someBytes(rnd *rand.Rand, n int) []byte {
	b := bytes.Repeat([]byte{byte(rnd.Uint32())}, n)
	for i := range b {
		if n%2 == 0 || i%100 == 0 {
			b[i] = byte(rnd.Uint32())
		}
	}
	return b
}

func writing(rnd *rand.Rand) action {
	r := somePages(rnd)
	at, b := r.GPA+rnd.Uint64N(memory.PageSize), someBytes(rnd, int(r.Len)-memory.PageSize+1)
	return action{fmt.Sprintf("write %d bytes to %#x", len(b), at), func(v *traveller) { v.write(at, b) }}
}

func zeroing(rnd *rand.Rand) action {
	r := somePages(rnd)
	return action{fmt.Sprintf("zero %#x+%#x", r.GPA, r.Len), func(v *traveller) { v.write(r.GPA, make([]byte, r.Len)) }}
}

func discarding(rnd *rand.Rand) action {
	r := somePages(rnd)
	return action{fmt.Sprintf("discard %#x+%#x", r.GPA, r.Len), func(v *traveller) { v.discard(r) }}
}

// marking has a machine stored that goes on then. Meanwhile, disks and something else change.
func marking(rnd *rand.Rand) action {
	list := []action{changingDisk(rnd), changingDisk(rnd), changingDisk(rnd), someAction(rnd)}
	var names []string
	for _, a := range list {
		names = append(names, a.name)
	}
	return action{"mark, and meanwhile " + strings.Join(names, " and "), func(v *traveller) {
		v.t.Helper()
		v.mark(list)
	}}
}

func changingDisk(rnd *rand.Rand) action {
	disk := []string{"raw", "blank"}[rnd.IntN(2)]
	n := 512 * (1 + rnd.Int64N(200))
	off := 256<<10 + rnd.Int64N((768<<10-n)/512)*512 // the image ends in there
	b := someBytes(rnd, int(n))
	how := rnd.IntN(4)
	return action{fmt.Sprintf("disk %s: change %d of %d bytes at %d", disk, how, n, off), func(v *traveller) {
		v.t.Helper()
		dev := v.m.DiskDevice(disk)
		var err error
		switch how {
		case 0:
			err = dev.Discard(off, n)
		case 1:
			err = dev.WriteZeroes(off, n)
		default:
			_, err = dev.WriteAt(b, off)
		}
		if err != nil {
			v.t.Fatal(err)
		}
	}}
}
