package memory

// Held is how many bytes of host memory the image takes.
func (img *Image) Held() (uint64, error) { return allocated(img.file) }
