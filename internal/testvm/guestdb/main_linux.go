// Command guestdb puts load on a SQLite database in the Linux guests of the project's tests, and checks one that was left
// behind. All that is in a database follows from the number of steps that it is after, which it holds itself.
//
//	guestdb load --journal wal|delete FILE   makes the database; takes a step for each line of its input
//	guestdb check FILE                       checks the database
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "guestdb:", err)
		os.Exit(1)
	}
}

// errUsage is of arguments that are none of this program's.
var errUsage = errors.New("usage: guestdb load --journal wal|delete FILE, or guestdb check FILE")

func run(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	if len(args) == 0 {
		return errUsage
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	journal := flags.String("journal", "wal", "")
	if err := flags.Parse(args[1:]); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	if flags.NArg() != 1 || *journal != "wal" && *journal != "delete" {
		return errUsage
	}
	switch args[0] {
	case "load":
		return load(ctx, flags.Arg(0), *journal, in, out)
	case "check":
		return check(ctx, flags.Arg(0), out)
	default:
		return errUsage
	}
}

// load makes a database, says "ready", and takes a step for each line of in, which has the step's number; it answers with
// that and what it did, when that is committed. A crash then may undo the last step of a database with the journal "delete",
// and no other: SQLite does not sync the removal of a journal. At the end of in it checks everything and says "steps=N".
func load(ctx context.Context, path, journal string, in io.Reader, out io.Writer) (err error) {
	d, err := create(ctx, path, journal)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return err
	}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		n, err := strconv.ParseUint(lines.Text(), 10, 64)
		if err != nil {
			return fmt.Errorf("number of a step: %w", err)
		}
		if n != d.model.steps {
			return fmt.Errorf("%s: step %d comes where %d is due", path, n, d.model.steps)
		}
		detail, err := d.step(ctx)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(out, "%d %s\n", n, detail); err != nil {
			return err
		}
	}
	if err := errors.Join(lines.Err(), d.integrity(ctx), d.compare(ctx)); err != nil {
		return err
	}
	return sayModel(out, d.model)
}

// check checks a database that is not in use, and says "steps=N".
func check(ctx context.Context, path string, out io.Writer) (err error) {
	d, err := open(ctx, path, "rw")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.verify(ctx); err != nil {
		return err
	}
	return sayModel(out, d.model)
}

func sayModel(out io.Writer, m model) error {
	_, err := fmt.Fprintf(out, "steps=%d\n", m.steps)
	return err
}
