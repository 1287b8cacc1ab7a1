//go:build linux && amd64

package kvmlab

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// envProgram makes this test binary a program for the lab.
const envProgram = "KVMLAB_TEST_PROGRAM"

// longOutput is more than all buffers between the lab and the test hold.
var longOutput = strings.Repeat("0123456789abcde\n", 16<<10)

// programs run in the lab; what they return is the exit code.
var programs = map[string]func() int{
	"ok":    func() int { return 0 },
	"three": func() int { return 3 },
	"args": func() int {
		dir, err := os.Getwd()
		text, readErr := os.ReadFile("tree/sub/file")
		fmt.Println(os.Args[1:], dir, err, string(text), readErr, os.Getenv("GOMAXPROCS"), Inside(), Direct())
		fmt.Fprintln(os.Stderr, "to stderr")
		return 0
	},
	"long": func() int {
		fmt.Print(longOutput)
		return 0
	},
	"killed": func() int {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		return 0
	},
	// A process that is left behind with standard output open.
	"orphan": func() int {
		self, err := os.Executable()
		if err != nil {
			return 1
		}
		cmd := exec.Command(self)
		cmd.Env = []string{envProgram + "=forever"}
		cmd.Stdout = os.Stdout
		if err := cmd.Start(); err != nil {
			return 1
		}
		return 5
	},
	"forever": func() int {
		fmt.Println("started")
		r, _, err := os.Pipe()
		if err != nil {
			return 1
		}
		_, _ = io.ReadAll(r)
		return 0
	},
	"panic": func() int {
		if err := os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0); err != nil {
			fmt.Println(err)
		}
		return 0
	},
}

func TestMain(m *testing.M) {
	if program, ok := programs[os.Getenv(envProgram)]; ok {
		os.Exit(program())
	}
	os.Exit(m.Run())
}
