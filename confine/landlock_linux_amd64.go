package confine

import (
	"fmt"
	"io/fs"
	"os"

	"github.com/landlock-lsm/go-landlock/landlock"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
)

// Sets of rights. None has that to execute, and none that to make devices, pipes and symbolic links.
const (
	readFile  = landlock.AccessFSSet(llsys.AccessFSReadFile)
	writeFile = readFile | llsys.AccessFSWriteFile | llsys.AccessFSTruncate
	device    = readFile | llsys.AccessFSWriteFile | llsys.AccessFSTruncate | llsys.AccessFSIoctlDev
	readDir   = readFile | llsys.AccessFSReadDir
	writeDir  = readDir | writeFile | llsys.AccessFSMakeDir | llsys.AccessFSMakeReg | llsys.AccessFSMakeSock |
		llsys.AccessFSRemoveDir | llsys.AccessFSRemoveFile | llsys.AccessFSRefer | llsys.AccessFSResolveUnix
	// Whoever removes a file durably opens its directory, to sync it.
	remove  = landlock.AccessFSSet(llsys.AccessFSRemoveFile | llsys.AccessFSReadDir)
	sockets = landlock.AccessFSSet(llsys.AccessFSRemoveFile | llsys.AccessFSResolveUnix)
)

// What is allowed in any case, where it is there.
var (
	devices = []string{"/dev/kvm", "/dev/userfaultfd", "/dev/null"}
	system  = []string{"/dev/urandom", "/etc/localtime"}
	zones   = []string{"/usr/share/zoneinfo"}
)

// What Go's resolver and its check of certificates read.
var (
	networkFiles = []string{"/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/services"}
	networkDirs  = []string{"/etc/ssl", "/etc/pki", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates"}
)

// landlockRules looks at what is behind the paths: a file can't be given the rights of a directory.
func landlockRules(r Rules) ([]landlock.Rule, error) {
	var rules []landlock.Rule
	for _, list := range []struct {
		paths           []string
		file, dev, tree landlock.AccessFSSet
	}{
		{r.ReadWrite, writeFile, device, writeDir},
		{r.ReadOnly, readFile, readFile, readDir},
		{r.Remove, 0, 0, remove},
		{r.Sockets, 0, 0, sockets},
	} {
		for _, path := range list.paths {
			fi, err := os.Stat(path)
			if err != nil {
				return nil, fmt.Errorf("confine: what is to be allowed: %w", err)
			}
			access := list.file
			switch {
			case fi.IsDir():
				access = list.tree
			case access == 0:
				return nil, fmt.Errorf("confine: %s is not a directory", path)
			case fi.Mode()&fs.ModeDevice != 0:
				access = list.dev
			}
			rules = append(rules, landlock.PathAccess(access, path))
		}
	}
	return rules, nil
}

// restrictFiles has Landlock allow the rules, and what is needed in any case, on every thread.
func restrictFiles(r Rules, rules []landlock.Rule) error {
	self, err := os.Open("/proc/self")
	if err != nil {
		return fmt.Errorf("confine: %w", err)
	}
	pinned = append(pinned, self)
	rules = append(rules,
		landlock.PathAccess(device, devices...).IgnoreIfMissing(),
		landlock.PathAccess(readFile, system...).IgnoreIfMissing(),
		landlock.PathAccess(readDir, zones...).IgnoreIfMissing(),
		landlock.PathAccess(readDir, "/proc/self"))
	config := landlock.V11
	if r.Network {
		config.HandledAccessNet = 0
		rules = append(rules,
			landlock.PathAccess(readFile, networkFiles...).IgnoreIfMissing(),
			landlock.PathAccess(readDir, networkDirs...).IgnoreIfMissing())
	}
	// The best effort leaves out what the kernel does not know, one right at a time.
	if err := config.BestEffort().Restrict(rules...); err != nil {
		return fmt.Errorf("confine: bound the files: %w", err)
	}
	return nil
}
