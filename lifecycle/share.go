package lifecycle

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
)

// Why an image can't be shared.
var (
	// ErrPeer says that the other side of the socket is not a process that shares an image: it is another user's, or does not
	// speak as one.
	ErrPeer = errors.New("peer does not share images")
	// ErrOtherSnapshot says that the other side has an image of another snapshot.
	ErrOtherSnapshot = errors.New("peer shares the image of another snapshot")
)

// ShareError says which socket did not yield an image. It wraps ErrPeer, ErrOtherSnapshot, memory.ErrImageFile, or the
// system's error, such as fs.ErrNotExist where nobody serves: Open the snapshot instead.
type ShareError struct {
	Socket string // its path
	Err    error
}

func (e *ShareError) Error() string {
	return fmt.Sprintf("lifecycle: shared image at %s: %v (open the snapshot by itself)", e.Socket, e.Err)
}
func (e *ShareError) Unwrap() error { return e.Err }

// handshakeTime is how long a peer may take to say what it wants, or to answer.
const handshakeTime = 10 * time.Second

// greeting is what both sides say first, the one that asks before the one that has the image: which image they mean. Each knows
// that from a manifest that it has authenticated itself. The answer carries the image's descriptor.
type greeting struct {
	id   snapshot.ID
	size uint64 // of the guest's RAM, in bytes
}

const (
	greetingMagic = "cryoimg\x01" // the last byte is the version
	greetingBytes = len(greetingMagic) + len(snapshot.ID{}) + 8
)

func (g greeting) marshal() []byte {
	b := append([]byte(greetingMagic), g.id[:]...)
	return binary.LittleEndian.AppendUint64(b, g.size)
}

func parseGreeting(b []byte) (g greeting, err error) {
	if len(b) != greetingBytes || string(b[:len(greetingMagic)]) != greetingMagic {
		return greeting{}, fmt.Errorf("%w: it says %.32q", ErrPeer, b)
	}
	b = b[copy(g.id[:], b[len(greetingMagic):])+len(greetingMagic):]
	g.size = binary.LittleEndian.Uint64(b)
	return g, nil
}

// greeting is what the template means.
func (t *Template) greeting() greeting {
	return greeting{t.origin.Header().ID, t.image.Size()}
}

// Share gives the image of the template to other processes of the same user that ask for it by OpenShared on l, a listener on a unix
// socket, until ctx ends, the template is closed, or l fails: the error, nil if it is Close that ended it. It closes l. What one
// process has fetched, the others need not fetch. Those that have the image keep it, when Share has returned and when this process
// has ended.
//
// While a process has the image, nothing is taken out of it, neither what all machines have rewritten nor what is over the limit
// of LimitImage; afterwards it is. The connection tells how long that is: the kernel closes it when a process dies.
//
// Who has the image can read the guest's memory without a key, and change it for all machines of the snapshot, or hang their
// processes: the socket must be accessible to this user only (mode 0600 or its directory 0700), and peers of other
// users are refused besides. A template of OpenShared can't share: memory.ErrAdopted.
func (t *Template) Share(ctx context.Context, l *net.UnixListener) error {
	defer l.Close()
	if t.adopted {
		return fmt.Errorf("lifecycle: share: %w", memory.ErrAdopted)
	}
	if err := t.enter(); err != nil {
		return err
	}
	err := t.accept(ctx, l)
	return errors.Join(err, t.leave())
}

// accept serves who comes. The template has a user meanwhile.
func (t *Template) accept(ctx context.Context, l *net.UnixListener) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer context.AfterFunc(t.closing, func() { l.Close() })()
	for {
		conn, err := l.AcceptUnix()
		switch {
		case t.closing.Err() != nil || ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return ctx.Err()
		case err != nil:
			return fmt.Errorf("lifecycle: share: %w", err)
		}
		t.lessees.Go(func() { t.lease(conn) })
	}
}

