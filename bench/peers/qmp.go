//go:build linux && amd64

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// qmpClient speaks QEMU's machine protocol: one command at a time, answered in order, with events in between.
type qmpClient struct {
	conn   io.ReadWriteCloser
	in     *json.Decoder
	events []qmpMessage // that came before an answer
}

// qmpMessage is all that QEMU sends: a greeting, an answer or an event.
type qmpMessage struct {
	QMP *struct {
		Version struct {
			QEMU struct{ Major, Minor, Micro int }
		}
	}
	Return json.RawMessage
	Error  *struct{ Class, Desc string }
	Event  string
	Data   json.RawMessage
}

// commandError says that QEMU refused a command.
type commandError struct{ Command, Class, Desc string }

func (e *commandError) Error() string {
	return fmt.Sprintf("QEMU refused %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// errMigration says that a migration ended without success.
var errMigration = errors.New("QEMU's migration did not complete")

// newQMPClient takes QEMU's greeting, and returns its version.
func newQMPClient(conn io.ReadWriteCloser) (*qmpClient, string, error) {
	c := &qmpClient{conn: conn, in: json.NewDecoder(conn)}
	greeting, err := c.receive()
	if err != nil {
		return nil, "", err
	}
	if greeting.QMP == nil {
		return nil, "", errors.New("QMP: no greeting")
	}
	v := greeting.QMP.Version.QEMU
	_, err = c.execute("qmp_capabilities", nil)
	return c, fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro), err
}

func (c *qmpClient) receive() (m qmpMessage, err error) {
	if err = c.in.Decode(&m); err != nil {
		err = fmt.Errorf("QMP: %w", err)
	}
	return m, err
}

// execute gives a command and returns what is answered.
func (c *qmpClient) execute(command string, arguments map[string]any) (json.RawMessage, error) {
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	text, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	if _, err := c.conn.Write(text); err != nil {
		return nil, fmt.Errorf("QMP: %w", err)
	}
	for {
		m, err := c.receive()
		switch {
		case err != nil:
			return nil, err
		case m.Event != "":
			c.events = append(c.events, m)
		case m.Error != nil:
			return nil, &commandError{command, m.Error.Class, m.Error.Desc}
		default:
			return m.Return, nil
		}
	}
}

// next returns the next event.
func (c *qmpClient) next() (qmpMessage, error) {
	if len(c.events) == 0 {
		return c.receive()
	}
	e := c.events[0]
	c.events = c.events[1:]
	return e, nil
}

// human gives a command of the human monitor, whose answer is empty unless it failed.
func (c *qmpClient) human(line string) error {
	answer, err := c.execute("human-monitor-command", map[string]any{"command-line": line})
	if err != nil {
		return err
	}
	var text string
	if err := json.Unmarshal(answer, &text); err != nil {
		return fmt.Errorf("QMP: %w", err)
	}
	if text != "" {
		return &commandError{line, "human monitor", strings.TrimSpace(text)}
	}
	return nil
}

// begin gives a command that begins a migration, out or in.
func (c *qmpClient) begin(command, uri string) error {
	_, err := c.execute(command, map[string]any{"uri": uri})
	return err
}

// await waits for the end of a migration, if that one tells its events.
func (c *qmpClient) await() error {
	for {
		e, err := c.next()
		if err != nil {
			return err
		}
		if e.Event != "MIGRATION" {
			continue
		}
		var data struct{ Status string }
		if err := json.Unmarshal(e.Data, &data); err != nil {
			return fmt.Errorf("QMP: %w", err)
		}
		switch data.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("%w: it %s %s", errMigration, data.Status, c.whyFailed())
		}
	}
}

// whyFailed is what QEMU knows of a migration that failed.
func (c *qmpClient) whyFailed() string {
	answer, err := c.execute("query-migrate", nil)
	if err != nil {
		return err.Error()
	}
	return string(answer)
}
