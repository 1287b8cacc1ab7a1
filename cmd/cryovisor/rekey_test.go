package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/armor"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/crypto/ssh"

	"github.com/cryovisor/cryovisor/internal/testplugin"
	"github.com/cryovisor/cryovisor/snapshot"
)

// vault is a store with snapshots for one key, and a directory of keys.
type vault struct {
	t     *testing.T
	store *snapshot.Store
	keys  string
	owner string // an identity file
}

func newVault(t *testing.T) *vault {
	t.Helper()
	store, err := snapshot.OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	v := &vault{t: t, store: store, keys: t.TempDir()}
	t.Setenv(storeEnv, store.Dir())
	t.Setenv(identityEnv, filepath.Join(v.keys, "none"))
	v.owner, _ = v.keygen("owner")
	return v
}

// keygen makes an identity by the verb.
func (v *vault) keygen(name string, flags ...string) (path, recipient string) {
	v.t.Helper()
	path = filepath.Join(v.keys, name)
	return path, strings.TrimSpace(succeed(v.t, append([]string{"keygen", "-o", path}, flags...)...))
}

// file makes a file that only its owner can read.
func (v *vault) file(name, contents string) string {
	v.t.Helper()
	path := filepath.Join(v.keys, name)
	if err := os.WriteFile(path, []byte(contents), 0o600); err != nil {
		v.t.Fatal(err)
	}
	return path
}

// snapshot makes one for the owner.
func (v *vault) snapshot() string {
	v.t.Helper()
	keys := keyFlags{identityFiles: []string{v.owner}}
	to, err := keys.encryptTo()
	if err != nil {
		v.t.Fatal(err)
	}
	w, err := v.store.Create(v.t.Context(), snapshot.Options{Recipients: to})
	if err != nil {
		v.t.Fatal(err)
	}
	defer w.Abort()
	view := func(_ uint64, n int) ([]byte, error) { return bytes.Repeat([]byte{1}, n), nil }
	err = w.WriteMemory(v.t.Context(), 1<<20, []snapshot.Range{{GPA: 0, Len: 1 << 20}}, view)
	if err != nil {
		v.t.Fatal(err)
	}
	info, err := w.Commit(context.Background())
	if err != nil {
		v.t.Fatal(err)
	}
	return info.ID.String()
}

// opens verifies a snapshot with flags that say who does.
func (v *vault) opens(id string, flags ...string) {
	v.t.Helper()
	succeed(v.t, append([]string{"verify", id}, flags...)...)
}

func (v *vault) shut(id string, flags ...string) {
	v.t.Helper()
	_, err := command(v.t, append([]string{"verify", id}, flags...)...)
	if !errors.Is(err, snapshot.ErrKey) {
		v.t.Errorf("verify %v: %v", flags, err)
	}
}

func TestRekeyVerb(t *testing.T) {
	v := newVault(t)
	first, second := v.snapshot(), v.snapshot()
	path, to := v.keygen("new")
	if _, err := command(t, "rekey", first, "-i", v.owner); err == nil {
		t.Error("rekeyed to whom?")
	}
	if _, err := command(t, "rekey", first, strings.Repeat("0", 32), "-i", v.owner, "-r", to); !errors.Is(err, snapshot.ErrNotFound) {
		t.Error(err)
	}
	v.opens(first, "-i", v.owner)
	if out := succeed(t, "rekey", first[:12], v.store.ManifestPath(mustID(t, second)), "-i", v.owner, "-r", to); out != first+"\n"+second+"\n" {
		t.Errorf("printed %q", out)
	}
	for _, id := range []string{first, second} {
		v.opens(id, "-i", path)
		v.opens(id, "-i", v.owner, "-i", path)
		v.shut(id, "-i", v.owner)
	}
	// What can't be done is said, and the rest is done.
	third := v.snapshot()
	out, err := command(t, "rekey", first, third, "-i", v.owner, "-r", to)
	if !errors.Is(err, snapshot.ErrKey) || !strings.Contains(err.Error(), first) || out != third+"\n" {
		t.Errorf("%v, printed %q", err, out)
	}
	v.opens(third, "-i", path)
}

