# make test     sets up what the tests need (Debian or Ubuntu; see scripts/setup) and runs all of them
# make check    what CI runs: also the linter, builds for other systems, and the race detector
# make bench    the benchmarks, with 10 runs each
# make fuzz     a minute of fuzzing for each fuzz target (FUZZTIME=1h for more)

export CGO_ENABLED = 0
FUZZTIME ?= 1m

.PHONY: test check setup bench fuzz

test: setup
	go test -timeout 30m ./...

setup:
	scripts/setup

check:
	.ci/run

bench:
	go test -run '^$$' -bench . -benchtime 10x ./bench

fuzz:
	scripts/fuzz $(FUZZTIME)
