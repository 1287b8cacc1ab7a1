// Package bench measures pause and resume over the public API, with memory of a
// content like that of real processes:
//
//	go test -run '^$' -bench . ./bench
//
// Results on known machines are in RESULTS.md. Snapshots go to the directory in
// $CRYOVISOR_BENCH_DIR, /dev/shm by default: a benchmark on a disk measures the
// disk too.
package bench
