package lifecycle

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// fileKey is what the host says of a regular file that changes when its contents do, and when that was last. The time of the
// last change of the inode can't be set by its owner. A block device has no key.
func fileKey(path string) (key string, changed time.Time, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", time.Time{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return "", time.Time{}, nil
	}
	key = fmt.Sprintf("%d %d %d %d %d", st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano())
	return key, time.Unix(0, max(st.Mtim.Nano(), st.Ctim.Nano())), nil
}
