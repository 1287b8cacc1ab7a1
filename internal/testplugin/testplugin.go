// Package testplugin is an age plugin for tests. A test binary whose TestMain calls
// [Main] first is the plugin whenever it runs under a plugin's name, which [Install]
// gives it: so nothing has to be built.
package testplugin

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/plugin"
)

// The names of the plugin, as in its recipients (age1name1...) and its files (age-plugin-name).
const (
	Plain   = "cryotest"
	Quantum = "cryotestpq"  // says that it is post-quantum, which is not so
	Asking  = "cryotestpin" // asks for PIN before it decrypts
	stanza  = "cryovisor-test"
)

// PIN is what the plugin Asking wants to hear.
const PIN = "8642-secret-pin"

// prefix is what age calls plugins.
const prefix = "age-plugin-"

// Main is the plugin, and ends the process, if that runs under the name of one; else it does nothing.
func Main() {
	name, ok := strings.CutPrefix(filepath.Base(os.Args[0]), prefix)
	if !ok {
		return
	}
	p, err := plugin.New(name)
	if err != nil {
		os.Exit(1)
	}
	p.HandleRecipient(func(data []byte) (age.Recipient, error) {
		r, err := age.ParseX25519Recipient(string(data))
		if name == Quantum {
			return labelled{recipient{r}}, err
		}
		return recipient{r}, err
	})
	p.HandleIdentity(func(data []byte) (age.Identity, error) {
		i, err := age.ParseX25519Identity(string(data))
		if name == Asking {
			return asking{identity{i}, p}, err
		}
		return identity{i}, err
	})
	p.HandleIdentityAsRecipient(func(data []byte) (age.Recipient, error) {
		i, err := age.ParseX25519Identity(string(data))
		if err != nil {
			return nil, err
		}
		return recipient{i.Recipient()}, nil
	})
	os.Exit(p.Main())
}

// Install puts the plugin into PATH, under all of its names, until the test is over.
func Install(t testing.TB) {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("symbolic links to programs need privileges there")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{Plain, Quantum, Asking} {
		if err := os.Symlink(self, filepath.Join(dir, prefix+name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
}

// Generate makes a key of the plugin of that name.
func Generate(t testing.TB, name string) (recipient, identity string) {
	t.Helper()
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return plugin.EncodeRecipient(name, []byte(key.Recipient().String())), plugin.EncodeIdentity(name, []byte(key.String()))
}

// recipient makes stanzas that only the plugin understands.
type recipient struct{ inner *age.X25519Recipient }

func (r recipient) Wrap(fileKey []byte) ([]*age.Stanza, error) {
	stanzas, err := r.inner.Wrap(fileKey)
	for _, s := range stanzas {
		s.Type = stanza
	}
	return stanzas, err
}

// labelled says that it may be mixed with post-quantum recipients only.
type labelled struct{ recipient }

func (l labelled) WrapWithLabels(fileKey []byte) ([]*age.Stanza, []string, error) {
	stanzas, err := l.Wrap(fileKey)
	return stanzas, []string{"postquantum"}, err
}

type identity struct{ inner *age.X25519Identity }

func (i identity) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	var mine []*age.Stanza
	for _, s := range stanzas {
		if s.Type == stanza {
			mine = append(mine, &age.Stanza{Type: "X25519", Args: s.Args, Body: s.Body})
		}
	}
	return i.inner.Unwrap(mine)
}

type asking struct {
	identity
	ui *plugin.Plugin
}

func (a asking) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	pin, err := a.ui.RequestValue("PIN of the test", true)
	if err != nil {
		return nil, err
	}
	if pin != PIN {
		return nil, errors.New("wrong PIN")
	}
	return a.identity.Unwrap(stanzas)
}
