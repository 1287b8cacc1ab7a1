package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/confine"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server"
	"github.com/cryovisor/cryovisor/vmm"
)

func newTemplateCommand() *cobra.Command {
	var data string
	cmd := &cobra.Command{
		Use:   "template",
		Short: "Make, list and delete the templates of a data directory",
		Long: `Make, list and delete what sandboxes are made of, in a data directory that no
server has at the time: kernels and disks are files of this host, and not the API's
business. Checkpoints of sandboxes are templates too.`,
	}
	cmd.PersistentFlags().StringVar(&data, "data", "", "data directory")
	_ = cmd.MarkPersistentFlagRequired("data")
	cmd.AddCommand(newTemplateCreateCommand(&data), newTemplateListCommand(&data), newTemplateRemoveCommand(&data))
	return cmd
}

// forVerbs is how long a directory that is opened for a verb keeps what is paused: longer than any server does, whose retention is not known here. A verb
// that looks must not delete.
const forVerbs = 100 * 365 * 24 * time.Hour

// withManager opens a data directory for a verb, or makes it.
func withManager(ctx context.Context, data string, do func(m *lifecycle.Manager) error) (err error) {
	m, err := lifecycle.OpenManager(ctx, data, lifecycle.ManagerOptions{Connect: server.Hardware(data), Retention: forVerbs})
	if errors.Is(err, lifecycle.ErrLocked) {
		return fmt.Errorf("%w, a server it seems: end that first", err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close(context.WithoutCancel(ctx))) }()
	return do(m)
}

// withExisting is withManager for a directory that must be there: a name that is mistyped is not to become one, with a key in it.
func withExisting(ctx context.Context, data string, do func(m *lifecycle.Manager) error) error {
	if _, err := os.Stat(filepath.Join(data, "catalog.db")); err != nil {
		return fmt.Errorf("%s is no data directory: %w", data, err)
	}
	return withManager(ctx, data, do)
}

// templateFlags are the flags of template create.
type templateFlags struct {
	boot      bootFlags
	disks     diskFlags
	vsock     bool
	readyText string
	settle    time.Duration
	within    time.Duration
	verbose   bool
	json      bool
	confine   confineFlag
}

func newTemplateCreateCommand(data *string) *cobra.Command {
	var f templateFlags
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Boot a machine, and keep it as a template when it is ready",
		Long: `Boot a machine as 'cryovisor run' does, wait until it is ready, and keep it as a
template, with its memory and its disks: sandboxes made of it begin there.

It is ready when it has written a text to its console (--ready-text), and then
has run for a while (--settle).`,
		Example: "  cryovisor template create debian --data DIR --kernel vmlinuz --initrd initrd.img \\\n" +
			"    --disk root=debian.qcow2 --vsock --ready-text 'login:' --settle 2s",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return createTemplate(cmd, *data, args[0], &f) },
	}
	f.boot.add(cmd)
	f.disks.addNew(cmd)
	flags := cmd.Flags()
	flags.BoolVar(&f.vsock, "vsock", false, "give it a vsock device; a server connects that of each sandbox to DIR/run/ID.sock")
	flags.StringVar(&f.readyText, "ready-text", "", "text on the console that says that it is up")
	flags.DurationVar(&f.settle, "settle", 0, "how long it runs after that")
	flags.DurationVar(&f.within, "ready-timeout", 2*time.Minute, "how long to wait for it to be ready")
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "print its console to standard error")
	f.confine.add(cmd)
	flags.BoolVar(&f.json, "json", false, "as JSON: all that is known of the template, in place of its id")
	return cmd
}

func createTemplate(cmd *cobra.Command, data, name string, f *templateFlags) error {
	if f.readyText == "" && f.settle == 0 {
		return errors.New("when is it ready? give --ready-text, --settle, or both")
	}
	cfg, err := f.boot.config()
	if err != nil {
		return err
	}
	defer f.boot.close()
	disks, err := f.disks.boot()
	if err != nil {
		return err
	}
	watch := &watcher{text: []byte(f.readyText), seen: make(chan struct{})}
	if f.verbose {
		watch.next = cmd.ErrOrStderr()
	}
	cfg.Console.Out = watch
	template := lifecycle.TemplateConfig{Name: name, VM: cfg, Disks: disks.Boot, Ready: f.ready(watch)}
	if f.vsock {
		template.VM.Vsock = &vmm.Vsock{CID: guestCID, Path: filepath.Join(data, "run", "template.sock")}
		template.Labels = map[string]string{server.LabelVsock: strconv.Itoa(guestCID)}
	}
	return withManager(cmd.Context(), data, func(m *lifecycle.Manager) error {
		if err := f.confineTo(cmd, data, m, disks.Boot); err != nil {
			return err
		}
		info, err := m.CreateTemplate(cmd.Context(), template)
		if err != nil {
			return err
		}
		if f.json {
			return json.NewEncoder(cmd.OutOrStdout()).Encode(info)
		}
		fmt.Fprintln(cmd.OutOrStdout(), info.ID)
		return nil
	})
}

