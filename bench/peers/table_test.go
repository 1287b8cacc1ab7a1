//go:build linux && amd64

package main

import (
	"testing"
	"time"
)

func milliseconds(ms ...int) (d []time.Duration) {
	for _, n := range ms {
		d = append(d, time.Duration(n)*time.Millisecond)
	}
	return d
}

func TestMedian(t *testing.T) {
	for want, of := range map[time.Duration][]time.Duration{
		7 * time.Millisecond:    milliseconds(7),
		5 * time.Millisecond:    milliseconds(9, 1, 5),
		4500 * time.Microsecond: milliseconds(90, 5, 4, 1),
	} {
		if got := median(of); got != want {
			t.Errorf("the median of %v is %v, want %v", of, got, want)
		}
	}
}

func TestRatio(t *testing.T) {
	for want, of := range map[string][2]float64{"1.00": {5, 5}, "0.020": {1, 50}, "0.25": {1, 4}, "99.50": {199, 2}, "250": {500, 2}} {
		if got := ratio(of[0], of[1]); got != want {
			t.Errorf("%v is %s, want %s", of, got, want)
		}
	}
}

func TestTables(t *testing.T) {
	var stores, loads []*row
	for _, ms := range milliseconds(500, 400, 440) {
		note(&stores, ours, ms, 300e6)
		note(&stores, "other", 3*ms, 810e6)
		note(&loads, oursEager, ms, 0)
		note(&loads, oursLazy, ms/50, 0)
		note(&loads, "other", 2*ms, 0)
	}
	for got, want := range map[string]string{
		storeTable(stores): `| | median | min to max | stored, MB | time / ours | stored / ours |
|---|---|---|---|---|---|
| Cryovisor (compressed, encrypted) | 0.440 s | 0.400 s to 0.500 s | 300 | 1.00 | 1.00 |
| other | 1.320 s | 1.200 s to 1.500 s | 810 | 3.00 | 2.70 |
`,
		loadTable(loads): `| | median | min to max | time / eager | time / lazy |
|---|---|---|---|---|
| Cryovisor, eager | 0.440 s | 0.400 s to 0.500 s | 1.00 | 50.00 |
| Cryovisor, lazy | 8.8 ms | 8.0 ms to 10.0 ms | 0.020 | 1.00 |
| other | 0.880 s | 0.800 s to 1.000 s | 2.00 | 100 |
`,
	} {
		if got != want {
			t.Errorf("got:\n%s\nwant:\n%s", got, want)
		}
	}
}
