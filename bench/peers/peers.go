//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// channels are the threads, and the connections, that multifd uses besides the main one.
	channels = 2
	// unlimited is more bytes a second than there can be.
	unlimited = 1 << 40
)

// peer is one of QEMU's ways to store a machine in a directory and to load it again. Syncing is not theirs to do.
type peer struct {
	name    string
	prepare func(ctx context.Context, dir string) error // or nil
	image   string                                      // of the drive, in the directory, or none
	store   func(ctx context.Context, q *qemu, dir string) error
	load    func(ctx context.Context, q *qemu, dir string) error
}

func (p peer) drive(dir string) string {
	if p.image == "" {
		return ""
	}
	return filepath.Join(dir, p.image)
}

func peers() []peer {
	return []peer{
		{name: "QEMU exec:cat", store: storeExec, load: loadExec},
		multifd("QEMU multifd, 2 channels", "none"),
		multifd("QEMU multifd, 2 channels, zstd", "zstd"),
		{
			name: "QEMU savevm", image: "image", prepare: createImage,
			store: func(_ context.Context, q *qemu, _ string) error { return q.human("savevm peers") },
			load:  func(_ context.Context, q *qemu, _ string) error { return q.human("loadvm peers") },
		},
	}
}

// set sets what a migration is to be like, and that its end is told.
func (q *qemu) set(capabilities []string, parameters map[string]any) error {
	var states []map[string]any
	for _, name := range append(capabilities, "events") {
		states = append(states, map[string]any{"capability": name, "state": true})
	}
	if _, err := q.execute("migrate-set-capabilities", map[string]any{"capabilities": states}); err != nil {
		return err
	}
	_, err := q.execute("migrate-set-parameters", parameters)
	return err
}

// storeExec stores through a pipe to cat. QEMU does not wait for cat, so the shell has to say when it has ended, and how.
func storeExec(ctx context.Context, q *qemu, dir string) error {
	if err := q.set(nil, map[string]any{"max-bandwidth": unlimited}); err != nil {
		return err
	}
	path := filepath.Join(dir, "ended")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	ended, err := os.OpenFile(path, os.O_RDWR, 0) // for writing too, so as not to wait for a writer
	if err != nil {
		return err
	}
	defer ended.Close()
	defer context.AfterFunc(ctx, func() { ended.Close() })()
	shell := fmt.Sprintf("cat >%s; echo $? >%s", quote(filepath.Join(dir, "stream")), quote(path))
	if err := q.begin("migrate", "exec:"+shell); err != nil {
		return err
	}
	if err := q.await(); err != nil {
		return err
	}
	status := make([]byte, 8)
	n, err := ended.Read(status)
	if err != nil {
		return err
	}
	if s := bytes.TrimSpace(status[:n]); string(s) != "0" {
		return fmt.Errorf("cat: exit status %s", s)
	}
	return nil
}

func loadExec(_ context.Context, q *qemu, dir string) error {
	if err := q.set(nil, map[string]any{}); err != nil {
		return err
	}
	if err := q.begin("migrate-incoming", "exec:cat "+quote(filepath.Join(dir, "stream"))); err != nil {
		return err
	}
	return q.await()
}

// quote quotes a path for a shell.
func quote(path string) string { return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'" }

// multifd stores and loads through several sockets, of which this process is the other end.
func multifd(name, compression string) peer {
	set := func(q *qemu) error {
		return q.set([]string{"multifd"}, map[string]any{
			"multifd-channels": channels, "multifd-compression": compression, "max-bandwidth": unlimited,
		})
	}
	return peer{
		name: name,
		store: func(ctx context.Context, q *qemu, dir string) error {
			if err := set(q); err != nil {
				return err
			}
			return storeMultifd(ctx, q, dir)
		},
		load: func(ctx context.Context, q *qemu, dir string) error {
			if err := set(q); err != nil {
				return err
			}
			return loadMultifd(ctx, q, dir)
		},
	}
}

func storeMultifd(ctx context.Context, q *qemu, dir string) error {
	path := filepath.Join(dir, "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := q.begin("migrate", "unix:"+path); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return receive(ctx, l, dir) })
	g.Go(q.await)
	return g.Wait()
}

func loadMultifd(ctx context.Context, q *qemu, dir string) error {
	path := filepath.Join(dir, "socket")
	if err := q.begin("migrate-incoming", "unix:"+path); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return send(ctx, path, dir) })
	g.Go(q.await)
	return g.Wait()
}

func createImage(ctx context.Context, dir string) error {
	out, err := exec.CommandContext(ctx, imageProgram, "create", "-q", "-f", "qcow2", filepath.Join(dir, "image"), "1M").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", imageProgram, err, bytes.TrimSpace(out))
	}
	return nil
}
