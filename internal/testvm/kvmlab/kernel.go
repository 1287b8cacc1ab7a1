package kvmlab

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Names of the kernels in the cache.
const (
	// Cloud is Debian's kernel for virtual machines (linux-image-cloud-amd64), the lab's own.
	Cloud = "cloud"
	// Generic is Debian's ordinary kernel (linux-image-amd64). It has VMGenID and 9p, and ext4
	// as a module.
	Generic = "generic"
)

// Kernel is a Debian kernel in the lab's cache.
type Kernel struct {
	Name    string // Cloud or Generic
	Package string // name and version of the package that it is from
	Image   string // path of the bzImage
	dir     string // of the modules
}

// CacheDir returns the directory of the lab's cache, which need not exist.
func CacheDir() (string, error) {
	if dir := os.Getenv(EnvCache); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("KVM lab: cache directory: %w; set %s", err, EnvCache)
	}
	return filepath.Join(dir, "cryovisor", "lab"), nil
}

// OpenKernel finds a kernel in the cache. The error is an *UnavailableError if it is not there.
// In the lab, it finds what Config.Kernels asked for.
func OpenKernel(name string) (*Kernel, error) {
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, name)
	pkg, err := os.ReadFile(filepath.Join(dir, "package"))
	if err != nil {
		return nil, &UnavailableError{
			Missing: fmt.Sprintf("no %s kernel in %s", name, cache), Fix: "run scripts/setup", Err: err,
		}
	}
	return &Kernel{
		Name:    name,
		Package: strings.TrimSpace(string(pkg)),
		Image:   filepath.Join(dir, "vmlinuz"),
		dir:     filepath.Join(dir, "modules"),
	}, nil
}

// Modules returns the paths of the named modules and of all that they depend on, in the order in
// which they can be loaded. Names are with - or _.
func (k *Kernel) Modules(names ...string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(k.dir, "*.ko"))
	if err != nil {
		return nil, fmt.Errorf("KVM lab: modules of the %s kernel: %w", k.Name, err)
	}
	byName := make(map[string]string, len(files))
	for _, file := range files {
		byName[moduleName(filepath.Base(file))] = file
	}
	r := moduleResolver{kernel: k, files: byName, seen: map[string]bool{}}
	for _, name := range names {
		if err := r.add(moduleName(name)); err != nil {
			return nil, err
		}
	}
	return r.order, nil
}

// moduleName is the name that the kernel knows a module by: file names have - where it has _.
func moduleName(name string) string {
	return strings.ReplaceAll(strings.TrimSuffix(name, ".ko"), "-", "_")
}

// moduleResolver orders modules by what they depend on.
type moduleResolver struct {
	kernel *Kernel
	files  map[string]string // by module name
	seen   map[string]bool
	order  []string
}

func (r *moduleResolver) add(name string) error {
	if r.seen[name] {
		return nil
	}
	r.seen[name] = true
	file, ok := r.files[name]
	if !ok {
		return fmt.Errorf("KVM lab: the cached %s kernel has no module %s (scripts/setup lists what is kept)", r.kernel.Name, name)
	}
	depends, err := moduleDepends(file)
	if err != nil {
		return err
	}
	for _, dep := range depends {
		if err := r.add(moduleName(dep)); err != nil {
			return err
		}
	}
	r.order = append(r.order, file)
	return nil
}

// moduleDepends reads the names of the modules that a module needs from its .modinfo section.
func moduleDepends(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("KVM lab: module %s: %w", file, err)
	}
	defer func() { _ = f.Close() }()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("KVM lab: module %s has no .modinfo", file)
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("KVM lab: module %s: %w", file, err)
	}
	for _, entry := range bytes.Split(info, []byte{0}) {
		if list, ok := bytes.CutPrefix(entry, []byte("depends=")); ok && len(list) > 0 {
			return strings.Split(string(list), ","), nil
		}
	}
	return nil, nil
}
