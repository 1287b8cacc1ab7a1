//go:build linux && amd64

package lifecycle_test

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
)

// envModel makes the test binary the process that TestModel kills: a Manager on the directory that it names, which does what standard input asks for.
const envModel = "CRYOVISOR_MODEL_DIR"

// modelDisk is the disk of the model's guests: a mark is on it too, at its beginning.
const modelDisk = "disk"

// order is what the model's process is to do.
type order struct {
	N        int // identifies the reply
	Op       string
	ID       string // of a sandbox or template
	Mark     uint64
	Timeout  time.Duration
	Advance  time.Duration
	Idle     time.Duration
	Pause    bool
	Metadata map[string]string
}

// report is what came of an order. Err is a class: "" for success.
type report struct {
	N         int
	Err       string
	Detail    string
	ID        string
	Mark      uint64
	Resumed   bool
	Sandboxes []lifecycle.SandboxInfo
	Templates []lifecycle.TemplateInfo
	Wrong     []string
}

// TestModelProcess is the process; alone it does nothing.
func TestModelProcess(t *testing.T) {
	dir := os.Getenv(envModel)
	if dir == "" {
		t.Skip("TestModel runs it")
	}
	checkLeaks(t)
	clock := newFakeClock()
	p := &modelProcess{t: t, dir: dir, out: json.NewEncoder(os.NewFile(3, "replies"))}
	in := bufio.NewScanner(os.Stdin)
	var work sync.WaitGroup
	defer work.Wait()
	for in.Scan() {
		var o order
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			t.Fatal(err)
		}
		if o.Op == "open" {
			clock.advance(o.Advance)
			p.open(o, clock)
			continue
		}
		if o.Op == "close" {
			work.Wait()
			p.reply(o, report{}, p.m.Close(context.Background()))
			return
		}
		work.Go(func() { p.do(o) })
	}
	if err := in.Err(); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

type modelProcess struct {
	t   *testing.T
	dir string
	m   *managed

	mu  sync.Mutex
	out *json.Encoder
}

// open opens the directory, and says what is in it.
func (p *modelProcess) open(o order, clock *fakeClock) {
	m, err := lifecycle.OpenManager(context.Background(), p.dir, lifecycle.ManagerOptions{Clock: clock, PrepareAhead: time.Minute, Pool: 2})
	if err == nil {
		p.m = &managed{m, p.dir, clock}
		if _, missing := m.Template("ticker"); missing != nil {
			config := ticker(p.t, "ticker")
			config.Disks = []lifecycle.Disk{{Name: modelDisk, Size: 1 << 20}}
			_, err = m.CreateTemplate(context.Background(), config)
		}
	}
	r := report{}
	if err == nil {
		r.list(m)
	}
	p.reply(o, r, err)
}

func (r *report) list(m *lifecycle.Manager) {
	page, err := m.List(lifecycle.ListOptions{})
	if err != nil {
		r.Wrong = append(r.Wrong, err.Error())
	}
	r.Sandboxes, r.Templates = page.Sandboxes, m.Templates()
}