// lease serves one process for as long as it has the image. Nobody hears of its errors but the peer, which gets no image.
func (t *Template) lease(conn *net.UnixConn) {
	defer conn.Close()
	defer context.AfterFunc(t.ctx, func() { conn.Close() })()
	want, err := hear(conn)
	if err != nil {
		return
	}
	mine := t.greeting()
	if want != mine {
		_, _ = conn.Write(mine.marshal()) // it sees that it is another
		return
	}
	loan, err := t.image.Lend(func(file *os.File) error { return sendFile(conn, mine.marshal(), file) })
	if err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, conn) // until it has ended: it says nothing more
	if t.ctx.Err() != nil {
		_ = loan.Abandon() // it is the template that has ended, and it goes on
	} else {
		_ = loan.Return()
	}
}

// hear reads the greeting of a peer, which has to be the same user's.
func hear(conn *net.UnixConn) (greeting, error) {
	if err := checkPeer(conn); err != nil {
		return greeting{}, err
	}
	if err := conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return greeting{}, err
	}
	b := make([]byte, greetingBytes)
	if _, err := io.ReadFull(conn, b); err != nil {
		return greeting{}, err
	}
	g, err := parseGreeting(b)
	return g, errors.Join(err, conn.SetDeadline(time.Time{}))
}

// OpenShared is Open for a snapshot of which another process of this user has a template already, and shares its image on the unix
// socket at a path. What the other has fetched is not fetched again, and is in the host's memory once. The identities and the
// store are needed all the same: for the machine's state, for disks, and for what nobody has fetched yet. The template lives on when the
// other process has ended. Nothing is ever taken out of the image by this process.
//
// The other can read and change what the machines see; see Template.Share. Errors, besides those of Open: a *ShareError.
func OpenShared(
	ctx context.Context, store *snapshot.Store, id snapshot.ID, socket string, identities ...age.Identity,
) (*Template, error) {
	origin, err := store.Open(ctx, id, identities...)
	if err != nil {
		return nil, err
	}
	t, err := NewSharedTemplate(ctx, origin, socket)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open snapshot %v: %w", id, err), origin.Close())
	}
	return t, nil
}

// NewSharedTemplate is to OpenShared what NewTemplate is to Open.
func NewSharedTemplate(ctx context.Context, origin *snapshot.Reader, socket string) (*Template, error) {
	state, err := readState(origin)
	if err != nil {
		return nil, err
	}
	image, err := adopt(ctx, origin, state.Machine.MemoryBytes, socket)
	if err != nil {
		return nil, &ShareError{socket, err}
	}
	t := templateOf(origin, image)
	t.adopted = true
	return t, nil
}

// adopt makes an image of the one that is shared at socket.
func adopt(ctx context.Context, origin *snapshot.Reader, size uint64, socket string) (image *memory.Image, err error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	conn := c.(*net.UnixConn) // that is what "unix" means
	file, err := ask(ctx, conn, greeting{origin.Header().ID, size})
	if err == nil {
		image, err = memory.AdoptImage(size, imageSource{origin}, file, conn)
	}
	if err != nil {
		if file != nil {
			file.Close()
		}
		conn.Close()
		return nil, err
	}
	return image, nil
}

// ask does the asking side's part of the handshake.
func ask(ctx context.Context, conn *net.UnixConn, want greeting) (file *os.File, err error) {
	if err := checkPeer(conn); err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var answer []byte
	if _, err = conn.Write(want.marshal()); err == nil {
		answer, file, err = receiveFile(conn, greetingBytes)
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err == nil {
		err = checkAnswer(answer, want, file)
	}
	if err != nil && file != nil {
		file.Close()
		file = nil
	}
	return file, err
}

// checkAnswer says whether an answer and what came with it are what was asked for.
func checkAnswer(answer []byte, want greeting, file *os.File) error {
	got, err := parseGreeting(answer)
	switch {
	case err != nil:
		return err
	case got != want:
		return fmt.Errorf("%w: it has %v with %d bytes of RAM, not %v with %d", ErrOtherSnapshot, got.id, got.size, want.id, want.size)
	case file == nil:
		return fmt.Errorf("%w: no descriptor came with the answer", ErrPeer)
	}
	return nil
}
