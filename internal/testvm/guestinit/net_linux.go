package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"

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

// vsockTimeout is the time that the other side has to answer.
var vsockTimeout = unix.Timeval{Sec: 30}

// vsockListen echoes whatever comes over connections to a port of the guest.
func vsockListen(port string) (string, error) {
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return "", err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: uint32(n)}); err != nil {
		return "", errors.Join(os.NewSyscallError("bind", err), unix.Close(fd))
	}
	if err := unix.Listen(fd, 8); err != nil {
		return "", errors.Join(os.NewSyscallError("listen", err), unix.Close(fd))
	}
	go func() {
		for {
			conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
				continue
			}
			if err != nil {
				return
			}
			go echo(os.NewFile(uintptr(conn), "vsock"))
		}
	}()
	return port, nil
}

// echo sends back what comes. A connection that is reset has its end, like any other.
func echo(conn *os.File) {
	_, _ = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
	_ = conn.Close()
}

// vsockConnect connects to a port of the host, sends a line, and answers with the line that comes back.
func vsockConnect(arg string) (string, error) {
	port, text, _ := strings.Cut(arg, " ")
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return "", err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", os.NewSyscallError("socket", err)
	}
	conn := os.NewFile(uintptr(fd), "vsock")
	defer conn.Close()
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &vsockTimeout); err != nil {
		return "", os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: uint32(n)}); err != nil {
		return "", os.NewSyscallError("connect", err)
	}
	if _, err := conn.WriteString(text + "\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}
