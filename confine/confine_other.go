//go:build !linux || !amd64

package confine

// Supported says how far this system can confine a process: not at all.
func Supported() Level { return Level{} }

// Apply returns ErrUnsupported.
func Apply(Rules) (Level, error) { return Level{}, ErrUnsupported }
