package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server/client"
)

// sandboxCommands are the verbs of the sandboxes of a server.
func sandboxCommands() []*cobra.Command {
	return []*cobra.Command{
		newCreateCommand(), newListCommand(), newPauseCommand(), newConnectCommand(), newKillCommand(), newForkCommand(), newLogsCommand(), newTopCommand(),
	}
}

func newCreateCommand() *cobra.Command {
	var f remoteFlags
	var o client.CreateOptions
	var metadata []string
	cmd := &cobra.Command{
		Use: "create [TEMPLATE]", Short: "Make a sandbox of a server's template (default base)", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(args) > 0 {
				o.Template = args[0]
			}
			if o.Metadata, err = pairs(metadata); err != nil {
				return err
			}
			c, err := f.client()
			if err = errors.Join(err, wholeSeconds(o.Timeout)); err != nil {
				return err
			}
			s, err := c.Create(cmd.Context(), o)
			if err != nil {
				return err
			}
			return f.showOne(cmd, c, s.ID)
		},
	}
	f.add(cmd)
	f.addOutput(cmd)
	cmd.Flags().StringArrayVar(&metadata, "metadata", nil, "key=value; may be repeated")
	cmd.Flags().DurationVar(&o.Timeout, "timeout", 0, "how long it runs (default: the server's)")
	cmd.Flags().BoolVar(&o.Pause, "pause", false, "pause it at its timeout, instead of killing it")
	return cmd
}

// showOne prints the id of a sandbox, or all that is known of it.
func (f *remoteFlags) showOne(cmd *cobra.Command, c *client.Client, ids ...string) error {
	if !f.json {
		for _, id := range ids {
			fmt.Fprintln(cmd.OutOrStdout(), id)
		}
		return nil
	}
	var all []client.Sandbox
	for _, id := range ids {
		s, err := c.Get(cmd.Context(), id)
		if err != nil {
			return err
		}
		all = append(all, s)
	}
	return f.show(cmd.OutOrStdout(), all)
}

func newListCommand() *cobra.Command {
	var f remoteFlags
	var o client.ListOptions
	var metadata []string
	cmd := &cobra.Command{
		Use: "ls", Short: "List sandboxes, running and paused, the newest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.State != "" && o.State != string(lifecycle.StateRunning) && o.State != string(lifecycle.StatePaused) {
				return fmt.Errorf("--state %q: want running or paused", o.State)
			}
			if o.Metadata, err = pairs(metadata); err != nil {
				return err
			}
			all, err := f.list(cmd.Context(), o)
			if err != nil {
				return err
			}
			return f.show(cmd.OutOrStdout(), all)
		},
	}
	f.add(cmd)
	f.allowData(cmd)
	f.addOutput(cmd)
	cmd.Flags().StringVar(&o.State, "state", "", "running or paused")
	cmd.Flags().StringArrayVar(&metadata, "metadata", nil, "key=value that it must have; may be repeated")
	return cmd
}

// direct does something with the directory that the flags name.
func (f *remoteFlags) direct(ctx context.Context, do func(m *lifecycle.Manager) error) error {
	err := withExisting(ctx, f.data, do)
	if errors.Is(err, lifecycle.ErrLocked) {
		return fmt.Errorf("%w, or ask it: give --url in place of --data", err)
	}
	return err
}

// list lists the sandboxes of a server or of a directory.
func (f *remoteFlags) list(ctx context.Context, o client.ListOptions) (all []client.Sandbox, err error) {
	if f.data == "" {
		c, err := f.client()
		if err != nil {
			return nil, err
		}
		return listAll(ctx, c, o)
	}
	err = f.direct(ctx, func(m *lifecycle.Manager) error {
		opts := lifecycle.ListOptions{Metadata: o.Metadata}
		if o.State != "" {
			opts.States = []lifecycle.State{lifecycle.State(o.State)}
		}
		page, err := m.List(opts)
		for _, s := range page.Sandboxes {
			of, _ := m.Template(s.Template) // which may have been deleted: it has no name then
			all = append(all, client.Sandbox{
				ID: s.ID, Template: s.Template, Alias: of.Name, State: string(s.State), Started: s.Started, End: s.End, VCPUs: s.VCPUs,
				MemoryMiB: s.MemoryBytes >> 20, DiskMiB: s.DiskBytes >> 20, StoredBytes: s.StoredBytes, Metadata: s.Metadata,
			})
		}
		return err
	})
	return all, err
}

