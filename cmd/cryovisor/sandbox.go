package main

import (
	"context"
	"errors"
	"fmt"
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
	f.addData(cmd)
	f.addOutput(cmd)
	cmd.Flags().StringVar(&o.State, "state", "", "running or paused")
	cmd.Flags().StringArrayVar(&metadata, "metadata", nil, "key=value that it must have; may be repeated")
	return cmd
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
	err = withManager(ctx, f.data, func(m *lifecycle.Manager) error {
		opts := lifecycle.ListOptions{Metadata: o.Metadata}
		if o.State != "" {
			opts.States = []lifecycle.State{lifecycle.State(o.State)}
		}
		page, err := m.List(opts)
		for _, s := range page.Sandboxes {
			all = append(all, client.Sandbox{
				ID: s.ID, Template: s.Template, State: string(s.State), Started: s.Started, End: s.End, VCPUs: s.VCPUs,
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
			return each(cmd, args, func(id string) error {
				err := c.Pause(cmd.Context(), id)
				if state := (*lifecycle.StateError)(nil); errors.As(err, &state) {
					return nil // it is paused, as is wanted
				}
				return err
			})
		},
	}
	f.add(cmd)
	return cmd
}

func newKillCommand() *cobra.Command {
	var f remoteFlags
	cmd := &cobra.Command{
		Use: "kill ID...", Short: "Kill sandboxes, running or paused, and delete all of them", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.data != "" {
				return withManager(cmd.Context(), f.data, func(m *lifecycle.Manager) error {
					return each(cmd, args, func(id string) error { return m.Kill(cmd.Context(), id) })
				})
			}
			c, err := f.client()
			if err != nil {
				return err
			}
			return each(cmd, args, func(id string) error { return c.Kill(cmd.Context(), id) })
		},
	}
	f.add(cmd)
	f.addData(cmd)
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
			return logs(cmd, c, args[0], follow)
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what it writes, until interrupted")
	return cmd
}

// pollEvery is how often a server is asked for what is new.
const pollEvery = time.Second

func logs(cmd *cobra.Command, c *client.Client, id string, follow bool) error {
	for cursor := int64(0); ; {
		lines, next, err := c.Logs(cmd.Context(), id, cursor)
		if err != nil {
			return err
		}
		for _, l := range lines {
			fmt.Fprintf(cmd.OutOrStdout(), "%s\n", printable(l.Message))
		}
		more := next > cursor
		cursor = next
		if !follow && !more {
			return nil
		}
		if more {
			continue
		}
		select {
		case <-cmd.Context().Done():
			return nil
		case <-time.After(pollEvery):
		}
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
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.client()
			if err != nil {
				return err
			}
			once = once || !term.IsTerminal(int(os.Stdout.Fd()))
			for {
				if !once {
					fmt.Fprint(cmd.OutOrStdout(), "\x1b[H\x1b[2J")
				}
				if err := top(cmd, c); err != nil || once {
					return err
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(pollEvery):
				}
			}
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&once, "once", false, "show it once, as it is done where the output is no terminal")
	return cmd
}

func top(cmd *cobra.Command, c *client.Client) error {
	all, err := listAll(cmd.Context(), c, client.ListOptions{State: "running"})
	if err != nil {
		return err
	}
	t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tCPU %\tFETCHED\tMEMORY\tUP\tLEFT")
	for _, s := range all {
		usage, err := c.Usage(cmd.Context(), s.ID)
		if err != nil || usage == nil {
			continue // it has ended or is paused by now
		}
		fmt.Fprintf(t, "%s\t%.1f\t%s\t%s\t%v\t%v\n", s.ID, usage.CPUPercent, humanize.IBytes(usage.MemUsed), humanize.IBytes(usage.MemTotal),
			time.Since(s.Started).Round(time.Second), time.Until(s.End).Round(time.Second))
	}
	return t.Flush()
}
