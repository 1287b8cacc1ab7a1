package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"
)

const identityEnv = "CRYOVISOR_IDENTITY"

// defaultIdentityPath is where keygen writes and the other verbs look.
func defaultIdentityPath() (string, error) {
	if p := os.Getenv(identityEnv); p != "" {
		return p, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "cryovisor", "identity.txt"), nil
}

func newKeygenCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "keygen",
		Short: "Make the key that snapshots are encrypted to",
		Long: `Make an age X25519 identity, which opens snapshots, and print its recipient,
to which snapshots are encrypted.

The identity is written to a file that only you can read; it is an ordinary
age identity file, and age-keygen makes the same. Keep a copy: without
it no snapshot can be opened. Existing files are never overwritten.`,
		Example: "  cryovisor keygen\n  cryovisor keygen -o sandbox.key",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return keygen(cmd, output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "",
		"file to write (default $"+identityEnv+", else cryovisor/identity.txt in your configuration directory)")
	return cmd
}

func keygen(cmd *cobra.Command, path string) error {
	if path == "" {
		p, err := defaultIdentityPath()
		if err != nil {
			return err
		}
		path = p
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	if err := writeIdentity(path, id); err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "identity written to %s\n", path)
	fmt.Fprintln(cmd.OutOrStdout(), id.Recipient())
	return nil
}

func writeIdentity(path string, id *age.X25519Identity) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; a key that snapshots depend on is never overwritten: choose another file with --output", err)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "# created: %s\n# public key: %s\n%s\n",
		time.Now().UTC().Format(time.RFC3339), id.Recipient(), id)
	return errors.Join(err, f.Sync(), f.Close())
}

// keyFlags are the flags of verbs that open or write snapshots.
type keyFlags struct {
	identity   string
	recipients []string
}

func (k *keyFlags) addIdentity(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&k.identity, "identity", "i", "",
		"age identity file (default $"+identityEnv+", else cryovisor/identity.txt in your configuration directory)")
}

func (k *keyFlags) addRecipients(cmd *cobra.Command) {
	cmd.Flags().StringArrayVarP(&k.recipients, "recipient", "r", nil,
		"age recipient to encrypt to; may be repeated (default: the recipients of the identity file)")
}

// identities reads the identity file. It refuses one that others can read.
func (k *keyFlags) identities() ([]age.Identity, error) {
	path := k.identity
	if path == "" {
		p, err := defaultIdentityPath()
		if err != nil {
			return nil, err
		}
		path = p
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no identity file: %w; make one with 'cryovisor keygen' or name one with --identity", err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := checkPrivate(f); err != nil {
		return nil, err
	}
	ids, err := age.ParseIdentities(io.LimitReader(f, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("identity file %s: %w", path, err)
	}
	return ids, nil
}

func checkPrivate(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if runtime.GOOS != "windows" && fi.Mode().IsRegular() && fi.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("identity file %s can be read by others (mode %v); run 'chmod 600' on it", f.Name(), fi.Mode().Perm())
	}
	return nil
}

// encryptTo returns the recipients named by flags, or those of the identity
// file.
func (k *keyFlags) encryptTo() ([]age.Recipient, error) {
	if len(k.recipients) > 0 {
		return age.ParseRecipients(strings.NewReader(strings.Join(k.recipients, "\n")))
	}
	ids, err := k.identities()
	if err != nil {
		return nil, err
	}
	var out []age.Recipient
	for _, id := range ids {
		switch id := id.(type) {
		case *age.X25519Identity:
			out = append(out, id.Recipient())
		case *age.HybridIdentity:
			out = append(out, id.Recipient())
		default:
			return nil, fmt.Errorf("the identity file holds a key (%T) whose recipient can't be derived; name it with --recipient", id)
		}
	}
	return out, nil
}
