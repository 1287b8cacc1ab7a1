package main

import (
	"errors"
	"fmt"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"filippo.io/age/plugin"
	"filippo.io/age/tag"
)

// errNotRecipient does not quote what was given, which may be a secret.
var errNotRecipient = errors.New("is no age recipient (age1...) and no SSH public key of a kind that is known here")

// parseRecipient parses a recipient of any kind but a passphrase.
func parseRecipient(s string, ui *plugin.ClientUI) (age.Recipient, error) {
	switch {
	case strings.HasPrefix(s, "age1tag1"), strings.HasPrefix(s, "age1tagpq1"):
		return tag.ParseRecipient(s)
	case strings.HasPrefix(s, "age1pq1"):
		return age.ParseHybridRecipient(s)
	case strings.HasPrefix(s, "age1") && strings.Count(s, "1") > 1: // Bech32 data has no 1
		return plugin.NewRecipient(s, ui)
	case strings.HasPrefix(s, "age1"):
		return age.ParseX25519Recipient(s)
	case strings.HasPrefix(s, "ssh-"):
		r, err := agessh.ParseRecipient(s)
		if err != nil {
			return nil, errNotRecipient
		}
		return r, nil
	case strings.HasPrefix(s, "AGE-"):
		return nil, errors.New("is an identity, which is a secret; what is needed is its recipient")
	}
	return nil, errNotRecipient
}

// readRecipients reads a file of recipients, one a line; lines that start with # are comments.
func readRecipients(path string, ui *plugin.ClientUI) ([]age.Recipient, error) {
	f, err := openKeyFile(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := readSmall(f)
	if err != nil {
		return nil, err
	}
	var all []age.Recipient
	for i, line := range strings.Split(string(b), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		r, err := parseRecipient(line, ui)
		if err != nil {
			return nil, fmt.Errorf("recipients file %s: line %d: %w", path, i+1, err)
		}
		all = append(all, r)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("recipients file %s holds no recipient", path)
	}
	return all, nil
}

// isPlugin says whether another program is started to encrypt to r.
func isPlugin(r age.Recipient) bool {
	_, is := r.(*plugin.Recipient)
	return is
}

// recipientsOf are the recipients that identities are for.
func recipientsOf(ids []age.Identity) (all []age.Recipient, err error) {
	for _, id := range ids {
		var r age.Recipient
		switch id := id.(type) {
		case *age.X25519Identity:
			r = id.Recipient()
		case *age.HybridIdentity:
			r = id.Recipient()
		case *agessh.Ed25519Identity:
			r = id.Recipient()
		case *agessh.RSAIdentity:
			r = id.Recipient()
		case *agessh.EncryptedSSHIdentity:
			r = id.Recipient()
		case *plugin.Identity:
			r = id.Recipient()
		default:
			return nil, fmt.Errorf("the identity file holds a key (%T) whose recipient can't be derived; name it with --recipient", id)
		}
		all = append(all, r)
	}
	return all, nil
}