func (p *modelProcess) reply(o order, r report, err error) {
	r.N = o.N
	var state *lifecycle.StateError
	switch {
	case err == nil:
	case errors.Is(err, lifecycle.ErrNotFound):
		r.Err = "not found"
	case errors.As(err, &state):
		r.Err = "state"
	default:
		r.Err = "failed"
	}
	if err != nil {
		r.Detail = err.Error()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.out.Encode(r); err != nil {
		p.t.Fatal(err)
	}
}

func (p *modelProcess) do(o order) {
	ctx := context.Background()
	var r report
	var err error
	switch o.Op {
	case "create":
		var s *lifecycle.Sandbox
		opts := lifecycle.CreateOptions{Template: o.ID, Timeout: o.Timeout, IdleTimeout: o.Idle, Metadata: o.Metadata}
		if o.Pause {
			opts.OnTimeout = lifecycle.ActionPause
		}
		if s, err = p.m.Create(ctx, opts); err == nil {
			r.ID = s.ID()
			r.Mark, err = p.mark(s.ID(), 0)
		}
	case "mark":
		_, err = p.mark(o.ID, o.Mark)
	case "pause":
		_, err = p.m.Pause(ctx, o.ID)
	case "connect":
		_, r.Resumed, err = p.m.Connect(ctx, o.ID, lifecycle.ConnectOptions{Timeout: o.Timeout})
		if err == nil {
			r.Mark, err = p.mark(o.ID, 0)
		}
	case "resume":
		if _, err = p.m.Resume(ctx, o.ID, lifecycle.ConnectOptions{Timeout: o.Timeout}); err == nil {
			r.Mark, err = p.mark(o.ID, 0)
		}
	case "kill":
		err = p.m.Kill(ctx, o.ID)
	case "timeout":
		err = p.m.SetTimeout(o.ID, o.Timeout)
	case "touch":
		err = p.m.Touch(o.ID)
	case "fork":
		var forks []lifecycle.ForkResult
		if forks, err = p.m.Fork(ctx, o.ID, 1, lifecycle.ConnectOptions{Timeout: o.Timeout}); err == nil {
			if err = forks[0].Err; err == nil {
				r.ID = forks[0].Sandbox.ID()
				r.Mark, err = p.mark(r.ID, 0)
			}
		}
	case "checkpoint":
		var info lifecycle.TemplateInfo
		info, err = p.m.Checkpoint(ctx, o.ID, "")
		r.ID = info.ID
	case "delete":
		err = p.m.DeleteTemplate(ctx, o.ID)
	case "advance":
		p.m.clock.advance(o.Advance)
	case "list":
		r.list(p.m.Manager)
	case "audit":
		r.Wrong, err = p.m.settledAudit(p.t)
	}
	p.reply(o, r, err)
}

// mark writes the mark of a sandbox that runs, if it is not 0, and returns it. It is in its memory and on its disk, which are of one instant.
func (p *modelProcess) mark(id string, mark uint64) (uint64, error) {
	machine, err := p.m.Machine(id)
	if err != nil {
		return 0, err
	}
	mem, disk := machine.VM.Memory(), machine.DiskDevice(modelDisk)
	if mark != 0 {
		b := binary.LittleEndian.AppendUint64(nil, mark)
		_, err = mem.WriteAt(b, markAt)
		_, diskErr := disk.WriteAt(b, 0)
		return mark, errors.Join(err, diskErr)
	}
	var b, onDisk [8]byte
	_, err = mem.ReadAt(b[:], markAt)
	_, diskErr := disk.ReadAt(onDisk[:], 0)
	if err = errors.Join(err, diskErr); err == nil && b != onDisk {
		err = fmt.Errorf("the mark in memory is %x, that on the disk %x", b, onDisk)
	}
	return binary.LittleEndian.Uint64(b[:]), err
}

// settledAudit is audit, when what goes on by itself, as the deletion of what has expired, has come to its end: a leak does not.
func (m *managed) settledAudit(t *testing.T) (wrong []string, err error) {
	for deadline := time.Now().Add(time.Minute); ; {
		if wrong, err = m.audit(t); err != nil || len(wrong) == 0 || time.Now().After(deadline) {
			return wrong, err
		}
	}
}

// audit compares the files of a Manager, of whose sandboxes none runs, with its catalog.
func (m *managed) audit(t *testing.T) (wrong []string, err error) {
	db, err := sql.Open("sqlite", filepath.Join(m.dir, "catalog.db"))
	if err != nil {
		return nil, err
	}
	defer db.Close()
	column := func(query string) (all []string) {
		rows, queryErr := db.Query(query)
		if queryErr != nil {
			err = queryErr
			return nil
		}
		defer rows.Close()
		for rows.Next() {
			var s string
			err = errors.Join(err, rows.Scan(&s))
			all = append(all, s)
		}
		slices.Sort(all)
		return slices.Compact(all)
	}
	same := func(what string, have, want []string) {
		slices.Sort(have)
		if have = slices.Compact(have); !slices.Equal(have, want) {
			wrong = append(wrong, fmt.Sprintf("%s: there are %v, there should be %v", what, have, want))
		}
	}
	store, storeErr := snapshot.OpenStore(filepath.Join(m.dir, "store"))
	if storeErr != nil {
		return nil, storeErr
	}
	entries, storeErr := store.List()
	if storeErr != nil {
		return nil, storeErr
	}
	var manifests, named, packs, overlays []string
	for _, e := range entries {
		manifests = append(manifests, e.ID.String())
		for _, pack := range e.Packs {
			named = append(named, pack.String())
		}
	}
	slices.Sort(named)
	for _, path := range m.stored(t) {
		switch base := filepath.Base(path); filepath.Ext(path) {
		case ".pack":
			packs = append(packs, strings.TrimSuffix(base, ".pack"))
		case ".overlay":
			overlays = append(overlays, base)
		}
	}
	listed := report{}
	listed.list(m.Manager)
	var alive []string
	for _, s := range listed.Sandboxes {
		alive = append(alive, s.ID)
	}
	same("sandboxes", alive, column("SELECT id FROM sandboxes"))
	same("snapshots", manifests, column("SELECT snapshot FROM sandboxes UNION SELECT snapshot FROM templates"))
	same("packs", packs, slices.Compact(named))
	same("keys", column("SELECT id FROM secrets"), column("SELECT id FROM sandboxes UNION SELECT id FROM templates"))
	same("overlays", overlays, nil)
	return wrong, err
}
