// Command charts draws what the benchmarks of pauses measured:
//
//	go test -run '^$' -bench Pause -benchtime 10x -count 5 ./bench | go run ./bench/charts DIR
//
// It reads files that are named after the directory, or else its input, and writes to the directory:
//
//   - pause-ram.svg: the time of a pause against the RAM, from BenchmarkPause/full and, if there, BenchmarkPause/prepared;
//   - pause-dirty.svg: the time of a diff pause against what was written, from BenchmarkPause/diff.
//
// A point is the median of all runs of one name, its whisker the least and the most.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// errNoResults says that there is nothing to draw.
var errNoResults = errors.New("no results of BenchmarkPause in what was read")

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: charts DIR [FILE...]")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "charts:", err)
		os.Exit(1)
	}
}

func run(dir string, files []string) error {
	r, err := read(files)
	if err != nil {
		return err
	}
	charts, err := r.charts()
	if err != nil {
		return err
	}
	if len(charts) == 0 {
		return errNoResults
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, c := range charts {
		if err := os.WriteFile(filepath.Join(dir, name), c.svg(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// read reads all files, or the standard input if there are none.
func read(files []string) (results, error) {
	r := results{}
	if len(files) == 0 {
		return r, r.read(os.Stdin)
	}
	for _, path := range files {
		if err := r.readFile(path); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r results) readFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return r.read(f)
}