func mustID(t *testing.T, s string) snapshot.ID {
	t.Helper()
	id, err := snapshot.ParseID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestRekeyToEveryKind names recipients and identities as a user does, by flags and files.
func TestRekeyToEveryKind(t *testing.T) {
	testplugin.Install(t)
	v := newVault(t)
	quantum, toQuantum := v.keygen("quantum", "--post-quantum")
	other, toOther := v.keygen("other")
	sshKey, toSSH := v.sshKey("id_ed25519", "")
	toPlugin, pluginKey := testplugin.Generate(t, testplugin.Plain)
	plugin := v.file("plugin", "# a plugin's\n"+pluginKey+"\n")
	phrase := v.file("phrase", "four words with spaces\n")
	list := v.file("team", "# the team\n\n"+toOther+"\n"+toSSH+" me@here\n")
	sealed := v.sealed("sealed", other, false)
	armored := v.sealed("armored", other, true)

	from := []string{"-i", v.owner}
	for _, c := range []struct {
		to   []string
		open [][]string // each of these does
	}{
		{[]string{"-r", toQuantum}, [][]string{{"-i", quantum}}},
		{[]string{"-r", toSSH}, [][]string{{"-i", sshKey}}},
		{[]string{"-r", toPlugin}, [][]string{{"-i", plugin}}},
		{[]string{"--new-passphrase-file", phrase}, [][]string{{"--passphrase-file", phrase}}},
		{
			[]string{"-R", list, "-r", toPlugin},
			[][]string{
				{"-i", plugin},
				{"-i", sshKey},
				{"-i", sealed, "--passphrase-file", phrase},
				{"-i", armored, "--passphrase-file", phrase},
				{"-i", other},
			},
		},
	} {
		id := v.snapshot()
		succeed(t, append(append([]string{"rekey", id}, from...), c.to...)...)
		v.shut(id, from...)
		for _, o := range c.open {
			v.opens(id, o...)
		}
		// And back, by the last of them.
		succeed(t, append([]string{"rekey", id, "-r", v.recipientOf(v.owner)}, c.open[len(c.open)-1]...)...)
		v.opens(id, from...)
	}
}

func (v *vault) recipientOf(path string) string {
	v.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		v.t.Fatal(err)
	}
	ids, err := age.ParseIdentities(bytes.NewReader(b))
	if err != nil {
		v.t.Fatal(err)
	}
	return ids[0].(*age.X25519Identity).Recipient().String()
}

// sshKey makes what ssh-keygen does.
func (v *vault) sshKey(name, passphrase string) (path, recipient string) {
	v.t.Helper()
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		v.t.Fatal(err)
	}
	var block *pem.Block
	if passphrase == "" {
		block, err = ssh.MarshalPrivateKey(crypto.PrivateKey(key), "")
	} else {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(crypto.PrivateKey(key), "", []byte(passphrase))
	}
	if err != nil {
		v.t.Fatal(err)
	}
	pub, err := ssh.NewPublicKey(public)
	if err != nil {
		v.t.Fatal(err)
	}
	return v.file(name, string(pem.EncodeToMemory(block))), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub)))
}

// sealed encrypts a file with the passphrase of TestRekeyToEveryKind, as 'age -p' does.
func (v *vault) sealed(name, path string, armored bool) string {
	v.t.Helper()
	to, err := age.NewScryptRecipient("four words with spaces")
	if err != nil {
		v.t.Fatal(err)
	}
	to.SetWorkFactor(8)
	b, err := os.ReadFile(path)
	if err != nil {
		v.t.Fatal(err)
	}
	var out bytes.Buffer
	var sink io.WriteCloser = writeCloser{&out}
	if armored {
		sink = armor.NewWriter(&out)
	}
	w, err := age.Encrypt(sink, to)
	if err != nil {
		v.t.Fatal(err)
	}
	w.Write(b)
	if err := errors.Join(w.Close(), sink.Close()); err != nil {
		v.t.Fatal(err)
	}
	return v.file(name, out.String())
}

