package snapshot

import (
	"errors"
	"fmt"

	"filippo.io/age"
)

// openManifest is a manifest that was decrypted and checked.
type openManifest struct {
	header *Header
	body   *body

	// What both were parsed from, byte by byte: the start of the file, and the plaintext of the rest.
	rawHeader, rawBody []byte
}

// readManifest reads, decrypts and checks the manifest in f, of which f.Size() is believed.
func readManifest(f *sourceBlob, id ID, identities []age.Identity) (*openManifest, error) {
	h, raw, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	if h.ID != id {
		return nil, parseError(ErrCorrupt, "header", 20, "is that of snapshot %v", h.ID)
	}
	plain, err := decryptBody(f, int64(len(raw)), f.Size(), identities)
	if err != nil {
		return nil, err
	}
	b, err := parseBody(plain)
	if err != nil {
		return nil, err
	}
	if err := b.checkHeader(h, raw); err != nil {
		return nil, err
	}
	return &openManifest{h, b, raw, plain}, nil
}

// stageManifest writes and syncs a manifest, still without a name, and says how
// many bytes it has. The caller owns the file.
func (s *Store) stageManifest(header, body []byte, recipients []age.Recipient) (stagedFile, uint64, error) {
	f, err := s.files.Stage(s.manifests())
	if err != nil {
		return nil, 0, err
	}
	size, err := writeManifest(f, header, body, recipients)
	if err != nil {
		return nil, 0, errors.Join(err, f.Discard())
	}
	return f, size, nil
}

func writeManifest(f stagedFile, header, body []byte, recipients []age.Recipient) (uint64, error) {
	sink := &countingWriter{w: f}
	if _, err := sink.Write(header); err != nil {
		return 0, err
	}
	sealer, err := age.Encrypt(sink, recipients...)
	if err != nil && sink.err == nil {
		err = fmt.Errorf("%w: %w", ErrRecipients, err)
	}
	if err != nil {
		return 0, err
	}
	if _, err := sealer.Write(body); err != nil {
		return 0, err
	}
	if err := sealer.Close(); err != nil {
		return 0, err
	}
	return sink.n, f.Sync()
}

// checkRecipients finds what age would refuse, as far as that can be told before
// the recipients are used: a Writer's are used when everything else is written.
func checkRecipients(recipients []age.Recipient) error {
	if len(recipients) == 0 {
		return fmt.Errorf("%w: a snapshot needs at least one recipient", ErrInvalid)
	}
	var quantum, classic bool
	for _, r := range recipients {
		switch r.(type) {
		case *age.ScryptRecipient:
			if len(recipients) > 1 {
				return fmt.Errorf("%w: a passphrase must be the only recipient", ErrRecipients)
			}
		case *age.HybridRecipient:
			quantum = true
		case age.RecipientWithLabels: // a plugin says when it is asked
		default:
			classic = true
		}
	}
	if quantum && classic {
		return fmt.Errorf("%w: a post-quantum recipient can't be mixed with others, which would leave the snapshot open to quantum computers",
			ErrRecipients)
	}
	return nil
}
