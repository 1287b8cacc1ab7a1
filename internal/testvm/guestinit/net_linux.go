package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// netUp gives eth0 an address with its prefix, as in 10.0.0.2/24, and brings it up. The kernel answers pings then.
func netUp(address string) (string, error) {
	ip, subnet, err := net.ParseCIDR(address)
	if err != nil {
		return "", err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	for _, set := range []struct {
		request uint
		ip      []byte
	}{{unix.SIOCSIFADDR, ip.To4()}, {unix.SIOCSIFNETMASK, subnet.Mask}} {
		req, err := unix.NewIfreq("eth0")
		if err != nil {
			return "", err
		}
		if err := errors.Join(req.SetInet4Addr(set.ip), unix.IoctlIfreq(fd, set.request, req)); err != nil {
			return "", fmt.Errorf("eth0: address: %w", err)
		}
	}
	return address, interfaceUp("eth0")
}

// tcpEcho echoes whatever comes over connections to a TCP port.
func tcpEcho(port string) (string, error) {
	l, err := net.Listen("tcp4", ":"+port)
	if err != nil {
		return "", err
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = echo(conn) // the other side sees it
			}()
		}
	}()
	return port, nil
}

// echo sends back what comes, until the connection's end or an error.
func echo(conn io.ReadWriteCloser) error {
	_, err := io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
	return errors.Join(err, conn.Close())
}
