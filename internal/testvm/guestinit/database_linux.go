package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const (
	databaseProgram = "/guestdb"
	databaseDir     = "db" // on the disk
)

// journals are the kinds of journal that SQLite keeps; there is a database of each kind.
var journals = []string{"wal", "delete"}

// databasePath is the file of a database on a disk that is mounted at root.
func databasePath(root, journal string) string {
	return filepath.Join(root, databaseDir, journal+".db")
}

// hasDatabase says whether there is a program to put load on databases.
func hasDatabase() bool {
	_, err := os.Stat(databaseProgram)
	return err == nil
}

// session is a process that works on one database: for each line with the number of a step it takes the step and answers.
type session struct {
	journal string
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader
	said    bytes.Buffer // to standard error; whole when the process has ended
	steps   uint64
	failed  bool // and told so
}

// startSession starts the process, which makes a database, and waits until it has.
func startSession(program, root, journal string) (*session, error) {
	s := &session{journal: journal, cmd: exec.Command(program, "load", "--journal", journal, databasePath(root, journal))}
	s.cmd.Stderr = &s.said
	var err error
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.out = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	_, err = s.answer("ready")
	return s, err
}

// answer reads a line that begins with a word, and returns the rest of it. After an error the process is over.
func (s *session) answer(word string) (string, error) {
	line, err := s.out.ReadString('\n')
	first, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	if err == nil && first != word {
		err = fmt.Errorf("it says %q, want %q", line, word)
	}
	if err != nil {
		return "", s.fail(err)
	}
	return rest, nil
}

// fail ends the process after an error, to which it may have said the reason.
func (s *session) fail(err error) error {
	s.failed = true
	err = errors.Join(err, s.in.Close(), programError(s.cmd.Wait(), &s.said))
	return fmt.Errorf("database with journal %s: %w", s.journal, err)
}

// maxSaid is how much of what a program says of its failure fits a line of the console.
const maxSaid = 500

// programError is a program's failure with what it said of it.
func programError(err error, said *bytes.Buffer) error {
	if err == nil {
		return nil
	}
	text := strings.TrimSpace(said.String())
	return fmt.Errorf("%w: %s", err, text[:min(len(text), maxSaid)])
}

func (s *session) step() (string, error) {
	if _, err := fmt.Fprintln(s.in, s.steps); err != nil {
		return "", s.fail(err)
	}
	detail, err := s.answer(fmt.Sprint(s.steps))
	if err == nil {
		s.steps++
	}
	return detail, err
}

// finish has it check everything and ends it.
func (s *session) finish() error {
	if s.failed {
		return nil
	}
	if err := s.in.Close(); err != nil {
		return s.fail(err)
	}
	if _, err := s.answer(fmt.Sprintf("steps=%d", s.steps)); err != nil {
		return err
	}
	return programError(s.cmd.Wait(), &s.said)
}

// database works on databases in turn.
type database struct {
	sessions []*session
	done     func() error // at the end
}

// newDatabase mounts the disk and starts the processes.
func (v *volume) newDatabase() (job, error) {
	if err := v.take(); err != nil {
		return nil, err
	}
	return startDatabase(databaseProgram, diskDir, v.release)
}

func startDatabase(program, root string, done func() error) (*database, error) {
	d := &database{done: done}
	if err := os.Mkdir(filepath.Join(root, databaseDir), 0o755); err != nil {
		return nil, errors.Join(err, done())
	}
	for _, journal := range journals {
		s, err := startSession(program, root, journal)
		if err != nil {
			return nil, errors.Join(err, d.finish())
		}
		d.sessions = append(d.sessions, s)
	}
	return d, nil
}

func (d *database) step(n uint64) (string, error) {
	s := d.sessions[n%uint64(len(d.sessions))]
	detail, err := s.step()
	return s.journal + " " + detail, err
}

func (d *database) finish() error {
	var errs []error
	for _, s := range d.sessions {
		errs = append(errs, s.finish())
	}
	return errors.Join(append(errs, d.done())...)
}

// checkDatabases checks what was left behind, and returns how many steps that took.
func checkDatabases(program, root string) (steps uint64, err error) {
	for _, journal := range journals {
		var said bytes.Buffer
		cmd := exec.Command(program, "check", databasePath(root, journal))
		cmd.Stderr = &said
		out, err := cmd.Output()
		if err != nil {
			return 0, fmt.Errorf("database with journal %s: %w", journal, programError(err, &said))
		}
		var n uint64
		if _, err := fmt.Sscanf(string(out), "steps=%d\n", &n); err != nil {
			return 0, fmt.Errorf("database with journal %s: it says %q: %w", journal, out, err)
		}
		steps += n
	}
	return steps, nil
}

// checkVolume mounts a disk that the load has left, or that was copied while the load ran (crashed), and checks all that
// is on it: "steps=N files=M" are the steps of the databases and the files of the disk job.
func (g *guest) checkVolume(crashed bool) (answer string, err error) {
	if g.load != nil {
		return "", errors.New("the load runs")
	}
	v := &volume{}
	if err := v.take(); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, v.release()) }()
	steps, err := checkDatabases(databaseProgram, diskDir)
	files, filesErr := checkNames(diskDir, crashed)
	return fmt.Sprintf("steps=%d files=%d", steps, files), errors.Join(err, filesErr)
}
