package vsock

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// acceptPause is how long to wait when the system has no descriptor for another client.
const acceptPause = 100 * time.Millisecond

// acceptClients is the goroutine that takes host programs in.
func (d *Device) acceptClients() {
	for {
		select {
		case d.waiting <- struct{}{}:
		case <-d.stop:
			return
		}
		socket, err := d.listener.AcceptUnix()
		if err != nil {
			<-d.waiting
			if errors.Is(err, net.ErrClosed) || !d.pause() {
				return
			}
			continue
		}
		c := d.newConn(stateAsking)
		c.socket = socket
		if !d.join(c) {
			<-d.waiting
			socket.Close()
			continue
		}
		d.running.Go(c.serveClient)
	}
}

// pause waits a little, or returns false if the device is closed.
func (d *Device) pause() bool {
	t := time.NewTimer(acceptPause)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-d.stop:
		return false
	}
}

// join makes c one of the connections that use something, if there is room for it.
func (d *Device) join(c *conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || len(d.all) >= d.limits.connections {
		return false
	}
	d.all[c] = struct{}{}
	return true
}

// leave says that the goroutines of c have ended.
func (d *Device) leave(c *conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c.over = true
	if !c.held {
		delete(d.all, c)
	}
}

// list puts c on the list of those that may have a packet for the guest, if the worker knows it.
func (d *Device) list(c *conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c.held && !c.listed {
		c.listed = true
		d.ready = append(d.ready, c)
	}
}

// signal has the worker look at c.
func (d *Device) signal(c *conn) {
	d.list(c)
	d.host.Wake()
}

// ask has the worker ask the guest for a connection.
func (d *Device) ask(c *conn) {
	d.mu.Lock()
	d.asking = append(d.asking, c)
	d.mu.Unlock()
	d.host.Wake()
}

// serveClient is the goroutine of a connection that a host program wants.
func (c *conn) serveClient() {
	defer c.d.leave(c)
	defer c.socket.Close()
	port, err := c.readLine()
	<-c.d.waiting
	if err != nil {
		return
	}
	c.port = port
	c.d.ask(c)
	var reading sync.WaitGroup
	reading.Go(c.read)
	<-c.answered
	if c.accepted {
		c.write(fmt.Sprintf("OK %d\n", c.key.hostPort))
	}
	reading.Wait()
}

func (c *conn) readLine() (uint32, error) {
	if err := c.socket.SetReadDeadline(time.Now().Add(c.d.limits.line)); err != nil {
		return 0, err
	}
	port, err := readConnect(c.socket)
	if err != nil {
		return 0, err
	}
	return port, c.socket.SetReadDeadline(time.Time{})
}

// serveGuest is the goroutine of a connection that the guest wants. Dialling a unix socket does not wait: if too many
// others do, it fails.
func (c *conn) serveGuest(path string) {
	defer c.d.leave(c)
	socket, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	c.connected(socket, err)
	c.d.signal(c)
	if err != nil {
		return
	}
	defer socket.Close()
	var reading sync.WaitGroup
	reading.Go(c.read)
	c.write("")
	reading.Wait()
}

func (c *conn) connected(socket *net.UnixConn, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.failed = true
		return
	}
	c.socket = socket
	if c.deaf {
		// It fails only if the peer is gone, which reading finds out as well.
		_ = socket.CloseRead()
	}
}

// stopReading has nothing more taken from the host: its program can't write any more, and read ends.
func (c *conn) stopReading() {
	c.toGuest.abandon()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deaf = true
	if c.socket != nil {
		_ = c.socket.CloseRead() // as in connected
	}
}

// endWrites lets write go on until a moment at most.
func (c *conn) endWrites(until time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.socket == nil {
		return nil
	}
	if err := c.socket.SetWriteDeadline(until); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// read moves bytes from the host's socket to the guest's pipe, until there are no more or the guest wants none. An
// error of the socket is as much of an end as a shutdown: the guest learns the difference when it writes.
func (c *conn) read() {
	for space := c.toGuest.waitSpace(); space != nil; space = c.toGuest.waitSpace() {
		n, err := c.socket.Read(space)
		c.toGuest.commit(n)
		if err != nil {
			break
		}
		c.d.signal(c)
	}
	c.toGuest.end()
	c.d.signal(c)
}

// write moves the greeting, then the bytes of the host's pipe, to the host's socket, until the guest has ended or the
// host program takes no more. It writes part of the pipe at a time, so that the guest has room for more meanwhile.
func (c *conn) write(greeting string) {
	_, err := c.socket.Write([]byte(greeting))
	for err == nil {
		data := c.toHost.waitData()
		if data == nil {
			// It fails only if the peer is gone, which needs no shutdown then.
			_ = c.socket.CloseWrite()
			return
		}
		var n int
		n, err = c.socket.Write(data[:min(len(data), max(1, c.d.limits.window/4))])
		c.toHost.consume(n)
		c.d.signal(c)
	}
	c.toHost.abandon()
	c.d.signal(c)
}
