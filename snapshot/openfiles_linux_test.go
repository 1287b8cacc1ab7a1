package snapshot

import "testing"

func openFiles(t *testing.T) int { return countFDs(t) }
