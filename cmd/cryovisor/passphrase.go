package main

import (
	"errors"
	"fmt"
	"strings"

	"filippo.io/age"
)

var errWrongPassphrase = errors.New("the passphrase is wrong")

// passphraseIdentity opens what is encrypted to a passphrase, for which it asks only then, and once.
type passphraseIdentity struct {
	passphrase func() (string, error)
	otherwise  error // for what is encrypted to others; nil: that is not for this identity

	asked *age.ScryptIdentity
}

// Unwrap implements age.Identity.
func (p *passphraseIdentity) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	if len(stanzas) != 1 || stanzas[0].Type != "scrypt" { // a passphrase is alone
		if p.otherwise != nil {
			return nil, p.otherwise
		}
		return nil, age.ErrIncorrectIdentity
	}
	if p.asked == nil {
		s, err := p.passphrase()
		if err != nil {
			return nil, err
		}
		if p.asked, err = age.NewScryptIdentity(s); err != nil {
			return nil, err
		}
	}
	key, err := p.asked.Unwrap(stanzas)
	if errors.Is(err, age.ErrIncorrectIdentity) {
		p.asked = nil // who mistyped is asked again for the next
		return nil, errWrongPassphrase
	}
	return key, err
}

// readPassphrase reads a file that holds a passphrase, and perhaps the end of its line.
func readPassphrase(path string) (string, error) {
	b, err := readPrivate(path)
	if err != nil {
		return "", fmt.Errorf("passphrase file: %w", err)
	}
	s := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	switch {
	case s == "":
		return "", fmt.Errorf("passphrase file %s is empty", path)
	case strings.ContainsAny(s, "\r\n"):
		return "", fmt.Errorf("passphrase file %s has more than one line", path)
	}
	return s, nil
}

// askTerminal asks for a passphrase.
func (k *keyFlags) askTerminal(prompt string) (string, error) {
	s, err := k.questioner().secret(prompt)
	if err != nil && !errors.Is(err, errNotAnswered) {
		err = fmt.Errorf("there is no terminal to ask for a passphrase (%w); name a file with --passphrase-file or --new-passphrase-file", err)
	}
	return s, err
}
