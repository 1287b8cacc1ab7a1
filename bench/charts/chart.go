package main

import (
	"bytes"
	"cmp"
	"fmt"
	"math"
	"slices"
)

// chart is a diagram of points, from zero on both axes.
type chart struct {
	title, x, y string // x and y name the axes, with their units
	series      []series
	slope       float64 // of a thin line from the origin, or 0
	slopeName   string
}

type series struct {
	name   string
	points []point // in the order of x
}

// point is a median, and the least and the most of what it is the median of.
type point struct{ x, y, low, high float64 }

// add adds a series that has points.
func (c *chart) add(name string, points []point) {
	if len(points) == 0 {
		return
	}
	slices.SortFunc(points, func(a, b point) int { return cmp.Or(cmp.Compare(a.x, b.x), cmp.Compare(a.y, b.y)) })
	c.series = append(c.series, series{name, points})
}

// The picture, in pixels: its size, and the plot in it.
const (
	width, height = 720, 440
	left, right   = 72, 696
	top, bottom   = 56, 376
	whisker       = 5 // half of its width
	lineHeight    = 20
)

// Colours are for the chart's own background, so that the page's does not matter.
const (
	paper = "#ffffff"
	ink   = "#24292f"
	grid  = "#d8dee4"
	thin  = "#6e7781"
)

var colours = []string{"#0969da", "#bc4c00"}

// axis maps values from 0 to its end to pixels.
type axis struct{ end, step, from, to float64 }

// newAxis is an axis for values up to most, with at most eight round steps.
func newAxis(most, from, to float64) axis {
	if most <= 0 {
		most = 1
	}
	step := math.Pow(10, math.Floor(math.Log10(most))-1)
	for i := 0; most/step > 8; i++ {
		step *= []float64{2, 2.5, 2}[i%3] // 1, 2, 5, 10
	}
	return axis{end: math.Ceil(most/step) * step, step: step, from: from, to: to}
}

func (a axis) at(v float64) float64 { return a.from + v/a.end*(a.to-a.from) }

// ticks are the values to be marked.
func (a axis) ticks() (t []float64) {
	for i := range int(math.Round(a.end/a.step)) + 1 {
		t = append(t, float64(i)*a.step)
	}
	return t
}

// svg draws the chart.
func (c chart) svg() []byte {
	maxX, maxY := 0.0, 0.0
	for _, s := range c.series {
		for _, p := range s.points {
			maxX, maxY = max(maxX, p.x), max(maxY, p.high)
		}
	}
	x, y := newAxis(maxX, left, right), newAxis(max(maxY, c.slope*maxX), bottom, top)
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="13">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="%s"/>`+"\n", width, height, paper)
	fmt.Fprintf(&b, `<text x="%d" y="32" font-size="16" fill="%s">%s</text>`+"\n", left, ink, c.title)
	c.axes(&b, x, y)
	if c.slope > 0 {
		line(&b, thin, x.at(0), y.at(0), x.at(maxX), y.at(c.slope*maxX))
	}
	for i, s := range c.series {
		s.draw(&b, colours[i%len(colours)], x, y)
	}
	c.legend(&b)
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// axes draws a grid, with numbers and names at its sides.
func (c chart) axes(b *bytes.Buffer, x, y axis) {
	for _, v := range x.ticks() {
		line(b, grid, x.at(v), top, x.at(v), bottom)
		text(b, x.at(v), bottom+lineHeight, "middle", ink, number(v))
	}
	for _, v := range y.ticks() {
		line(b, grid, left, y.at(v), right, y.at(v))
		text(b, left-8, y.at(v)+4, "end", ink, number(v))
	}
	line(b, ink, left, bottom, right, bottom)
	line(b, ink, left, top, left, bottom)
	text(b, (left+right)/2, bottom+2*lineHeight+4, "middle", ink, c.x)
	fmt.Fprintf(b, `<g transform="translate(24 %d) rotate(-90)">`, (top+bottom)/2)
	text(b, 0, 0, "middle", ink, c.y)
	b.WriteString("</g>\n")
}

// draw draws the points, their whiskers, and lines from point to point.
func (s series) draw(b *bytes.Buffer, colour string, x, y axis) {
	fmt.Fprintf(b, `<polyline fill="none" stroke="%s" stroke-width="2" points="`, colour)
	for i, p := range s.points {
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(b, "%.1f,%.1f", x.at(p.x), y.at(p.y))
	}
	b.WriteString(`"/>` + "\n")
	for _, p := range s.points {
		at, low, high := x.at(p.x), y.at(p.low), y.at(p.high)
		if p.low < p.high {
			line(b, colour, at, low, at, high)
			line(b, colour, at-whisker, low, at+whisker, low)
			line(b, colour, at-whisker, high, at+whisker, high)
		}
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="4" fill="%s"/>`+"\n", at, y.at(p.y), colour)
	}
}

// legend names the lines, in the corner that a rising curve leaves free.
func (c chart) legend(b *bytes.Buffer) {
	at := float64(top + lineHeight)
	entry := func(colour, name string) {
		line(b, colour, left+16, at-4, left+40, at-4)
		text(b, left+48, at, "start", ink, name)
		at += lineHeight
	}
	for i, s := range c.series {
		entry(colours[i%len(colours)], s.name)
	}
	if c.slope > 0 {
		entry(thin, c.slopeName)
	}
}

func line(b *bytes.Buffer, colour string, x1, y1, x2, y2 float64) {
	fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`+"\n", x1, y1, x2, y2, colour)
}

func text(b *bytes.Buffer, x, y float64, anchor, colour, s string) {
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s">%s</text>`+"\n", x, y, anchor, colour, s)
}

// number writes a tick without the noise of its computation.
func number(v float64) string { return fmt.Sprintf("%.6g", v) }
