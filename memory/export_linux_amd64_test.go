package memory

// Held is how many bytes of host memory the image takes.
func (img *Image) Held() (uint64, error) { return allocated(img.file) }

// FD is the image's file.
func (img *Image) FD() int { return int(img.file.Fd()) }
