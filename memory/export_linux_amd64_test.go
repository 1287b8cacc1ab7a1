package memory

import "golang.org/x/sys/unix"

// Held is how many bytes of host memory the image takes.
func (img *Image) Held() (uint64, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(img.file.Fd()), &st)
	return uint64(st.Blocks) * 512, err
}
