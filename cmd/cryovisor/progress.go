package main

import (
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// progressDelay is how long something may take before a bar is shown for it.
const progressDelay = time.Second

// progress shows a bar on a terminal for work that takes longer than a second,
// and nothing elsewhere. Its methods may be called from several goroutines.
type progress struct {
	out   io.Writer
	what  string
	begun time.Time

	mu   sync.Mutex
	done uint64 // by add
	bar  *progressbar.ProgressBar
}

func newProgress(out io.Writer, what string) *progress {
	if f, ok := out.(*os.File); !ok || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	return &progress{out: out, what: what, begun: time.Now()}
}

// update is a callback for (bytes done, bytes in all). A nil progress takes it
// and shows nothing.
func (p *progress) update(done, total uint64) {
	if p == nil || total == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.show(done, total)
}

// add says that n more of total bytes are done.
func (p *progress) add(n, total uint64) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	p.show(p.done, total)
}

func (p *progress) show(done, total uint64) {
	if p.bar == nil {
		if time.Since(p.begun) < progressDelay || done >= total {
			return
		}
		p.bar = progressbar.NewOptions64(int64(total), progressbar.OptionSetWriter(p.out),
			progressbar.OptionSetDescription(p.what), progressbar.OptionShowBytes(true),
			progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	}
	// A bar that can't be drawn is no reason to fail what it shows.
	_ = p.bar.Set64(int64(min(done, total)))
}

func (p *progress) finish() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}
