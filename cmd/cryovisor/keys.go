package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"filippo.io/age"
	"filippo.io/age/plugin"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/snapshot"
)

const (
	identityEnv   = "CRYOVISOR_IDENTITY"
	passphraseEnv = "CRYOVISOR_PASSPHRASE_FILE"
)

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

// keyFlags are the flags of verbs that open or write snapshots. All secrets come from files that only the user
// can read, or from the terminal: never from arguments, which every process can see, or from the environment, which children inherit.
type keyFlags struct {
	identityFiles  []string
	passphraseFile string // of what is opened

	recipients        []string
	recipientFiles    []string
	toPassphrase      bool
	newPassphraseFile string // of what is written

	ask    func(prompt string) (string, error) // nil: on the terminal
	stderr func() io.Writer                    // nil: os.Stderr

	context func() context.Context // of the command; nil: none

	// What was read and asked for: nobody is asked twice.
	opened    []age.Identity
	encrypted []age.Recipient
}

func (k *keyFlags) addIdentity(cmd *cobra.Command) {
	k.stderr, k.context = cmd.ErrOrStderr, cmd.Context
	cmd.Flags().StringArrayVarP(&k.identityFiles, "identity", "i", nil,
		"file of age identities, perhaps encrypted with a passphrase, or SSH private key; may be repeated\n(default $"+identityEnv+
			", else cryovisor/identity.txt in your configuration directory)")
	cmd.Flags().StringVar(&k.passphraseFile, "passphrase-file", "",
		"file that holds the passphrase of the snapshot or of the identity file\n(default $"+passphraseEnv+", else you are asked)")
}

func (k *keyFlags) addRecipients(cmd *cobra.Command, otherwise string) {
	k.stderr, k.context = cmd.ErrOrStderr, cmd.Context
	cmd.Flags().StringArrayVarP(&k.recipients, "recipient", "r", nil,
		"age recipient to encrypt to (age1..., of a plugin too, or an SSH public key); may be repeated"+otherwise)
	cmd.Flags().StringArrayVarP(&k.recipientFiles, "recipients-file", "R", nil,
		"file of recipients, one a line; may be repeated")
	cmd.Flags().BoolVarP(&k.toPassphrase, "new-passphrase", "p", false,
		"encrypt to a passphrase, for which you are asked, and to nobody else")
	cmd.Flags().StringVar(&k.newPassphraseFile, "new-passphrase-file", "",
		"encrypt to the passphrase in a file, and to nobody else")
}

// orOwn is the default of addRecipients for verbs that write what encryptTo says.
const orOwn = " (default: the\nrecipients of the identity files)"

// identities are those of the identity files, and whoever knows the passphrase of a snapshot that has one.
func (k *keyFlags) identities() ([]age.Identity, error) {
	ids, err := k.fileIdentities()
	lazy := &passphraseIdentity{passphrase: func() (string, error) { return k.passphrase("the snapshot") }}
	if errors.Is(err, fs.ErrNotExist) && len(k.identityFiles) == 0 {
		lazy.otherwise, err = err, nil
	}
	if err != nil {
		return nil, err
	}
	return append(ids[:len(ids):len(ids)], lazy), nil
}

// fileIdentities reads the identity files, once.
func (k *keyFlags) fileIdentities() ([]age.Identity, error) {
	if k.opened != nil {
		return k.opened, nil
	}
	files := k.identityFiles
	if len(files) == 0 {
		p, err := defaultIdentityPath()
		if err != nil {
			return nil, err
		}
		files = []string{p}
	}
	var all []age.Identity
	for _, path := range files {
		b, err := readPrivate(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("no identity file: %w; make one with 'cryovisor keygen' or name one with --identity", err)
		}
		if err != nil {
			return nil, err
		}
		ids, err := k.parseIdentities(b, path)
		if err != nil {
			return nil, fmt.Errorf("identity file %s: %w", path, err)
		}
		all = append(all, ids...)
	}
	k.opened = all
	return all, nil
}

// passphrase is that of what is opened.
func (k *keyFlags) passphrase(of string) (string, error) {
	path := k.passphraseFile
	if path == "" {
		path = os.Getenv(passphraseEnv)
	}
	if path != "" {
		return readPassphrase(path)
	}
	return k.askFor("Passphrase of " + of + ": ")
}

func (k *keyFlags) askFor(prompt string) (string, error) {
	if k.ask != nil {
		return k.ask(prompt)
	}
	return k.askTerminal(prompt)
}

// say tells the user something, on a line of its own.
func (k *keyFlags) say(format string, args ...any) {
	var w io.Writer = os.Stderr
	if k.stderr != nil {
		w = k.stderr()
	}
	fmt.Fprintf(w, "cryovisor: "+format+"\n", args...)
}

// pluginUI is how plugins talk to the user.
func (k *keyFlags) pluginUI() *plugin.ClientUI { return k.questioner().pluginUI(k.say) }

// questioner asks as long as the command is not to end.
func (k *keyFlags) questioner() questioner {
	if k.context == nil {
		return questioner{context.Background()}
	}
	return questioner{k.context()}
}

// encryptTo returns the recipients named by flags, or those of the identity files.
func (k *keyFlags) encryptTo() ([]age.Recipient, error) {
	to, err := k.namedRecipients()
	if err != nil || len(to) > 0 {
		return to, err
	}
	ids, err := k.fileIdentities()
	if err != nil {
		return nil, err
	}
	return recipientsOf(ids)
}

// namedRecipients are those named by flags, perhaps none. They are read and asked for once.
func (k *keyFlags) namedRecipients() ([]age.Recipient, error) {
	if k.encrypted != nil {
		return k.encrypted, nil
	}
	if k.toPassphrase || k.newPassphraseFile != "" {
		if len(k.recipients)+len(k.recipientFiles) > 0 {
			return nil, fmt.Errorf("%w: a passphrase must be the only recipient", snapshot.ErrRecipients)
		}
		to, err := k.passphraseRecipient()
		if err != nil {
			return nil, err
		}
		k.encrypted = []age.Recipient{to}
		return k.encrypted, nil
	}
	var all []age.Recipient
	for i, s := range k.recipients {
		r, err := parseRecipient(s, k.pluginUI())
		if err != nil {
			return nil, fmt.Errorf("recipient %d of the --recipient flags: %w", i+1, err)
		}
		all = append(all, r)
	}
	for _, path := range k.recipientFiles {
		to, err := readRecipients(path, k.pluginUI())
		if err != nil {
			return nil, err
		}
		all = append(all, to...)
	}
	k.encrypted = all
	return all, nil
}

// passphraseRecipient is a new passphrase, which a human must type twice.
func (k *keyFlags) passphraseRecipient() (age.Recipient, error) {
	if k.newPassphraseFile != "" {
		p, err := readPassphrase(k.newPassphraseFile)
		if err != nil {
			return nil, err
		}
		return age.NewScryptRecipient(p)
	}
	p, err := k.askFor("New passphrase: ")
	if err != nil {
		return nil, err
	}
	again, err := k.askFor("The same again: ")
	if err != nil {
		return nil, err
	}
	if p != again {
		return nil, errors.New("the two passphrases differ")
	}
	return age.NewScryptRecipient(p)
}
