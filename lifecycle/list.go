package lifecycle

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"
)

// sandboxes are those that a Manager has. Its mu guards them.
type sandboxes struct {
	byID  map[string]*entry
	order []*entry // ascending by position
}

// position is a sandbox's place in lists: by the time when it was created, then by its id.
type position struct {
	created int64 // ns since 1970
	id      string
}

func (p position) compare(q position) int {
	if p.created != q.created {
		if p.created < q.created {
			return -1
		}
		return 1
	}
	return strings.Compare(p.id, q.id)
}

func (e *entry) position() position { return position{e.created, e.id} }

func (s *sandboxes) find(p position) (int, bool) {
	return slices.BinarySearchFunc(s.order, p, func(e *entry, p position) int { return e.position().compare(p) })
}

func (s *sandboxes) add(e *entry) {
	i, _ := s.find(e.position())
	s.order = slices.Insert(s.order, i, e)
	s.byID[e.id] = e
}

func (s *sandboxes) remove(e *entry) {
	if i, ok := s.find(e.position()); ok {
		s.order = slices.Delete(s.order, i, i+1)
	}
	delete(s.byID, e.id)
}

func (s *sandboxes) all() []*entry { return slices.Clone(s.order) }

// List lists sandboxes, the newest first. Sandboxes that come and go between two pages neither repeat nor hide others. Errors: ErrInvalid for
// a token that is none.
func (m *Manager) List(opts ListOptions) (Page, error) {
	if opts.Limit < 0 {
		return Page{}, fmt.Errorf("%w: a limit of %d", ErrInvalid, opts.Limit)
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return Page{}, ErrManagerClosed
	}
	end := len(m.sandboxes.order)
	if opts.Token != "" {
		p, err := parseToken(opts.Token)
		if err != nil {
			m.mu.Unlock()
			return Page{}, err
		}
		end, _ = m.sandboxes.find(p)
	}
	rest := slices.Clone(m.sandboxes.order[:end])
	m.mu.Unlock()
	return m.page(rest, opts), nil
}

// page is the end of ascending entries, backwards.
func (m *Manager) page(entries []*entry, opts ListOptions) Page {
	now := m.clock.Now()
	var p Page
	for _, e := range slices.Backward(entries) {
		e.mu.Lock()
		chosen := !e.deleted && e.chosen(opts) && !e.gone(now)
		if chosen && opts.Limit > 0 && len(p.Sandboxes) == opts.Limit {
			e.mu.Unlock()
			last := p.Sandboxes[opts.Limit-1]
			p.Next = position{last.Created.UnixNano(), last.ID}.token()
			break
		}
		if chosen {
			p.Sandboxes = append(p.Sandboxes, e.infoLocked())
		}
		e.mu.Unlock()
	}
	return p
}

// chosen says whether a list has the sandbox. The caller holds mu.
func (e *entry) chosen(opts ListOptions) bool {
	if opts.Owner != "" && e.row.Owner != opts.Owner {
		return false
	}
	if len(opts.States) > 0 && !slices.ContainsFunc(opts.States, e.counts) {
		return false
	}
	for k, v := range opts.Metadata {
		if have, ok := e.row.Metadata[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// counts says whether the sandbox counts as one in state s.
func (e *entry) counts(s State) bool {
	return e.state == s || e.state == StatePausing && s == StateRunning || e.state == StateResuming && s == StatePaused
}

// gone says whether its retention has ended. The caller holds mu.
func (e *entry) gone(now time.Time) bool {
	return e.state == StatePaused && !now.Before(e.row.Paused.Add(e.retention))
}

func (p position) token() string {
	b := binary.BigEndian.AppendUint64(nil, uint64(p.created))
	return base64.RawURLEncoding.EncodeToString(append(b, p.id...))
}

func parseToken(s string) (position, error) {
	b, err := base64.RawURLEncoding.DecodeString(s[:min(len(s), 100)])
	if err != nil || len(b) < 9 || len(s) > 100 {
		return position{}, fmt.Errorf("%w: not a page token", ErrInvalid)
	}
	return position{int64(binary.BigEndian.Uint64(b)), string(b[8:])}, nil
}
