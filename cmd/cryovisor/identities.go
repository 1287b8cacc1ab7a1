package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"filippo.io/age/armor"
	"filippo.io/age/plugin"
	"golang.org/x/crypto/ssh"
)

// maxKeyFile is the most that a file of identities or recipients may have, in bytes.
const maxKeyFile = 1 << 20

// openKeyFile opens what should be the name of a file of keys. If it is a key itself, no message repeats it.
func openKeyFile(path string) (*os.File, error) {
	if strings.HasPrefix(path, "AGE-") {
		return nil, errors.New("a file that holds an identity is needed, not the identity itself: " +
			"as an argument it can be seen by every process, so take it for known to others")
	}
	return os.Open(path)
}

// readPrivate reads a small file of secrets. It refuses one that others can read.
func readPrivate(path string) ([]byte, error) {
	f, err := openKeyFile(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if runtime.GOOS != "windows" && fi.Mode().IsRegular() && fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read by others (mode %v); run 'chmod 600' on it", path, fi.Mode().Perm())
	}
	return readSmall(f)
}

func readSmall(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err == nil && len(b) > maxKeyFile {
		err = fmt.Errorf("%s is too large for what it is to hold", f.Name())
	}
	return b, err
}

const (
	ageMagic = "age-encryption.org/"
	pemMagic = "-----BEGIN "
)

// parseIdentities parses an identity file: a list of age's, such a list encrypted with a passphrase, or an SSH
// private key. No error has anything of the file.
func (k *keyFlags) parseIdentities(b []byte, path string) ([]age.Identity, error) {
	switch {
	case bytes.HasPrefix(b, []byte(ageMagic)):
		return k.decryptIdentities(bytes.NewReader(b), path)
	case bytes.HasPrefix(b, []byte(armor.Header)):
		return k.decryptIdentities(armor.NewReader(bytes.NewReader(b)), path)
	case bytes.HasPrefix(b, []byte(pemMagic)):
		id, err := k.parseSSH(b, path)
		return []age.Identity{id}, err
	}
	return k.parseIdentityList(b)
}

func (k *keyFlags) decryptIdentities(r io.Reader, path string) ([]age.Identity, error) {
	plain, err := age.Decrypt(r, &passphraseIdentity{
		passphrase: func() (string, error) { return k.passphrase("identity file " + path) },
		otherwise:  errors.New("is encrypted, and not with a passphrase"),
	})
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(plain, maxKeyFile))
	if err != nil {
		return nil, err
	}
	return k.parseIdentityList(b)
}

func (k *keyFlags) parseIdentityList(b []byte) (ids []age.Identity, err error) {
	for i, line := range strings.Split(string(b), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		id, err := k.parseIdentity(line)
		if err != nil { // which may quote what it could not parse
			return nil, fmt.Errorf("line %d is no age identity that is known here", i+1)
		}
		ids = append(ids, id)
	}
	if len(ids) == 0 {
		return nil, errors.New("holds no identity")
	}
	return ids, nil
}

func (k *keyFlags) parseIdentity(s string) (age.Identity, error) {
	switch {
	case strings.HasPrefix(s, "AGE-PLUGIN-"):
		return plugin.NewIdentity(s, k.pluginUI())
	case strings.HasPrefix(s, "AGE-SECRET-KEY-PQ-1"):
		return age.ParseHybridIdentity(s)
	default:
		return age.ParseX25519Identity(s)
	}
}

// parseSSH parses an SSH private key. If it is encrypted, its passphrase is asked for when a snapshot names it.
func (k *keyFlags) parseSSH(b []byte, path string) (age.Identity, error) {
	id, err := agessh.ParseIdentity(b)
	var locked *ssh.PassphraseMissingError
	if !errors.As(err, &locked) {
		if err != nil {
			return nil, errors.New("is no SSH private key that is known here: ssh-ed25519 and ssh-rsa are")
		}
		return id, nil
	}
	public := locked.PublicKey
	if public == nil { // an old format, which does not say
		if public, err = readSSHPublic(path + ".pub"); err != nil {
			return nil, fmt.Errorf("its public key is needed: %w", err)
		}
	}
	return agessh.NewEncryptedSSHIdentity(public, b, func() ([]byte, error) {
		p, err := k.passphrase("SSH key " + path)
		return []byte(p), err
	})
}

func readSSHPublic(path string) (ssh.PublicKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}
