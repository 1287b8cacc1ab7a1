//go:build !unix

package main

// forbidCoreDumps does nothing: there is no such limit.
func forbidCoreDumps() error { return nil }
