package linuxvm

import (
	"bytes"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
	"github.com/cryovisor/cryovisor/snapshot"
)

// BenchmarkGuestMemory says what the memory of Linux guests consists of, and what of the diffs of its pauses was in the parent
// already. Contents that the load writes are noise, so that this is about the rest: kernel, programs, what they keep of both.
func BenchmarkGuestMemory(b *testing.B) {
	cfg := labConfig
	cfg.MemoryMiB, cfg.TimeLimit = 3072, 0
	RunBenchmark(b, withE2fs(b, cfg), []string{DatabaseProgram}, func(b *testing.B, lab *Lab) {
		b.Run("booted", func(b *testing.B) {
			s := surveyed(b, lab)
			s.pause()
			surveyMemory(b, s.stored())
		})
		b.Run("processes", func(b *testing.B) { surveyLoad(b, lab, logNames) })
		b.Run("database", func(b *testing.B) { surveyLoad(b, lab, []string{"db", "disk", "timer"}) })
	})
}

// surveyed is a guest that has been booted.
func surveyed(b *testing.B, lab *Lab) *saga {
	b.Helper()
	s := newSaga(b, lab, Options{Kernel: kvmlab.Cloud, Modules: deviceModules(kvmlab.Cloud)})
	s.useDisk(128)
	s.useDatabase()
	s.start()
	s.until("up ")
	return s
}

// surveyLoad pauses a guest in the midst of a load, again and again.
func surveyLoad(b *testing.B, lab *Lab, names []string) {
	s := surveyed(b, lab)
	s.names = names
	s.order("start " + strings.Join(names, " "))
	s.steps(2)
	s.pause()
	parent := s.stored()
	const cycles = 10
	var stored, changed, repeated uint64 // pages that are not zero
	for range cycles {
		s.start()
		s.steps(2)
		p := s.pause()
		mem := s.stored()
		var diff testvm.Survey
		diff.Add(changes(parent, mem))
		stored, changed, repeated = stored+p.PagesStored, changed+diff.Pages-diff.Zero, repeated+diff.Repeated
		parent = mem
	}
	surveyMemory(b, parent)
	b.ReportMetric(float64(stored)/cycles, "diff-pages")
	b.ReportMetric(100*float64(stored-changed)/float64(stored), "diff-as-parent-%")
	b.ReportMetric(100*float64(repeated)/float64(changed), "diff-repeated-%")
}

// surveyMemory reports what memory consists of.
func surveyMemory(b *testing.B, mem []byte) {
	var s testvm.Survey
	s.Add(mem)
	s.Report(b)
}

// stored is the guest's memory as the last snapshot has it. All of it is below the hole for devices.
func (s *saga) stored() []byte {
	s.t.Helper()
	opts := s.diskOptions()
	r, err := opts.Store.Open(s.t.Context(), s.job.ID, opts.Identities...)
	if err != nil {
		s.fatalf("%v", err)
	}
	defer r.Close()
	mem := make([]byte, r.Header().RAMBytes)
	for chunk := range r.Chunks() {
		err := r.Fetch(s.t.Context(), chunk, func(gpa uint64, pages []byte) error {
			copy(mem[gpa:], pages)
			return nil
		})
		if err != nil {
			s.fatalf("%v", err)
		}
	}
	return mem
}

// changes are the pages of after that differ from those of before, which is as long.
func changes(before, after []byte) (out []byte) {
	for at := 0; at < len(after); at += snapshot.PageSize {
		if page := after[at:][:snapshot.PageSize]; !bytes.Equal(page, before[at:][:snapshot.PageSize]) {
			out = append(out, page...)
		}
	}
	return out
}
