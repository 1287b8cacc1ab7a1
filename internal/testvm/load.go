package testvm

import (
	"runtime"

	"golang.org/x/sync/errgroup"
)

// Load calls write with every page of c that is not zero, in runs of up to 64
// adjacent pages, from several goroutines at once. data is valid during the call.
// It ends with the first error of write.
func (w *Worker) Load(c Content, write func(gpa uint64, data []byte) error) error {
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	const share = 64 * runPages // pages that a goroutine takes at once
	for first := uint64(0); first < w.pages; first += share {
		g.Go(func() error {
			buf := make([]byte, runPages*pageSize)
			end := min(first+share, w.pages)
			for p := first; p < end; {
				n, skip := w.run(c, p, end, buf)
				if n > 0 {
					if err := write(w.PageGPA(p), buf[:n*pageSize]); err != nil {
						return err
					}
				}
				p += n + skip
			}
			return nil
		})
	}
	return g.Wait()
}

// run makes the pages from p on that can be written together, n of them; skip
// says that a zero page follows.
func (w *Worker) run(c Content, p, end uint64, buf []byte) (n, skip uint64) {
	for ; n < runPages && p+n < end; n++ {
		if n > 0 && w.PageGPA(p+n) != w.PageGPA(p)+n*pageSize {
			return n, 0
		}
		if !c.Page(p+n, buf[n*pageSize:][:pageSize]) {
			return n, 1
		}
	}
	return n, 0
}
