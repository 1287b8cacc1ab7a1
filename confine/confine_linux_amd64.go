package confine

import (
	"os"
	"sync"

	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
)

// minLandlock is the first version that lets a process keep moving files between directories (Linux 5.19).
const minLandlock = 2

// Supported says how far this system can confine a process.
func Supported() Level {
	l := Level{Seccomp: haveSeccomp()}
	if abi, err := llsys.LandlockGetABIVersion(); err == nil && abi >= minLandlock {
		l.Landlock = abi
	}
	return l
}

// applied is set by the first Apply. pinned, which is /proc/self, keeps the kernel from forgetting that directory, and the rule for it with it.
var (
	mu      sync.Mutex
	applied bool
	pinned  []*os.File
)

// Apply confines the process, all of its threads and those to come, for good, and says how far. Where the kernel has no Landlock
// only system calls are bounded: see Level. It may be called while guests run, and works once: then it returns
// ErrApplied. It returns ErrUnsupported where nothing can be done. With another error the process may be confined in part, and should end.
func Apply(r Rules) (Level, error) {
	mu.Lock()
	defer mu.Unlock()
	if applied {
		return Level{}, ErrApplied
	}
	level := Supported()
	if !level.Seccomp {
		return Level{}, ErrUnsupported
	}
	rules, err := landlockRules(r)
	if err != nil {
		return Level{}, err
	}
	program, err := filter(r, os.Getpid())
	if err != nil {
		return Level{}, err
	}
	applied = true
	if level.Landlock > 0 {
		if err := restrictFiles(r, rules); err != nil {
			return Level{}, err
		}
	}
	return level, install(program) // last, as it allows none of this
}