func listAll(ctx context.Context, c *client.Client, o client.ListOptions) (all []client.Sandbox, err error) {
	for {
		page, next, err := c.List(ctx, o)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		if o.Token = next; next == "" {
			return all, nil
		}
	}
}

func newPauseCommand() *cobra.Command {
	var f remoteFlags
	cmd := &cobra.Command{
		Use: "pause ID...", Short: "Pause sandboxes to encrypted storage, durably", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.client()
			if err != nil {
				return err
			}
			return each(cmd, args, f.json, func(id string) error {
				err := c.Pause(cmd.Context(), id)
				if state := (*lifecycle.StateError)(nil); errors.As(err, &state) {
					return nil // it is paused, as is wanted
				}
				return err
			})
		},
	}
	f.add(cmd)
	f.addJSON(cmd)
	return cmd
}

func newKillCommand() *cobra.Command {
	var f remoteFlags
	cmd := &cobra.Command{
		Use: "kill ID...", Short: "Kill sandboxes, running or paused, and delete all of them", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.data != "" {
				return f.direct(cmd.Context(), func(m *lifecycle.Manager) error {
					return each(cmd, args, f.json, func(id string) error { return m.Kill(cmd.Context(), id) })
				})
			}
			c, err := f.client()
			if err != nil {
				return err
			}
			return each(cmd, args, f.json, func(id string) error { return c.Kill(cmd.Context(), id) })
		},
	}
	f.add(cmd)
	f.addJSON(cmd)
	f.allowData(cmd)
	return cmd
}

func newConnectCommand() *cobra.Command {
	var f remoteFlags
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "connect ID", Short: "Have a sandbox run: resume it if it is paused, extend its timeout if not", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.client()
			if err = errors.Join(err, wholeSeconds(timeout)); err != nil {
				return err
			}
			began := time.Now()
			_, resumed, err := c.Connect(cmd.Context(), args[0], timeout)
			if err != nil {
				return err
			}
			if resumed && !f.json && !f.quiet {
				fmt.Fprintf(cmd.ErrOrStderr(), "resumed in %v\n", time.Since(began).Round(100*time.Microsecond))
			}
			return f.showOne(cmd, c, args[0])
		},
	}
	f.add(cmd)
	f.addOutput(cmd)
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "how long it runs from now (default: what it was created with)")
	return cmd
}

func newForkCommand() *cobra.Command {
	var f remoteFlags
	var n int
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "fork ID", Short: "Make sandboxes that begin as one is now, which goes on", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.client()
			if err = errors.Join(err, wholeSeconds(timeout)); err != nil {
				return err
			}
			forks, err := c.Fork(cmd.Context(), args[0], n, timeout)
			ids := make([]string, len(forks))
			for i, s := range forks {
				ids[i] = s.ID
			}
			return errors.Join(err, f.showOne(cmd, c, ids...))
		},
	}
	f.add(cmd)
	f.addOutput(cmd)
	cmd.Flags().IntVarP(&n, "count", "n", 1, "how many")
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "how long they run (default: as the sandbox)")
	return cmd
}

func newLogsCommand() *cobra.Command {
	var f remoteFlags
	var follow bool
	cmd := &cobra.Command{
		Use: "logs ID", Short: "Print the end of what a sandbox's guest wrote to its console", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.client()
			if err != nil {
				return err
			}
			if follow {
				return f.followLogs(cmd, c, args[0])
			}
			all := []client.Log{}
			for cursor := int64(0); ; {
				lines, next, err := c.Logs(cmd.Context(), args[0], cursor)
				if err != nil {
					return err
				}
				if all = append(all, lines...); next == cursor {
					break
				}
				cursor = next
			}
			if f.json {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(all)
			}
			printLogs(cmd.OutOrStdout(), all)
			return nil
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&f.json, "json", false, "as JSON; with --follow, a line for each line")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what it writes, until interrupted")
	return cmd
}

