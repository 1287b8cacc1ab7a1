package blockdev

import (
	"crypto/sha256"
	"slices"
)

// Storage is what an overlay lies in.
type Storage = storage

// NewOverlayIn makes an overlay in an empty file.
func NewOverlayIn(file Storage, lower Device, opts OverlayOptions) (*Overlay, error) {
	return newOverlay(file, "(test)", lower, opts)
}

// OpenOverlayIn opens an overlay.
func OpenOverlayIn(file Storage, lower Device) (*Overlay, error) {
	return loadOverlay(file, "(test)", lower)
}

// SealOverlayHeader puts the right checksum into a header.
func SealOverlayHeader(b []byte) []byte {
	b = slices.Clone(b)
	sum := sha256.Sum256(b[:overlayDigestAt])
	copy(b[overlayDigestAt:], sum[:])
	return b
}

// WantingStill is a Still whose wishes come from a channel.
type WantingStill struct {
	*Still
	Wanted chan Extent
}

// FreezeWith is Freeze with so many copies at most.
func (o *Overlay) FreezeWith(blocks []Extent, buffers int) (*WantingStill, error) {
	s := &WantingStill{Wanted: make(chan Extent, 4*buffers)}
	var err error
	s.Still, err = o.freeze(blocks, func(e Extent) {
		select {
		case s.Wanted <- e:
		default:
		}
	}, buffers)
	return s, err
}
