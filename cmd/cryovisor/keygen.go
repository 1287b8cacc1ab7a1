package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"
)

func newKeygenCommand() *cobra.Command {
	var (
		output  string
		quantum bool
	)
	cmd := &cobra.Command{
		Use:   "keygen",
		Short: "Make the key that snapshots are encrypted to",
		Long: `Make an age identity, X25519 or post-quantum, which opens snapshots, and print its recipient,
to which snapshots are encrypted.

The identity is written to a file that only you can read; it is an ordinary
age identity file, and age-keygen makes the same. Keep a copy: without
it no snapshot can be opened. Existing files are never overwritten.

Snapshots for a post-quantum identity (ML-KEM-768 with X25519) stay closed to quantum computers; its
recipient has 2000 characters, and is not mixed with those of other kinds.`,
		Example: "  cryovisor keygen\n  cryovisor keygen -o sandbox.key",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return keygen(cmd, output, quantum)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "",
		"file to write (default $"+identityEnv+", else cryovisor/identity.txt in your configuration directory)")
	cmd.Flags().BoolVar(&quantum, "post-quantum", false, "make a post-quantum identity")
	return cmd
}

func keygen(cmd *cobra.Command, path string, quantum bool) error {
	if path == "" {
		p, err := defaultIdentityPath()
		if err != nil {
			return err
		}
		path = p
	}
	secret, public, err := newIdentity(quantum)
	if err != nil {
		return err
	}
	if err := writeIdentity(path, secret, public); err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "identity written to %s\n", path)
	fmt.Fprintln(cmd.OutOrStdout(), public)
	return nil
}

// newIdentity makes a key, whose halves are for those who print them.
func newIdentity(quantum bool) (secret, public fmt.Stringer, err error) {
	if quantum {
		id, err := age.GenerateHybridIdentity()
		if err != nil {
			return nil, nil, err
		}
		return id, id.Recipient(), nil
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, nil, err
	}
	return id, id.Recipient(), nil
}

func writeIdentity(path string, secret, public fmt.Stringer) error {
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
		time.Now().UTC().Format(time.RFC3339), public, secret)
	return errors.Join(err, f.Sync(), f.Close())
}
