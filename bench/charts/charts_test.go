package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestCharts draws results like those of the benchmarks. Look at the golden files after an update.
func TestCharts(t *testing.T) {
	dir := t.TempDir()
	if *update {
		dir = "testdata"
	}
	if err := run(dir, []string{"testdata/bench.txt"}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pause-ram.svg", "pause-dirty.svg"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, bytes.ReplaceAll(want, []byte("\r\n"), []byte("\n"))) {
			t.Errorf("%s is not as in testdata (go test ./bench/charts -update)", name)
		}
		var svg struct{ XMLName xml.Name }
		if err := xml.Unmarshal(got, &svg); err != nil || svg.XMLName.Local != "svg" {
			t.Errorf("%s is not XML of an SVG image: %v", name, err)
		}
	}
}

func TestReadResults(t *testing.T) {
	r := results{}
	in := "BenchmarkA/x-2 10 5 ms 1.5 s/GiB\nBenchmarkA/x 1 3 ms\nBenchmarkA/x-2 10 noise\nBenchmarkA/x-2 10 a ms\n--- BENCH: x 1\n"
	if err := r.read(strings.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	if got := r["BenchmarkA/x"]; len(r) != 1 || !slices.Equal(got["ms"], []float64{5, 3}) || !slices.Equal(got["s/GiB"], []float64{1.5}) {
		t.Errorf("got %v", r)
	}
}

func TestPoints(t *testing.T) {
	if got, want := newPoint(4, []float64{0.5, 0.25, 1}, 4), (point{4, 2, 1, 4}); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := median([]float64{9, 1, 4, 2}); got != 3 {
		t.Errorf("the median is %v, want 3", got)
	}
}

func TestAxis(t *testing.T) {
	for _, c := range []struct{ most, end, step float64 }{{16, 16, 2}, {9.7, 10, 2}, {560, 600, 100}, {0.43, 0.5, 0.1}, {1, 1, 0.2}, {0, 1, 0.2}} {
		a := newAxis(c.most, 0, 100)
		if math.Abs(a.end-c.end) > 1e-9 || math.Abs(a.step-c.step) > 1e-9 {
			t.Errorf("up to %v: end %v, step %v; want %v, %v", c.most, a.end, a.step, c.end, c.step)
		}
		if a.at(0) != 0 || a.at(a.end) != 100 || math.Abs(a.at(a.end/4)-25) > 1e-9 {
			t.Errorf("up to %v: the ends are at %v and %v", c.most, a.at(0), a.at(a.end))
		}
	}
}

func TestNothingToDraw(t *testing.T) {
	path := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(path, []byte("PASS\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(t.TempDir(), []string{path}); !errors.Is(err, errNoResults) {
		t.Errorf("got %v, want %v", err, errNoResults)
	}
}
