//go:build linux && amd64

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/confine"
	"github.com/cryovisor/cryovisor/server"
	"github.com/cryovisor/cryovisor/vmm"
)

// TestServeTLS speaks HTTPS, at an address that would be refused without.
func TestServeTLS(t *testing.T) {
	cert, key, pool := certificate(t)
	serveIn(t, t.TempDir(), "--listen", "0.0.0.0:0", "--tls-cert", cert, "--tls-key", key)
	address := os.Getenv("CRYOVISOR_URL")
	_, port, err := net.SplitHostPort(strings.TrimPrefix(address, "https://"))
	if err != nil {
		t.Fatalf("%q: %v", address, err)
	}
	c := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}}
	answer, err := c.Get("https://127.0.0.1:" + port + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		t.Errorf("answered with %s", answer.Status)
	}
}

// certificate writes one for the loopback address.
func certificate(t *testing.T) (cert, key string, pool *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	form := x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, &form, &form, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key, pool = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), x509.NewCertPool()
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool.AddCert(parsed)
	return cert, key, pool
}

// TestServedKey: a server that is confined can't reach its master key.
func TestServedKey(t *testing.T) {
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	if level := confine.Supported(); level.Landlock == 0 {
		t.Skip("this kernel has no Landlock, or it is not turned on")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "api-key"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // in a new directory, and in one that a server has left
		cmd := process()
		cmd.Env = append(os.Environ(), servedEnv+"="+dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
}

// TestServeKills ends a server that is to kill what runs: paused sandboxes are there again, others are not.
func TestServeKills(t *testing.T) {
	dir := t.TempDir()
	keyFile := filepath.Join(t.TempDir(), "key")
	_, end := serveIn(t, dir, "--on-close", "kill", "--api-key-file", keyFile)
	flags := []string{"--api-key-file", keyFile}
	paused := strings.TrimSpace(succeed(t, append(flags, "create", "--timeout", "1h")...))
	succeed(t, append(flags, "pause", paused)...)
	succeed(t, append(flags, "create", "--timeout", "1h")...)
	end()
	if got := strings.TrimSpace(succeed(t, "ls", "-q", "--data", dir)); got != paused {
		t.Errorf("what is left: %q, want %q", got, paused)
	}
}

// TestServePool has a server, confined, resume a sandbox in a VM that it has made in advance, and make another.
func TestServePool(t *testing.T) {
	keyFile := filepath.Join(t.TempDir(), "key")
	serveIn(t, t.TempDir(), "--pool", "2", "--api-key-file", keyFile)
	flags := []string{"--api-key-file", keyFile}
	id := strings.TrimSpace(succeed(t, append(flags, "create", "--timeout", "1h")...))
	waitMetric(t, "cryovisor_pool_ready 2")
	succeed(t, append(flags, "pause", id)...)
	succeed(t, append(flags, "connect", id)...)
	waitMetric(t, `cryovisor_pool_uses_total{found="yes"} 1`)
	waitMetric(t, "cryovisor_pool_ready 2")
}

// waitMetric waits until the server says a line.
func waitMetric(t *testing.T, line string) {
	t.Helper()
	said := ""
	for until := time.Now().Add(time.Minute); time.Now().Before(until); {
		answer, err := http.Get(os.Getenv("CRYOVISOR_URL") + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(answer.Body)
		if err = errors.Join(err, answer.Body.Close()); err != nil {
			t.Fatal(err)
		}
		if said = string(b); strings.Contains(said, "\n"+line+"\n") {
			return
		}
	}
	t.Fatalf("not within a minute: %s; the server says\n%s", line, said)
}

// TestFirstKeyFails can't write the first key: none is made that nobody knows, and what is in the way stays.
func TestFirstKeyFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "api-key")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	keys, err := server.OpenKeys(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	cmd := newServeCommand()
	cmd.SetContext(t.Context())
	if err := ensureAPIKey(cmd, serveFlags{data: dir}, keys); err == nil || !strings.Contains(err.Error(), "--api-key-file") {
		t.Errorf("a file in the way: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
		t.Errorf("%q, %v", b, err)
	}
	if all, err := keys.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
	if err := keys.Close(); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "other")
	if err := ensureAPIKey(cmd, serveFlags{data: dir, keyFile: path}, keys); err == nil {
		t.Error("with a database that is closed")
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("an empty file is left: %v", err)
	}
}
