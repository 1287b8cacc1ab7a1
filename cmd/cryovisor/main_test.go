package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testplugin"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server"
)

// commandEnv makes of this program the command: what confines itself needs a process of its own.
const commandEnv = "CRYOVISOR_TEST_COMMAND"

func TestMain(m *testing.M) {
	testplugin.Main()
	if os.Getenv(commandEnv) != "" {
		main()
		os.Exit(0)
	}
	if dir := os.Getenv(servedEnv); dir != "" {
		if err := lookFromServer(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// servedEnv names a data directory, and makes of this program a server of it that looks at its files once it is confined.
const servedEnv = "CRYOVISOR_TEST_SERVED"

// lookFromServer confines this process as serve does. It must not find the master key then, nor anything else that it has only
// written, while the catalog and the API keys work.
func lookFromServer(dir string) (err error) {
	ctx := context.Background()
	f := serveFlags{data: dir, confine: confineFlag{on: true}}
	manager, err := lifecycle.OpenManager(ctx, dir, lifecycle.ManagerOptions{})
	if err != nil {
		return err
	}
	keys, err := server.OpenKeys(ctx, dir)
	if err != nil {
		return err
	}
	if err := confineServer(ctx, f, manager, keys, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	_, listed := os.ReadDir(dir)
	_, made := os.Create(filepath.Join(dir, "new"))
	for what, err := range map[string]error{
		"read the master key":       readable(filepath.Join(dir, "keys", "master.txt")),
		"read the first API key":    readable(filepath.Join(dir, "api-key")),
		"remove the master key":     os.Remove(filepath.Join(dir, "keys", "master.txt")),
		"move it where it can read": os.Rename(filepath.Join(dir, "keys", "master.txt"), filepath.Join(dir, "store", "master.txt")),
		"list the data directory":   listed, "make a file in it": made, "make a new master key": manager.RotateKeys(ctx),
	} {
		if !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("a confined server tries to %s, with the result %s", what, fmt.Sprint(err))
		}
	}
	// Not all of it is what a server does, but what it may: whoever was killed while it changed a key has left it to the next.
	key, _, err := keys.Create(ctx, "another")
	if err == nil {
		err = keys.Revoke(ctx, key.ID)
	}
	return errors.Join(err, server.EnsureBase(ctx, manager), keys.Close(), manager.Close(ctx))
}

func readable(path string) error {
	_, err := os.ReadFile(path)
	return err
}

// command runs a verb, and returns what it prints to standard output.
func command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out, failed bytes.Buffer
	cmd := newRootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&failed)
	err := cmd.ExecuteContext(t.Context())
	if failed.Len() > 0 {
		t.Logf("%v: %s", args, failed.String())
	}
	return out.String(), err
}

func succeed(t *testing.T, args ...string) string {
	t.Helper()
	out, err := command(t, args...)
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out
}
