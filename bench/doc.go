// Package bench measures pause and resume over the public API, with memory of a
// content like that of real processes:
//
//	go test -run '^$' -bench . ./bench
//
// The command in peers compares pauses and resumes with QEMU's, on the same memory in one run; the command in charts
// draws the results of BenchmarkPause:
//
//	go run ./bench/peers -ram 4GiB
//	go test -run '^$' -bench Pause -benchtime 10x -count 5 ./bench | go run ./bench/charts DIR
//
// Results on known machines are in RESULTS.md. Snapshots go to the directory in
// $CRYOVISOR_BENCH_DIR, /dev/shm by default: a benchmark on a disk measures the
// disk too.
package bench
