package main

import (
	"bufio"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
)

// results are the values that were measured, by the benchmark's name and by the unit; one for each run.
type results map[string]map[string][]float64

// processors is what is put after a benchmark's name: how many threads ran Go.
var processors = regexp.MustCompile(`-\d+$`)

// read adds the results among the lines of what "go test -bench" printed.
func (r results) read(in io.Reader) error {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		r.add(strings.Fields(lines.Text()))
	}
	return lines.Err()
}

// add takes the words of a line: a name, the iterations, and pairs of a value and a unit. It is no result if they are not that.
func (r results) add(words []string) {
	if len(words) < 4 || len(words)%2 != 0 || !strings.HasPrefix(words[0], "Benchmark") {
		return
	}
	values := map[string]float64{}
	for i := 2; i < len(words); i += 2 {
		v, err := strconv.ParseFloat(words[i], 64)
		if err != nil {
			return
		}
		values[words[i+1]] = v
	}
	name := processors.ReplaceAllString(words[0], "")
	if r[name] == nil {
		r[name] = map[string][]float64{}
	}
	for unit, v := range values {
		r[name][unit] = append(r[name][unit], v)
	}
}

// median is the middle one, or the mean of the two in the middle.
func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// charts are those that there are results for, by their files' names.
func (r results) charts() (map[string]chart, error) {
	full, err := r.againstRAM("full", "s/GiB", func(gib float64) float64 { return gib })
	if err != nil {
		return nil, err
	}
	prepared, err := r.againstRAM("prepared", "total-ms", func(float64) float64 { return 1e-3 })
	if err != nil {
		return nil, err
	}
	charts := map[string]chart{}
	ram := chart{title: "Pause, until durable, by RAM", x: "RAM, GiB", y: "pause, s"}
	ram.add("full pause", full)
	ram.add("prepared pause", prepared)
	if len(ram.series) > 0 {
		if i := slices.IndexFunc(full, func(p point) bool { return p.x == 1 }); i >= 0 {
			ram.slope = full[i].y
			ram.slopeName = "linear from 1 GiB"
		}
		charts["pause-ram.svg"] = ram
	}
	dirty := chart{title: "Diff pause, until durable, by memory written", x: "written since the resume, MiB", y: "pause, ms"}
	dirty.add("diff pause", r.againstDirty())
	if len(dirty.series) > 0 {
		charts["pause-dirty.svg"] = dirty
	}
	return charts, nil
}

const pauses = "BenchmarkPause/"

// againstRAM are the pauses of a kind whose names end in the size of the guest. factor makes seconds of the unit.
func (r results) againstRAM(kind, unit string, factor func(gib float64) float64) ([]point, error) {
	var points []point
	for name, values := range r {
		size, ok := strings.CutPrefix(name, pauses+kind+"/")
		if !ok || len(values[unit]) == 0 {
			continue
		}
		bytes, err := humanize.ParseBytes(size)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		gib := float64(bytes) / (1 << 30)
		points = append(points, newPoint(gib, values[unit], factor(gib)))
	}
	return points, nil
}

// againstDirty are the diff pauses.
func (r results) againstDirty() []point {
	var points []point
	for name, values := range r {
		if strings.HasPrefix(name, pauses+"diff/") && len(values["dirty-MiB"]) > 0 && len(values["ms"]) > 0 {
			points = append(points, newPoint(median(values["dirty-MiB"]), values["ms"], 1))
		}
	}
	return points
}

func newPoint(x float64, y []float64, factor float64) point {
	return point{x: x, y: median(y) * factor, low: slices.Min(y) * factor, high: slices.Max(y) * factor}
}
