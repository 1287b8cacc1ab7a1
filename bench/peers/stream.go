//go:build linux && amd64

package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sync/errgroup"
)

// streamFile is where the bytes of a connection lie. QEMU makes the main connection first, and takes the first for it.
func streamFile(dir string, i int) string { return filepath.Join(dir, "stream"+strconv.Itoa(i)) }

// receive takes QEMU's connections, each into a file.
func receive(ctx context.Context, l net.Listener, dir string) error {
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { l.Close() })()
	g.Go(func() error {
		for i := range 1 + channels {
			conn, err := l.Accept()
			if err != nil {
				return err
			}
			g.Go(func() error { return record(ctx, conn, streamFile(dir, i)) })
		}
		return nil
	})
	return g.Wait()
}

// record writes all that comes to a file. The kernel moves it, without a copy in this process.
func record(ctx context.Context, conn net.Conn, path string) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, conn)
	return errors.Join(err, f.Close())
}

// send connects to QEMU as the source did, and sends what that sent.
func send(ctx context.Context, socket, dir string) error {
	g, ctx := errgroup.WithContext(ctx)
	for i := range 1 + channels {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return errors.Join(err, g.Wait())
		}
		g.Go(func() error { return replay(ctx, conn, streamFile(dir, i)) })
	}
	return g.Wait()
}

// replay sends all of a file.
func replay(ctx context.Context, conn net.Conn, path string) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(conn, f)
	return err
}
