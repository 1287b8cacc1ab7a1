package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"unicode"

	"filippo.io/age/plugin"
	"golang.org/x/term"
)

// errNotAnswered says that the user did not answer a question.
var errNotAnswered = errors.New("given up at a question on the terminal")

// questioner asks the user on the terminal, whatever standard input and output are. Ctrl-C, a signal that should end the process, or the
// end of the context end a question, and always the terminal is left as it was.
type questioner struct{ ctx context.Context }

// secret asks for what is not shown when it is typed, line for what is.
func (q questioner) secret(prompt string) (string, error) {
	return q.ask(func(t *term.Terminal) (string, error) { return t.ReadPassword(prompt) })
}

func (q questioner) line(prompt string) (string, error) {
	return q.ask(func(t *term.Terminal) (string, error) {
		t.SetPrompt(prompt)
		return t.ReadLine()
	})
}

func (q questioner) ask(question func(t *term.Terminal) (string, error)) (string, error) {
	in, out, err := openTerminal()
	if err != nil {
		return "", err
	}
	// Raw, so that Ctrl-C arrives here, and is no signal.
	was, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return "", errors.Join(err, in.Close(), out.Close())
	}
	type answer struct {
		text string
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		text, err := question(term.NewTerminal(terminal{in, out}, ""))
		answered <- answer{text, err}
	}()
	ctx, stop := signal.NotifyContext(q.ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP) // whatever the command does with them
	defer stop()
	select {
	case a := <-answered:
		_ = term.Restore(int(in.Fd()), was) // nothing can be done about it
		if errors.Is(a.err, io.EOF) {       // Ctrl-C, Ctrl-D
			fmt.Fprint(out, "\r\n")
			a.err = errNotAnswered
		}
		return a.text, errors.Join(a.err, in.Close(), out.Close())
	case <-ctx.Done():
		_ = term.Restore(int(in.Fd()), was)
		fmt.Fprint(out, "\r\n")
		return "", errNotAnswered // and leave open what is being read: the process ends soon
	}
}

// pluginUI is how plugins talk to the user. What a plugin makes of a question without an answer is its affair, so that is said here, too. age's own, plugin.NewTerminalUI, can't be interrupted: it reads with the terminal in a mode
// in which Ctrl-C is a signal, which ends a context, and nothing else.
func (q questioner) pluginUI(say func(format string, args ...any)) *plugin.ClientUI {
	told := func(text string, err error) (string, error) {
		if err != nil {
			say("%v", err)
		}
		return text, err
	}
	return &plugin.ClientUI{
		DisplayMessage: func(name, message string) error {
			say("%s plugin: %s", name, printableLine(message))
			return nil
		},
		RequestValue: func(_, message string, isSecret bool) (string, error) {
			if isSecret {
				return told(q.secret(printableLine(message) + " "))
			}
			return told(q.line(printableLine(message) + " "))
		},
		Confirm: func(_, message, yes, no string) (bool, error) {
			message, yes, no = printableLine(message), printableLine(yes), printableLine(no)
			if no == "" {
				_, err := told(q.secret(fmt.Sprintf("%s (press enter for %q) ", message, yes)))
				return err == nil, err
			}
			for {
				text, err := told(q.line(fmt.Sprintf("%s (type 1 for %q or 2 for %q) ", message, yes, no)))
				if err != nil {
					return false, err
				}
				switch strings.TrimSpace(text) {
				case "1":
					return true, nil
				case "2":
					return false, nil
				}
			}
		},
		WaitTimer: func(name string) { say("waiting for the %s plugin", name) },
	}
}

// printableLine takes out of a plugin's words what would control the terminal.
func printableLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

type terminal struct {
	io.Reader
	io.Writer
}

// openTerminal opens what the user sits at. It is two files on Windows.
func openTerminal() (in, out *os.File, err error) {
	from, to := "/dev/tty", "/dev/tty"
	if runtime.GOOS == "windows" {
		from, to = "CONIN$", "CONOUT$"
	}
	if in, err = os.OpenFile(from, os.O_RDWR, 0); err != nil {
		return nil, nil, err
	}
	if out, err = os.OpenFile(to, os.O_RDWR, 0); err != nil {
		in.Close()
		return nil, nil, err
	}
	return in, out, nil
}
