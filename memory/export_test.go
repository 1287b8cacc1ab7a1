package memory

// SetBuffers sets how many pieces of 256 KiB the Still copies and nobody has read
// at most, for the time after Freeze.
func (s *Still) SetBuffers(n int) { s.buffers = n }
