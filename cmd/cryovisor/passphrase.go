package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"filippo.io/age"
	"golang.org/x/term"
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

// askTerminal asks for a secret, and does not show what is typed. Standard input and output may be anything.
func askTerminal(prompt string) (string, error) {
	in, out, err := openTerminal()
	if err != nil {
		return "", fmt.Errorf("there is no terminal to ask for a passphrase (%w); name a file with --passphrase-file or --new-passphrase-file", err)
	}
	defer out.Close()
	defer in.Close()
	// Raw, so that Ctrl-C arrives here and the terminal is left as it was.
	was, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return "", err
	}
	defer term.Restore(int(in.Fd()), was) //nolint:errcheck // nothing can be done about it
	s, err := term.NewTerminal(terminal{in, out}, "").ReadPassword(prompt)
	if errors.Is(err, io.EOF) { // Ctrl-C, Ctrl-D
		fmt.Fprint(out, "\r\n")
		return "", errors.New("given up at the question for a passphrase")
	}
	return s, err
}

type terminal struct {
	io.Reader
	io.Writer
}

// openTerminal opens what the user sits at. It is two files on Windows.
func openTerminal() (in, out *os.File, err error) {
	from, to := "/dev/tty", "/dev/tty"
	if runtime.GOOS == "windows" {
		from, to = "CONIN$", "CONOUT$"
	}
	if in, err = os.OpenFile(from, os.O_RDWR, 0); err != nil {
		return nil, nil, err
	}
	if out, err = os.OpenFile(to, os.O_RDWR, 0); err != nil {
		in.Close()
		return nil, nil, err
	}
	return in, out, nil
}
