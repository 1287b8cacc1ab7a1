//go:build linux && amd64

package kvmlab

import "time"

// readTSC returns the processor's time stamp counter. The emulated one counts as fast.
func readTSC() uint64

// tscSample is one moment, on two clocks.
type tscSample struct {
	tsc uint64
	at  time.Time
}

// sampleTries is how often a sample is taken for one that no scheduling came between.
const sampleTries = 10

// sampleTSC reads both clocks as close together as it gets.
func sampleTSC() tscSample {
	var best tscSample
	for shortest, try := ^uint64(0), 0; try < sampleTries; try++ {
		before := readTSC()
		at := time.Now()
		after := readTSC()
		if after-before < shortest {
			shortest = after - before
			best = tscSample{before + shortest/2, at}
		}
	}
	return best
}

// minTSCWindow is the time between two samples that makes their clocks' resolution negligible.
const minTSCWindow = 20 * time.Millisecond

// tscKHz returns the frequency of the time stamp counter, measured since an earlier sample. The
// lab's kernel is told: where it has to measure on a busy machine, it may be wrong by a factor of
// ten, and all its clocks and time limits with it.
func tscKHz(since tscSample) uint64 {
	if rest := minTSCWindow - time.Since(since.at); rest > 0 {
		time.Sleep(rest)
	}
	now := sampleTSC()
	return (now.tsc - since.tsc) * uint64(time.Millisecond) / uint64(now.at.Sub(since.at))
}
