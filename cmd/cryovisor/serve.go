package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/time/rate"

	"github.com/cryovisor/cryovisor/confine"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server"
)

// defaultListen is where serve listens, and the verbs that talk to it look.
const defaultListen = "127.0.0.1:7480"

// serveFlags are the flags of serve.
type serveFlags struct {
	data, listen, keyFile string
	tlsCert, tlsKey       string
	insecure              bool
	onClose               string
	closeWithin           time.Duration
	rate                  float64
	burst, inFlight       int
	manager               lifecycle.ManagerOptions
	confine               confineFlag
}

func newServeCommand() *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "serve --data DIR",
		Short: "Serve sandboxes to the SDKs that people have already",
		Long: `Serve sandboxes over HTTP, with the REST contract of the E2B family of SDKs.

In an empty directory everything that is missing is made: the master key, an API
key, which is written to a file and shown this once, and a template, "base", which
works on every host with KVM. So a stock client works at once:

  export E2B_API_URL=http://` + defaultListen + ` E2B_API_KEY=$(cat DIR/api-key)

Templates with Linux are made by 'cryovisor template create' while no server has
the directory. The server ends on SIGTERM or SIGINT, and pauses what runs; a second
signal ends it at once, and sandboxes are then what they were at their last pause.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return serve(cmd, f) },
	}
	flags := cmd.Flags()
	flags.StringVar(&f.data, "data", "", "data directory")
	flags.StringVar(&f.listen, "listen", defaultListen, "address and port; with port 0 the system chooses one")
	flags.StringVar(&f.keyFile, "api-key-file", "", "where the first API key is written (default DIR/api-key)")
	flags.StringVar(&f.tlsCert, "tls-cert", "", "certificate (PEM), for HTTPS")
	flags.StringVar(&f.tlsKey, "tls-key", "", "its key (PEM)")
	flags.BoolVar(&f.insecure, "insecure", false, "allow an address that is not the host's own without HTTPS: API keys can be read on the way")
	flags.StringVar(&f.onClose, "on-close", string(lifecycle.ActionPause), "what happens to running sandboxes at the end: pause or kill")
	flags.DurationVar(&f.closeWithin, "close-within", 5*time.Minute, "how long that may take; what is not paused by then is as at its last pause")
	flags.Float64Var(&f.rate, "rate", server.DefaultRate, "requests a second for each API key")
	flags.IntVar(&f.burst, "burst", server.DefaultBurst, "how many of them may come at once")
	flags.IntVar(&f.inFlight, "max-requests", server.DefaultInFlight, "requests under way at once, of all keys")
	flags.DurationVar(&f.manager.Retention, "retention", lifecycle.DefaultRetention, "how long paused sandboxes are kept")
	flags.IntVar(&f.manager.Limits.Running, "max-running", 0, "how many sandboxes may run; 0: any number")
	flags.IntVar(&f.manager.Limits.Paused, "max-paused", 0, "how many may be paused; 0: any number")
	flags.Uint64Var(&f.manager.Limits.StoredBytes, "max-stored", 0, "bytes of snapshots from which on there are no new ones; 0: any")
	flags.IntVar(&f.manager.Pool, "pool", 0, "VMs that are kept ready for sandboxes: a few, one at least for each size of memory in use")
	f.confine.add(cmd)
	_ = cmd.MarkFlagRequired("data")
	return cmd
}

func serve(cmd *cobra.Command, f serveFlags) (err error) {
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt, syscall.SIGTERM) })
	listener, err := listen(f)
	if err != nil {
		return err
	}
	defer listener.Close()
	certificate, err := f.certificate()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	f.manager.OnClose = lifecycle.Action(f.onClose)
	f.manager.Connect = server.Hardware(f.data)
	manager, err := lifecycle.OpenManager(ctx, f.data, f.manager)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.closeWithin)
		defer cancel()
		err = errors.Join(err, manager.Close(closing))
	}()
	keys, err := server.OpenKeys(ctx, f.data)
	if err != nil {
		return err
	}
	defer keys.Close()
	if err := ensureAPIKey(cmd, f, keys); err != nil {
		return err
	}
	if err := confineServer(ctx, f, manager, keys, log); err != nil {
		return err
	}
	if err := server.EnsureBase(ctx, manager); err != nil { // runs a guest
		return err
	}
	handler, err := server.New(server.Config{Manager: manager, Keys: keys, Logger: log, Rate: rate.Limit(f.rate), Burst: f.burst, InFlight: f.inFlight})
	if err != nil {
		return err
	}
	defer handler.Close()
	return serveUntil(ctx, cmd, f, listener, certificate, handler, log)
}

// confineServer leaves the server its data directory, but for the master key, and what the disks of its sandboxes lie on.
func confineServer(ctx context.Context, f serveFlags, manager *lifecycle.Manager, keys *server.Keys, log *slog.Logger) error {
	images, err := manager.Images(ctx)
	if err != nil {
		log.Warn("some images are not known: what lies on them can't be resumed", "error", err)
	}
	mine, err := managerFiles(f.data, manager)
	if err != nil {
		return err
	}
	theirs, err := keys.Files()
	if err != nil {
		return err
	}
	rules := confine.Rules{ReadWrite: append(mine, theirs...)}
	for _, image := range images {
		if _, err := os.Stat(image); err != nil {
			log.Warn("an image is not there: what lies on it can't be resumed until the server is started again", "error", err)
			continue
		}
		rules.ReadOnly = append(rules.ReadOnly, image)
	}
	return f.confine.apply(rules, func(format string, args ...any) { log.Warn(fmt.Sprintf(format, args...)) })
}

// certificate reads the files for HTTPS while they can be read. It is nil for HTTP.
func (f *serveFlags) certificate() (*tls.Certificate, error) {
	if f.tlsCert == "" {
		return nil, nil
	}
	c, err := tls.LoadX509KeyPair(f.tlsCert, f.tlsKey)
	return &c, err
}

// listen refuses an address at which API keys could be read on their way.
func listen(f serveFlags) (net.Listener, error) {
	if (f.tlsCert == "") != (f.tlsKey == "") {
		return nil, errors.New("--tls-cert and --tls-key belong together")
	}
	addr, err := net.ResolveTCPAddr("tcp", f.listen)
	if err != nil {
		return nil, err
	}
	if !addr.IP.IsLoopback() && f.tlsCert == "" && !f.insecure {
		return nil, fmt.Errorf("%s is not a loopback address: give --tls-cert and --tls-key, or --insecure if somebody else sees to that", f.listen)
	}
	return net.ListenTCP("tcp", addr)
}

// ensureAPIKey makes the first API key.
func ensureAPIKey(cmd *cobra.Command, f serveFlags, keys *server.Keys) error {
	all, err := keys.List(cmd.Context())
	if err != nil || len(all) > 0 {
		return err
	}
	path := f.keyFile
	if path == "" {
		path = filepath.Join(f.data, "api-key")
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; it may be somebody's key: choose another file with --api-key-file", err)
	}
	if err != nil {
		return err
	}
	key, secret, err := keys.Create(cmd.Context(), "first")
	if err != nil {
		return errors.Join(err, file.Close(), os.Remove(path))
	}
	_, err = fmt.Fprintln(file, secret)
	if err = errors.Join(err, file.Close()); err != nil { // a key that nobody knows would be the last that is made by itself
		return errors.Join(err, os.Remove(path), keys.Revoke(cmd.Context(), key.ID))
	}
	fmt.Fprintf(cmd.OutOrStdout(), "API key %s, written to %s\n", secret, path)
	return nil
}

// serveUntil serves until ctx ends, and then until the requests under way are answered.
func serveUntil(
	ctx context.Context, cmd *cobra.Command, f serveFlags, listener net.Listener, certificate *tls.Certificate, handler http.Handler, log *slog.Logger,
) error {
	scheme := "http"
	if certificate != nil {
		scheme = "https"
	}
	fmt.Fprintf(cmd.OutOrStdout(), "serving %s on %s://%s\n", f.data, scheme, listener.Addr())
	s := &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 32 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	ended := make(chan error, 1)
	go func() {
		if certificate != nil {
			s.TLSConfig = &tls.Config{Certificates: []tls.Certificate{*certificate}}
			ended <- s.ServeTLS(listener, "", "")
		} else {
			ended <- s.Serve(listener)
		}
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	log.Info("ending", "sandboxes", f.onClose)
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.closeWithin)
	defer cancel()
	return s.Shutdown(closing)
}
