package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/vmm"
)

func TestStory(t *testing.T) {
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) || errors.Is(err, vmm.ErrNotSupported) {
		t.Skip(err)
	}
	var out strings.Builder
	if err := story(t.Context(), t.TempDir(), &out); err != nil {
		t.Fatal(err)
	}
	const want = `1 was paused; it is running again: true
it is paused, because of its timeout
30 days later it is not found: true
a killed one is not found: true
`
	if out.String() != want {
		t.Errorf("it says\n%s\nwant\n%s", out.String(), want)
	}
}