// pollEvery is how often a server is asked for what is new.
const pollEvery = time.Second

func (f *remoteFlags) followLogs(cmd *cobra.Command, c *client.Client, id string) error {
	cursor := int64(0)
	return again(cmd.Context(), func() error {
		lines, next, err := c.Logs(cmd.Context(), id, cursor)
		if err != nil {
			return err
		}
		cursor = next
		if !f.json {
			printLogs(cmd.OutOrStdout(), lines)
			return nil
		}
		for _, l := range lines {
			if err := json.NewEncoder(cmd.OutOrStdout()).Encode(l); err != nil {
				return err
			}
		}
		return nil
	})
}

// again does something again and again, until it fails or ctx ends, which is no error: it is how people end it.
func again(ctx context.Context, do func() error) error {
	for {
		err := do()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pollEvery):
		}
	}
}

func printLogs(w io.Writer, lines []client.Log) {
	for _, l := range lines {
		fmt.Fprintln(w, printable(l.Message))
	}
}

// printable takes out what would control a terminal: a guest's output is not to be trusted.
func printable(s string) string {
	b := []rune(s)
	kept := b[:0]
	for _, r := range b {
		if r == '\t' || r >= ' ' && r != 0x7f && (r < 0x80 || r >= 0xa0) {
			kept = append(kept, r)
		}
	}
	return string(kept)
}

func newTopCommand() *cobra.Command {
	var f remoteFlags
	var once bool
	cmd := &cobra.Command{
		Use: "top", Short: "Show what running sandboxes use, again and again on a terminal", Args: cobra.NoArgs,
		Long: fmt.Sprintf(`Show what running sandboxes use: processor time (100 %% is one processor, since it last
began to run), memory that was fetched, and how long they have run and will.

A server is asked for the use of the newest %d only, as it bounds the rate of requests.`, maxUsages),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.client()
			if err != nil {
				return err
			}
			if once || f.json || !term.IsTerminal(int(os.Stdout.Fd())) {
				return f.top(cmd, c)
			}
			return again(cmd.Context(), func() error {
				fmt.Fprint(cmd.OutOrStdout(), "\x1b[H\x1b[2J")
				return f.top(cmd, c)
			})
		},
	}
	f.add(cmd)
	f.addJSON(cmd)
	cmd.Flags().BoolVar(&once, "once", false, "show it once, as it is done for --json and where the output is no terminal")
	return cmd
}

// maxUsages is for how many sandboxes top asks how much they use: each is a request, each second, at the cost of the key's other users.
const maxUsages = 20

// used is a sandbox, and what it uses if that is known.
type used struct {
	client.Sandbox
	Usage *client.Usage `json:"usage,omitempty"`
}

func (f *remoteFlags) top(cmd *cobra.Command, c *client.Client) error {
	all, err := listAll(cmd.Context(), c, client.ListOptions{State: string(lifecycle.StateRunning)})
	if err != nil {
		return err
	}
	rows := make([]used, len(all))
	for i, s := range all {
		rows[i] = used{Sandbox: s}
		if i >= maxUsages {
			continue
		}
		rows[i].Usage, err = c.Usage(cmd.Context(), s.ID)
		if err != nil && !errors.Is(err, lifecycle.ErrNotFound) && !errors.Is(err, client.ErrRateLimited) {
			return err
		}
	}
	if f.json {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(rows)
	}
	t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tCPU %\tFETCHED\tMEMORY\tUP\tLEFT")
	for _, row := range rows {
		cpu, fetched := "-", "-"
		if row.Usage != nil {
			cpu, fetched = fmt.Sprintf("%.1f", row.Usage.CPUPercent), humanize.IBytes(row.Usage.MemUsed)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", row.ID, cpu, fetched, humanize.IBytes(row.MemoryMiB<<20),
			short(time.Since(row.Started)), short(max(0, time.Until(row.End))))
	}
	return t.Flush()
}
