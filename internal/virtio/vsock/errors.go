package vsock

import "errors"

var (
	// ErrConfig is wrapped by errors about a Config that can't work.
	ErrConfig = errors.New("vsock: invalid configuration")
	// ErrInUse is wrapped by errors about a Path that another process listens on, or that is no socket.
	ErrInUse = errors.New("vsock: the path is in use")
	// ErrConnectLine is wrapped by errors about what a host program wrote in place of "CONNECT <port>\n".
	ErrConnectLine = errors.New("vsock: not a CONNECT line")
)