type writeCloser struct{ io.Writer }

func (writeCloser) Close() error { return nil }

// script answers questions for passphrases.
func script(t *testing.T, answers ...string) func(string) (string, error) {
	t.Cleanup(func() {
		if len(answers) > 0 {
			t.Errorf("%d answers were not asked for", len(answers))
		}
	})
	return func(prompt string) (string, error) {
		if len(answers) == 0 {
			t.Errorf("asked %q", prompt)
			return "", errors.New("asked too often")
		}
		answer := answers[0]
		answers = answers[1:]
		return answer, nil
	}
}

// TestPassphraseAsked: a passphrase is asked for when it is needed, twice if it is new, and not again.
func TestPassphraseAsked(t *testing.T) {
	v := newVault(t)
	id := mustID(t, v.snapshot())
	owner := keyFlags{identityFiles: []string{v.owner}, ask: script(t)} // for whom nobody is asked
	ids, err := owner.identities()
	if err != nil {
		t.Fatal(err)
	}
	to := keyFlags{toPassphrase: true, ask: script(t, "secret", "secret")}
	var recipients []age.Recipient
	for range 2 {
		if recipients, err = to.encryptTo(); err != nil {
			t.Fatal(err)
		}
	}
	recipients[0].(*age.ScryptRecipient).SetWorkFactor(8)
	if err := v.store.Rekey(t.Context(), id, ids, recipients); err != nil {
		t.Fatal(err)
	}
	keys := keyFlags{ask: script(t, "wrong", "secret")} // and there is no identity file
	if ids, err = keys.identities(); err != nil {
		t.Fatal(err)
	}
	for i, want := range []error{snapshot.ErrKey, nil, nil} {
		r, err := v.store.Open(t.Context(), id, ids...)
		if !errors.Is(err, want) {
			t.Errorf("%d: %v", i, err)
		}
		if err == nil {
			r.Close()
		}
	}
	for _, answers := range [][]string{{"a", "b"}, {"", ""}} {
		k := keyFlags{toPassphrase: true, ask: script(t, answers...)}
		if _, err := k.encryptTo(); err == nil {
			t.Errorf("%q will do", answers)
		}
	}
	k := keyFlags{toPassphrase: true, recipients: []string{v.recipientOf(v.owner)}, ask: script(t)}
	if _, err := k.encryptTo(); !errors.Is(err, snapshot.ErrRecipients) {
		t.Error(err)
	}
}

