package linuxvm

import (
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

func TestDeviceModulesAreCached(t *testing.T) {
	for _, name := range []string{kvmlab.Cloud, kvmlab.Generic} {
		kernel, err := kvmlab.OpenKernel(name)
		if _, missing := errors.AsType[*kvmlab.UnavailableError](err); missing {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kernel.Modules(deviceModules(name)...); err != nil {
			t.Error(err)
		}
	}
}

// TestLinuxModules loads them all, without any device.
func TestLinuxModules(t *testing.T) {
	cfg := kvmlab.Config{Kernels: []string{kvmlab.Cloud, kvmlab.Generic}}
	Run(t, cfg, func(t *testing.T, lab *Lab) {
		for _, name := range cfg.Kernels {
			g, _ := lab.Boot(t, Options{Kernel: name, Modules: deviceModules(name)})
			for _, order := range []string{"entropy", "hog 8", "unhog", "vsock-listen 1000"} {
				if lines, err := g.Order(t.Context(), order); err != nil {
					t.Errorf("%s: %v after %q", order, err, lines)
				}
			}
		}
	})
}
