//go:build !linux

package lifecycle

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
)

func errShare() error {
	return fmt.Errorf("share an image on %s: %w", runtime.GOOS, errors.ErrUnsupported)
}

func checkPeer(*net.UnixConn) error                            { return errShare() }
func sendFile(*net.UnixConn, []byte, *os.File) error           { return errShare() }
func receiveFile(*net.UnixConn, int) ([]byte, *os.File, error) { return nil, nil, errShare() }
