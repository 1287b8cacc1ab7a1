//go:build linux && amd64

package server_test

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// browser is a headless browser, and what went wrong in it.
type browser struct {
	ctx context.Context

	mu       sync.Mutex
	problems []string
	hosts    map[string]bool
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	path := ""
	for _, name := range []string{"chromium-headless-shell", "chromium", "google-chrome"} {
		if found, err := exec.LookPath(name); err == nil {
			path = found
			break
		}
	}
	if path == "" {
		t.Skip("no Chromium: install chromium-headless-shell")
	}
	// Its sandbox can't be had as root or in a container; what it opens is our own page.
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.UserDataDir(t.TempDir()))
	allocated, cancel := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(cancel)
	ctx, cancel := chromedp.NewContext(allocated)
	t.Cleanup(cancel)
	ctx, cancel = context.WithTimeout(ctx, 90*time.Second)
	t.Cleanup(cancel)
	b := &browser{ctx: ctx, hosts: make(map[string]bool)}
	chromedp.ListenTarget(ctx, b.note)
	return b
}

func (b *browser) note(event any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch e := event.(type) {
	case *runtime.EventExceptionThrown:
		b.problems = append(b.problems, e.ExceptionDetails.Text)
	case *log.EventEntryAdded:
		if e.Entry.Source != log.SourceNetwork { // answers that are no success are what the test asks for
			b.problems = append(b.problems, e.Entry.Text)
		}
	case *runtime.EventConsoleAPICalled:
		b.problems = append(b.problems, "console: "+string(e.Type))
	case *network.EventRequestWillBeSent:
		if u, err := url.Parse(e.Request.URL); err == nil && u.Scheme != "data" {
			b.hosts[u.Host] = true
		}
	case *page.EventJavascriptDialogOpening:
		if e.Type != page.DialogTypeConfirm {
			b.problems = append(b.problems, "a dialog: "+e.Message)
		}
		go func() { _ = chromedp.Run(b.ctx, page.HandleJavaScriptDialog(true)) }()
	}
}

func (b *browser) run(t *testing.T, actions ...chromedp.Action) {
	t.Helper()
	if err := chromedp.Run(b.ctx, actions...); err != nil {
		t.Fatal(err)
	}
}

// until waits until an expression of the page's is true.
func until(expression string) chromedp.Action {
	return chromedp.Poll(expression, nil, chromedp.WithPollingInterval(50*time.Millisecond))
}

// TestPage looks at the page as people do: types the key in, sees the sandboxes, pauses one and kills one by its button.
func TestPage(t *testing.T) {
	b := newBrowser(t)
	f := newFixture(t, nil)
	const hostile = `<img src=x onerror=alert(1)><script>alert(2)</script>`
	paused := f.create(`{"timeout":3600}`)
	f.want(f.do("POST", "/sandboxes/"+paused+"/pause", ""), http.StatusNoContent)
	f.want(f.do("POST", "/sandboxes/"+paused+"/connect", `{"timeout":3600}`), http.StatusCreated)
	f.want(f.do("POST", "/sandboxes/"+paused+"/pause", ""), http.StatusNoContent)
	id := f.create(`{"timeout":3600,"metadata":{"x":"` + strings.ReplaceAll(hostile, `"`, `\"`) + `"}}`)
	f.as(f.other, "POST", "/v2/sandboxes", "")

	var text, points, images string
	b.run(t, network.Enable(), runtime.Enable(), log.Enable(), chromedp.Navigate(f.url), chromedp.WaitVisible("#key"),
		chromedp.SendKeys("#key", f.key+"\n"),
		until(`document.querySelectorAll("#sandboxes tr").length === 2`), until(`document.querySelectorAll("#times .point").length === 3`),
		chromedp.Text("#sandboxes", &text), chromedp.Text("#totals", &points),
		chromedp.Evaluate(`String(document.querySelectorAll("#sandboxes img, #sandboxes script").length)`, &images))
	if !strings.Contains(text, hostile) || images != "0" {
		t.Errorf("metadata is not shown as text: %s", text)
	}
	if !strings.Contains(text, id) || !strings.Contains(text, paused) || !strings.Contains(points, "ms") {
		t.Errorf("the page says %s %s", points, text)
	}
	shoot(t, b, "page")
	b.run(t, chromedp.Click(`[data-action="Pause `+id+`"]`), until(`document.querySelectorAll("#sandboxes td.paused").length === 2`),
		until(`document.querySelectorAll("#sizes .point").length === 3`))
	if l := f.get(id); l.State != "paused" {
		t.Errorf("paused by its button: %+v", l)
	}
	b.run(t, chromedp.Click(`[data-action="Kill `+id+`"]`), until(`document.querySelectorAll("#sandboxes tr").length === 1`))
	f.want(f.do("GET", "/sandboxes/"+id, ""), http.StatusNotFound)
	// A button whose sandbox has gone meanwhile: what that leads to is still shown when the list is fresh.
	b.run(t, chromedp.Evaluate(`(async (b) => {
		await fetch("/sandboxes/`+paused+`", { method: "DELETE", headers: { "X-API-KEY": sessionStorage.getItem("key") } });
		b.click();
	})(document.querySelector('[data-action="Connect `+paused+`"]'))`, nil),
		until(`!document.getElementById("none").hidden && document.getElementById("problem").textContent === "not found"`))
	var location, stored string
	b.run(t, chromedp.Location(&location), chromedp.Click("#leave"), chromedp.WaitVisible("#key"),
		chromedp.Evaluate(`String(sessionStorage.length + localStorage.length) + document.cookie`, &stored))
	if strings.Contains(location, f.key) || stored != "0" {
		t.Errorf("the key is kept: %q, at %s", stored, location)
	}
	b.run(t, chromedp.SendKeys("#key", "e2b_wrong\n"), chromedp.WaitVisible("#problem"), chromedp.WaitVisible("#key"))
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.problems) > 0 {
		t.Errorf("problems: %q", b.problems)
	}
	if u, err := url.Parse(f.url); err != nil || len(b.hosts) != 1 || !b.hosts[u.Host] {
		t.Errorf("requests to %v", b.hosts)
	}
}

// shoot takes pictures of the page, if $CRYOVISOR_SHOTS names a directory for them.
func shoot(t *testing.T, b *browser, name string) {
	t.Helper()
	dir := os.Getenv("CRYOVISOR_SHOTS")
	if dir == "" {
		return
	}
	for _, scheme := range []string{"light", "dark"} {
		for _, size := range []int64{1200, 420} {
			var picture []byte
			b.run(t, emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}),
				chromedp.EmulateViewport(size, 900), chromedp.Evaluate(`refresh()`, nil, awaited), chromedp.FullScreenshot(&picture, 100))
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s-%s-%d.png", name, scheme, size)), picture, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// awaited has an evaluation wait for its promise.
func awaited(p *runtime.EvaluateParams) *runtime.EvaluateParams { return p.WithAwaitPromise(true) }