// confineTo leaves this process the data directory, but for the master key, and the disks.
func (f *templateFlags) confineTo(cmd *cobra.Command, data string, m *lifecycle.Manager, disks []lifecycle.Disk) error {
	files, err := managerFiles(data, m)
	if err != nil {
		return err
	}
	rules := confine.Rules{ReadWrite: files}
	if err := allowDisks(&rules, disks); err != nil {
		return err
	}
	return f.confine.apply(rules, func(format string, args ...any) {
		fmt.Fprintf(cmd.ErrOrStderr(), "cryovisor: "+format+"\n", args...)
	})
}

// ready waits until the guest is.
func (f *templateFlags) ready(watch *watcher) func(context.Context, *lifecycle.Machine) error {
	return func(ctx context.Context, m *lifecycle.Machine) error {
		ctx, cancel := context.WithTimeoutCause(ctx, f.within, fmt.Errorf("it is not ready within %v", f.within))
		defer cancel()
		wait := func(is <-chan struct{}, after <-chan time.Time) error {
			select {
			case <-is:
			case <-after:
			case <-m.VM.Ended():
				return m.VM.Wait(ctx)
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			return nil
		}
		if f.readyText != "" {
			if err := wait(watch.seen, nil); err != nil {
				return err
			}
		}
		return wait(nil, time.After(f.settle))
	}
}

// watcher closes seen when a text has been written to it.
type watcher struct {
	text []byte
	seen chan struct{}
	next io.Writer

	mu   sync.Mutex
	tail []byte
	done bool
}

// Write implements io.Writer.
func (w *watcher) Write(b []byte) (int, error) {
	w.mu.Lock()
	w.tail = append(w.tail, b...)
	if !w.done && len(w.text) > 0 && bytes.Contains(w.tail, w.text) {
		w.done = true
		close(w.seen)
	}
	w.tail = w.tail[max(0, len(w.tail)-len(w.text)):]
	w.mu.Unlock()
	if w.next != nil {
		return w.next.Write(b)
	}
	return len(b), nil
}

func newTemplateListCommand(data *string) *cobra.Command {
	var asJSON, quiet bool
	cmd := &cobra.Command{
		Use: "ls", Short: "List templates and checkpoints, the newest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withExisting(cmd.Context(), *data, func(m *lifecycle.Manager) error {
				all := m.Templates()
				switch {
				case asJSON:
					return json.NewEncoder(cmd.OutOrStdout()).Encode(all)
				case quiet:
					for _, info := range all {
						fmt.Fprintln(cmd.OutOrStdout(), info.ID)
					}
					return nil
				}
				return printTemplates(cmd.OutOrStdout(), all)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "ids only")
	cmd.MarkFlagsMutuallyExclusive("json", "quiet")
	return cmd
}

func printTemplates(w io.Writer, all []lifecycle.TemplateInfo) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tNAME\tVCPUS\tMEMORY\tDISK\tSTORED\tCREATED\tOF SANDBOX")
	for _, info := range all {
		fmt.Fprintf(t, "%s\t%q\t%d\t%s\t%s\t%s\t%s\t%s\n", info.ID, info.Name, info.VCPUs, humanize.IBytes(info.MemoryBytes),
			humanize.IBytes(info.DiskBytes), humanize.IBytes(info.StoredBytes), fromNow(info.Created), info.Source)
	}
	return t.Flush()
}

func newTemplateRemoveCommand(data *string) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use: "rm NAME...", Short: "Delete templates or checkpoints, by id or name; sandboxes made of them stay", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withExisting(cmd.Context(), *data, func(m *lifecycle.Manager) error {
				return each(cmd, args, asJSON, func(name string) error {
					info, err := m.Template(name)
					if err != nil {
						return err
					}
					return m.DeleteTemplate(cmd.Context(), info.ID)
				})
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}
