//go:build linux && amd64

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Names of our rows.
const (
	ours      = "Cryovisor (compressed, encrypted)"
	oursEager = "Cryovisor, eager"
	oursLazy  = "Cryovisor, lazy"
)

// row is what was measured of one subject.
type row struct {
	name   string
	took   []time.Duration
	stored int64 // bytes, the last time
}

// note adds a measurement to the row of its name.
func note(rows *[]*row, name string, took time.Duration, stored int64) {
	i := slices.IndexFunc(*rows, func(r *row) bool { return r.name == name })
	if i < 0 {
		i = len(*rows)
		*rows = append(*rows, &row{name: name})
	}
	r := (*rows)[i]
	r.took, r.stored = append(r.took, took), stored
}

// median is the middle one, or the mean of the two in the middle.
func median(d []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// ratio writes how many times as large a number is as another.
func ratio(x, base float64) string {
	switch r := x / base; {
	case r < 0.1:
		return fmt.Sprintf("%.3f", r)
	case r < 100:
		return fmt.Sprintf("%.2f", r)
	default:
		return fmt.Sprintf("%.0f", r)
	}
}

// timeRatio compares the medians of two rows.
func timeRatio(r, base *row) string {
	return ratio(float64(median(r.took)), float64(median(base.took)))
}

// show writes a time in the unit that suits it.
func show(d time.Duration) string {
	if d < 100*time.Millisecond {
		return fmt.Sprintf("%.1f ms", d.Seconds()*1e3)
	}
	return fmt.Sprintf("%.3f s", d.Seconds())
}

// timing is the part of a line that all tables have.
func timing(r *row) string {
	return fmt.Sprintf("| %s | %s | %s to %s |", r.name, show(median(r.took)), show(slices.Min(r.took)), show(slices.Max(r.took)))
}

// storeTable compares pauses with the first row, which is ours.
func storeTable(rows []*row) string {
	var b strings.Builder
	b.WriteString("| | median | min to max | stored, MB | time / ours | stored / ours |\n|---|---|---|---|---|---|\n")
	for _, r := range rows {
		stored := ratio(float64(r.stored), float64(rows[0].stored))
		fmt.Fprintf(&b, "%s %.0f | %s | %s |\n", timing(r), float64(r.stored)/1e6, timeRatio(r, rows[0]), stored)
	}
	return b.String()
}

// loadTable compares resumes with the first two rows, which are ours.
func loadTable(rows []*row) string {
	var b strings.Builder
	b.WriteString("| | median | min to max | time / eager | time / lazy |\n|---|---|---|---|---|\n")
	for _, r := range rows {
		fmt.Fprintf(&b, "%s %s | %s |\n", timing(r), timeRatio(r, rows[0]), timeRatio(r, rows[1]))
	}
	return b.String()
}