// TestEncryptedSSHKey: its passphrase is asked for if it is needed, and its recipient is known without.
func TestEncryptedSSHKey(t *testing.T) {
	v := newVault(t)
	path, _ := v.sshKey("locked", "open sesame")
	id := mustID(t, v.snapshot())
	keys := keyFlags{identityFiles: []string{v.owner, path}, ask: script(t)}
	ids, err := keys.identities()
	if err != nil {
		t.Fatal(err)
	}
	keys.identityFiles, keys.opened = []string{path}, nil
	to, err := keys.encryptTo()
	if err != nil {
		t.Fatal(err)
	}
	if err := v.store.Rekey(t.Context(), id, ids, to); err != nil {
		t.Fatal(err)
	}
	keys.ask = script(t, "open sesame")
	if ids, err = keys.identities(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		r, err := v.store.Open(t.Context(), id, ids...)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
}

// TestNoIdentityFile: whoever has none is told so.
func TestNoIdentityFile(t *testing.T) {
	v := newVault(t)
	id := v.snapshot()
	_, err := command(t, "verify", id)
	if !errors.Is(err, snapshot.ErrKey) || !strings.Contains(err.Error(), "keygen") {
		t.Error(err)
	}
	if out := succeed(t, "inspect", id, "--json"); !strings.Contains(out, `"verified": false`) {
		t.Errorf("printed %s", out)
	}
	if _, err := command(t, "verify", id, "-i", filepath.Join(v.keys, "nowhere")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestMessagesTellNoSecrets gives keys in all the wrong ways.
func TestMessagesTellNoSecrets(t *testing.T) {
	testplugin.Install(t)
	v := newVault(t)
	id := v.snapshot()
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	to, secret := key.Recipient().String(), key.String()
	body := secret[len("AGE-SECRET-KEY-1"):]
	_, pluginKey := testplugin.Generate(t, testplugin.Plain)
	secrets := []string{body[:20], body[len(body)-20:], "hunter2hunter2", pluginKey[20:40]}
	private := func(contents string) string { return v.file("private", contents) }
	for name, args := range map[string][]string{
		"identity as file":       {"-i", secret, "-r", to},
		"identity as recipient":  {"-i", v.owner, "-r", secret},
		"plugin's as recipient":  {"-i", v.owner, "-r", pluginKey},
		"identities as list":     {"-i", v.owner, "-R", private(secret + "\n")},
		"identity as list":       {"-i", v.owner, "-R", secret},
		"mistyped":               {"-i", v.file("mistyped", secret[:30]+"1"+secret[31:]+"\n"), "-r", to},
		"lower case":             {"-i", v.file("lower", strings.ToLower(secret)+"\n"), "-r", to},
		"plugin's, mistyped":     {"-i", v.file("pluginkey", pluginKey+"Q\n"), "-r", to},
		"of no kind":             {"-i", v.file("unknown", "hunter2hunter2\n"), "-r", to},
		"passphrase as identity": {"-i", v.file("phrase", "hunter2hunter2"), "-r", to},
		"passphrase as list":     {"-i", v.owner, "-R", v.file("phrase2", "hunter2hunter2")},
		"passphrase of two":      {"-i", v.owner, "--new-passphrase-file", v.file("phrase3", "hunter2hunter2\nmore\n")},
		"a broken SSH key":       {"-i", v.file("ssh", "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2hunter2\n-----END OPENSSH PRIVATE KEY-----\n"), "-r", to},
		"a broken age file":      {"-i", v.file("age", "age-encryption.org/v1\nhunter2hunter2"), "-r", to},
		"not the key":            {"-i", v.file("other", secret+"\n"), "-r", to},
	} {
		out, err := command(t, append([]string{"rekey", id}, args...)...)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		for _, s := range secrets {
			if strings.Contains(out+err.Error(), s) || strings.Contains(strings.ToUpper(err.Error()), s) {
				t.Errorf("%s: a secret is in %q", name, err)
			}
		}
	}
	v.opens(id, "-i", v.owner)
}

// TestSecretsArePrivate: files that others can read are refused.
func TestSecretsArePrivate(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("files have no modes there")
	}
	v := newVault(t)
	id := v.snapshot()
	phrase := v.file("phrase", "secret")
	for path, args := range map[string][]string{
		phrase:  {"rekey", id, "-i", v.owner, "--new-passphrase-file", phrase},
		v.owner: {"rekey", id, "-i", v.owner, "-r", v.recipientOf(v.owner)},
	} {
		if err := os.Chmod(path, 0o640); err != nil {
			t.Fatal(err)
		}
		if _, err := command(t, args...); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Error(err)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNoSecretIsAnArgument looks at all flags of all verbs.
func TestNoSecretIsAnArgument(t *testing.T) {
	var look func(cmd *cobra.Command)
	looked := 0
	look = func(cmd *cobra.Command) {
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			secret := false
			for _, word := range []string{"passphrase", "identity", "secret", "password"} {
				secret = secret || strings.Contains(f.Name, word)
			}
			if !secret {
				return
			}
			looked++
			if f.Value.Type() != "bool" && !strings.HasSuffix(f.Name, "-file") && !strings.Contains(f.Usage, "file of") {
				t.Errorf("%s --%s takes a secret", cmd.CommandPath(), f.Name)
			}
		})
		for _, c := range cmd.Commands() {
			look(c)
		}
	}
	look(newRootCommand())
	if looked < 5 {
		t.Errorf("looked at %d flags", looked)
	}
}
