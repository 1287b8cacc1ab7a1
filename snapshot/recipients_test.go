package snapshot

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"filippo.io/age/plugin"

	"github.com/cryovisor/cryovisor/internal/testplugin"
)

// pair is a key of some kind.
type pair struct {
	name      string
	recipient age.Recipient
	identity  age.Identity
	secrets   []string // what no message may have
}

// allKinds makes a key of every kind that age has; the plugin's has nobody to ask.
func allKinds(t *testing.T) map[string]pair {
	t.Helper()
	testplugin.Install(t)
	kinds := make(map[string]pair)
	for _, p := range []pair{
		x25519Pair(t), hybridPair(t), sshPair(t, "ed25519"), sshPair(t, "rsa"), passphrasePair(t, "correct horse battery"),
		pluginPair(t, testplugin.Plain), pluginPair(t, testplugin.Quantum), pluginPair(t, testplugin.Asking),
	} {
		kinds[p.name] = p
	}
	return kinds
}

func x25519Pair(t *testing.T) pair {
	k := newKey(t)
	return pair{"x25519", k.Recipient(), k, []string{k.String()}}
}

func hybridPair(t *testing.T) pair {
	k, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	return pair{"hybrid", k.Recipient(), k, []string{k.String()}}
}

// sshPair goes by way of the file that ssh-keygen would make.
func sshPair(t *testing.T, kind string) pair {
	t.Helper()
	var key crypto.PrivateKey
	var err error
	if kind == "rsa" {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		_, key, err = ed25519.GenerateKey(rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	identity, err := agessh.ParseIdentity(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if err != nil {
		t.Fatal(err)
	}
	p := pair{name: "ssh-" + kind, identity: identity, secrets: []string{base64.StdEncoding.EncodeToString(der)}}
	switch i := identity.(type) {
	case *agessh.RSAIdentity:
		p.recipient = i.Recipient()
	case *agessh.Ed25519Identity:
		p.recipient = i.Recipient()
	}
	return p
}

func passphrasePair(t *testing.T, passphrase string) pair {
	t.Helper()
	to, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	to.SetWorkFactor(8)
	identity, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	return pair{"passphrase", to, identity, []string{passphrase}}
}

func pluginPair(t *testing.T, name string) pair {
	t.Helper()
	public, secret := testplugin.Generate(t, name)
	to, err := plugin.NewRecipient(public, &plugin.ClientUI{})
	if err != nil {
		t.Fatal(err)
	}
	identity, err := plugin.NewIdentity(secret, &plugin.ClientUI{})
	if err != nil {
		t.Fatal(err)
	}
	return pair{name, to, identity, []string{secret, testplugin.PIN}}
}

// TestEveryKindOfRecipient hands one snapshot on through all kinds of keys, and back. Each opens it only while it is its turn.
func TestEveryKindOfRecipient(t *testing.T) {
	kinds := allKinds(t)
	l, _, info := small(t)
	owner := pair{identity: l.key, recipient: l.key.Recipient()}
	for _, name := range []string{
		"x25519", "hybrid", "ssh-ed25519", "ssh-rsa", "passphrase", testplugin.Plain, testplugin.Quantum,
	} {
		next := kinds[name]
		l.mustRekey(info.ID, owner.identity, next.recipient)
		l.mustOpen(info.ID, next.identity)
		l.mustNotOpen(info.ID, owner.identity)
		owner = next
	}
	l.mustRekey(info.ID, owner.identity, l.key.Recipient())
	l.mustOpen(info.ID, l.key)
}

// TestRecipientsTogether is about what age allows to be mixed, when a snapshot is written and when it is rekeyed.
func TestRecipientsTogether(t *testing.T) {
	kinds := allKinds(t)
	kinds["hybrid2"], kinds["passphrase2"] = hybridPair(t), passphrasePair(t, "another")
	kinds["no plugin"] = pluginPair(t, "nosuchplugin")
	for _, c := range []struct {
		names string
		ok    bool
	}{
		{"x25519 ssh-ed25519 ssh-rsa cryotest", true},
		{"hybrid hybrid2 cryotestpq", true},
		{"hybrid x25519", false},
		{"ssh-rsa hybrid", false},
		{"hybrid cryotest", false}, // which only the plugin knows
		{"cryotestpq x25519", false},
		{"passphrase x25519", false},
		{"hybrid passphrase", false},
		{"passphrase passphrase2", false},
		{"no plugin", false},
	} {
		t.Run(c.names, func(t *testing.T) {
			names := strings.Fields(c.names)
			if c.names == "no plugin" {
				names = []string{c.names}
			}
			var to []age.Recipient
			for _, n := range names {
				to = append(to, kinds[n].recipient)
			}
			l, _, info := small(t)
			files := strings.Join(l.files(), "\n")
			written, err := l.write(newGuest(PageSize), nil, Options{Recipients: to})
			rekeyed := l.rekey(info.ID, l.key, to...)
			if !c.ok {
				mustBe(t, err, ErrRecipients)
				mustBe(t, rekeyed, ErrRecipients)
				if fe := (*FileError)(nil); errors.As(rekeyed, &fe) && fe.Temporary() {
					t.Error("says that trying again may help")
				}
				l.mustOpen(info.ID, l.key)
				if now := strings.Join(l.files(), "\n"); now != files {
					t.Errorf("left\n%s\nwere\n%s", now, files)
				}
				return
			}
			if err != nil || rekeyed != nil {
				t.Fatal(err, rekeyed)
			}
			for _, n := range names {
				l.mustOpen(info.ID, kinds[n].identity)
				l.mustOpen(written.ID, kinds[n].identity)
			}
			l.mustNotOpen(info.ID, l.key)
		})
	}
}

// TestRecipientsAreFoundEarly: what can be told before the memory is written is.
func TestRecipientsAreFoundEarly(t *testing.T) {
	l, x, h, p := newLab(t), x25519Pair(t), hybridPair(t), passphrasePair(t, "another")
	for _, to := range [][]age.Recipient{
		{x.recipient, p.recipient}, {p.recipient, p.recipient}, {h.recipient, x.recipient},
	} {
		_, err := l.Create(context.Background(), Options{Recipients: to})
		mustBe(t, err, ErrRecipients)
	}
}

// A plugin that wants to ask gets no answer from a library.
func TestPluginAsksNobody(t *testing.T) {
	p := allKinds(t)[testplugin.Asking]
	l, _, info := small(t)
	l.mustRekey(info.ID, l.key, p.recipient)
	_, err := l.Open(context.Background(), info.ID, p.identity)
	mustBe(t, err, ErrKey)
	if !strings.Contains(err.Error(), testplugin.Asking) {
		t.Errorf("%v does not name the plugin", err)
	}
}

// spy is a recipient that keeps the file key.
type spy struct {
	age.Recipient
	key *[]byte
}

func (s spy) Wrap(key []byte) ([]*age.Stanza, error) {
	*s.key = slices.Clone(key)
	return s.Recipient.Wrap(key)
}

// TestErrorsTellNoSecrets provokes errors with keys that don't fit and with damage, and looks for keys in what they say.
func TestErrorsTellNoSecrets(t *testing.T) {
	kinds := allKinds(t)
	for _, name := range []string{"x25519", "hybrid", "ssh-ed25519", "passphrase", testplugin.Plain} {
		t.Run(name, func(t *testing.T) {
			owner := kinds[name]
			l, _, info := small(t)
			var fileKey []byte
			to := owner.recipient
			if _, labels := to.(age.RecipientWithLabels); !labels {
				to = spy{to, &fileKey}
			}
			l.mustRekey(info.ID, l.key, to)
			secrets := secretsOf(l, info.ID, owner, fileKey)
			for _, k := range kinds {
				secrets = append(secrets, k.secrets...)
			}
			tell := func(err error) {
				t.Helper()
				if err == nil {
					t.Error("no error")
				}
				noSecret(t, err, secrets)
			}
			for _, k := range kinds {
				if k.name == name {
					continue
				}
				_, err := l.Open(context.Background(), info.ID, k.identity)
				tell(err)
				tell(l.rekey(info.ID, k.identity, owner.recipient))
			}
			tell(l.rekey(info.ID, owner.identity, owner.recipient, kinds["passphrase"].recipient))
			damageTells(l, info.ID, owner, name == testplugin.Plain, tell)
		})
	}
}

// secretsOf are those of a snapshot: its file key, if it is known, and the keys of its packs.
func secretsOf(l *lab, id ID, owner pair, fileKey []byte) []string {
	l.t.Helper()
	var secrets []string
	if fileKey != nil {
		secrets = append(secrets, string(fileKey), hex.EncodeToString(fileKey), fmt.Sprintf("%d", fileKey),
			base64.StdEncoding.EncodeToString(fileKey), base64.RawStdEncoding.EncodeToString(fileKey))
	}
	r, err := l.Open(context.Background(), id, owner.identity)
	if err != nil {
		l.t.Fatal(err)
	}
	defer r.Close()
	for _, p := range r.body.packs {
		secrets = append(secrets, p.identity)
	}
	return secrets
}

// damageTells damages manifest and packs, and tells the errors that come of it. Processes are slow, so few of them are started.
func damageTells(l *lab, id ID, owner pair, slow bool, tell func(error)) {
	l.t.Helper()
	open := func() error {
		r, err := l.Open(context.Background(), id, owner.identity)
		if err != nil {
			return err
		}
		defer r.Close()
		rep, err := r.Verify(context.Background(), nil)
		if err != nil {
			return err
		}
		return rep.Err()
	}
	header, body := l.contents(id, owner.identity)
	path := l.ManifestPath(id)
	good := readFile(l.t, path)
	step := 7
	if slow {
		step = 97
	}
	for at := 0; at < len(good); at += step {
		bad := slices.Clone(good)
		bad[at] ^= 1 << (at % 8)
		writeFile(l.t, path, bad)
		tell(open())
		tell(l.rekey(id, owner.identity, owner.recipient))
		writeFile(l.t, path, good[:at])
		tell(open())
	}
	// A body in which the key of a pack is none.
	for _, change := range []string{"A", "!"} {
		forged := slices.Clone(body)
		copy(forged[bodyFixed+48+identityBytes-1:], change)
		if forged[bodyFixed+48+identityBytes-1] == body[bodyFixed+48+identityBytes-1] {
			continue
		}
		staged, _, err := l.stageManifest(header, forged, []age.Recipient{owner.recipient})
		if err != nil {
			l.t.Fatal(err)
		}
		if err := staged.Replace(path); err != nil {
			l.t.Fatal(err)
		}
		tell(open())
	}
	writeFile(l.t, path, good)
	entry, err := l.Header(id)
	if err != nil {
		l.t.Fatal(err)
	}
	pack := l.PackPath(entry.Packs[0])
	whole := readFile(l.t, pack)
	bad := slices.Clone(whole)
	bad[len(bad)/2] ^= 1
	writeFile(l.t, pack, bad)
	tell(open())
	writeFile(l.t, pack, whole[:len(whole)/2])
	tell(open())
}

// noSecret looks for secrets, or large parts of them, in all forms in which an error can be printed.
func noSecret(t *testing.T, err error, secrets []string) {
	t.Helper()
	said := fmt.Sprintf("%v\n%+v\n%q", err, err, err)
	for e := err; e != nil; e = errors.Unwrap(e) {
		said += fmt.Sprintf("\n%#v", e)
	}
	for _, s := range secrets {
		if strings.Contains(said, s) || len(s) > 40 && (strings.Contains(said, s[20:40]) || strings.Contains(said, s[len(s)-20:])) {
			t.Fatalf("a secret is in %s", said)
		}
	}
}
