package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cryovisor/cryovisor/confine"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// The console's escape: Ctrl-] and then a key.
const escapeKey = 0x1d

const consoleHelp = `The guest's first serial port is this terminal. Ctrl-] begins a command: p pauses
the guest to a snapshot and ends, c stores it as it is and lets it run on, q ends without a
snapshot, Ctrl-] sends itself. SIGTERM and SIGUSR1 pause to a snapshot too; SIGINT and SIGHUP
end the guest without one.`

// guestFlags are the flags of verbs that run a guest in the foreground.
type guestFlags struct {
	store   storeFlag
	keys    keyFlags
	devices deviceFlags
	confine confineFlag
}

func (g *guestFlags) add(cmd *cobra.Command) {
	g.store.add(cmd)
	g.keys.addIdentity(cmd)
	g.keys.addRecipients(cmd, orOwn)
	g.confine.add(cmd)
}

// foreground runs a machine whose console is the terminal until the guest ends,
// or the user pauses it or quits.
type foreground struct {
	cmd        *cobra.Command
	flags      *guestFlags
	recipients []age.Recipient // of pauses; the file that they are from can't be read any more when the guest runs
	console    *console
}

// newForeground takes the terminal. The caller calls restore.
func newForeground(cmd *cobra.Command, flags *guestFlags) (*foreground, func(), error) {
	to, err := flags.keys.encryptTo()
	if err != nil {
		return nil, nil, fmt.Errorf("a pause will need a key: %w", err)
	}
	c, err := newConsole(cmd.InOrStdin())
	if err != nil {
		return nil, nil, err
	}
	return &foreground{cmd: cmd, flags: flags, recipients: to, console: c}, c.restore, nil
}

// hardware is the terminal and what the flags name. The caller closes f.flags.devices after the machine.
func (f *foreground) hardware() (vmm.Hardware, error) {
	hw, err := f.flags.devices.hardware()
	hw.Console = vmm.Console{In: f.console, Out: f.cmd.OutOrStdout()}
	return hw, err
}

// start confines this process to what it needs from now on, and lets the guest run. All that the guest's machine is made of is open.
func (f *foreground) start(m *lifecycle.Machine, run func() error) error {
	if slices.ContainsFunc(f.recipients, isPlugin) {
		f.say("this process is not confined: a plugin for a recipient will have to be started for each pause")
		return run()
	}
	store, err := f.flags.store.open()
	if err == nil {
		err = store.Make()
	}
	if err != nil {
		return err
	}
	rules := confine.Rules{ReadWrite: []string{store.Dir()}}
	for _, file := range m.Overlays() {
		rules.Remove = append(rules.Remove, filepath.Dir(file)) // when a snapshot has what is in it
	}
	if socket := f.flags.devices.vsock; socket != "" {
		rules.Sockets = append(rules.Sockets, filepath.Dir(socket))
	}
	if err := f.flags.confine.apply(rules, f.say); err != nil {
		return err
	}
	return run()
}

// run waits for the end of a guest that is running.
func (f *foreground) run(ctx context.Context, m *lifecycle.Machine) error {
	pause := make(chan os.Signal, 1)
	signal.Notify(pause, syscall.SIGTERM, userSignal)
	defer signal.Stop(pause)
	for {
		select {
		case <-m.VM.Ended():
			return f.ended(m.VM.Wait(ctx))
		case <-ctx.Done():
			return ctx.Err()
		case <-pause:
		case key := <-f.console.commands:
			switch key {
			case 'q':
				f.say("ended without a snapshot")
				return nil
			case 'c':
				if err := f.checkpoint(ctx, m); err != nil {
					f.say("%v", err)
				}
				continue
			}
		}
		err := f.pause(ctx, m)
		if err == nil {
			return nil
		}
		f.say("the guest runs on: %v", err)
	}
}

// finish runs a guest that was started, unless that failed, and gives it and its devices back.
func (f *foreground) finish(m *lifecycle.Machine, started error) error {
	err := started
	if err == nil {
		err = f.run(f.cmd.Context(), m)
	}
	overlays := m.Overlays()
	err = errors.Join(err, m.Close(), f.flags.devices.close())
	for _, file := range overlays {
		if _, missing := os.Stat(file); missing == nil {
			f.say("what the guest has written to a disk is in %s", file)
		}
	}
	return err
}

// store stores the guest by one of the machine's methods, which goes by a name.
func (f *foreground) store(
	ctx context.Context, name string,
	do func(context.Context, *snapshot.Store, lifecycle.PauseOptions) (lifecycle.Paused, error),
) (*snapshot.Store, lifecycle.Paused, error) {
	store, err := f.flags.store.open()
	if err != nil {
		return nil, lifecycle.Paused{}, err
	}
	bar := newProgress(f.cmd.ErrOrStderr(), name)
	defer bar.finish()
	p, err := do(ctx, store, lifecycle.PauseOptions{Recipients: f.recipients, Progress: bar.update})
	return store, p, err
}

// checkpoint stores the guest, which runs on.
func (f *foreground) checkpoint(ctx context.Context, m *lifecycle.Machine) error {
	store, p, err := f.store(ctx, "storing", m.Checkpoint)
	if err == nil {
		f.say("stood still for %.1f ms, stored in %.2f s to %s", p.Freeze.Seconds()*1000, p.Total.Seconds(), store.ManifestPath(p.ID))
	}
	return err
}

// pause stores the guest. On an error it runs on.
func (f *foreground) pause(ctx context.Context, m *lifecycle.Machine) error {
	store, p, err := f.store(ctx, "pausing", m.Pause)
	if err != nil {
		return err
	}
	f.say("paused in %.2f s to %s", p.Total.Seconds(), store.ManifestPath(p.ID))
	f.console.restore()
	fmt.Fprintln(f.cmd.OutOrStdout(), p.ID)
	return nil
}

func (f *foreground) ended(err error) error {
	if errors.Is(err, vmm.ErrPowerOff) {
		f.say("%v", err)
		return nil
	}
	return err
}

// say writes a line of our own on a terminal that may be in raw mode.
func (f *foreground) say(format string, args ...any) {
	fmt.Fprintf(f.cmd.ErrOrStderr(), "\r\ncryovisor: "+format+"\r\n", args...)
}

// console reads the terminal for the guest and takes the commands out.
type console struct {
	in       io.Reader
	fd       int
	state    *term.State // to go back to; nil if in is no terminal
	escaped  bool
	commands chan byte
}

func newConsole(in io.Reader) (*console, error) {
	c := &console{in: in, commands: make(chan byte, 1)}
	f, ok := in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return c, nil
	}
	c.fd = int(f.Fd())
	state, err := term.MakeRaw(c.fd)
	if err != nil {
		return nil, err
	}
	c.state = state
	return c, nil
}

// restore gives the terminal back. It may be called more than once.
func (c *console) restore() {
	if c.state != nil {
		_ = term.Restore(c.fd, c.state) // nobody is left to be told
		c.state = nil
	}
}

// Read gives the guest what was typed, without the commands.
func (c *console) Read(p []byte) (int, error) {
	for {
		n, err := c.in.Read(p)
		if c.state != nil {
			n = c.filter(p[:n])
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// filter takes the escape sequences out of b and returns how much is left.
func (c *console) filter(b []byte) int {
	n := 0
	for _, key := range b {
		switch {
		case c.escaped && key != escapeKey:
			c.escaped = false
			if key == 'p' || key == 'c' || key == 'q' {
				select {
				case c.commands <- key:
				default: // one is waiting already
				}
			}
			continue
		case !c.escaped && key == escapeKey:
			c.escaped = true
			continue
		}
		c.escaped = false
		b[n] = key
		n++
	}
	return n
}

func newRunCommand() *cobra.Command {
	var (
		flags guestFlags
		boot  bootFlags
	)
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Boot an image, with its console on the terminal",
		Long: "Boot a Linux kernel (--kernel: a bzImage or an ELF vmlinux), or a flat 64-bit image\n(--flat).\n\n" +
			consoleHelp,
		Example: "  cryovisor run --kernel vmlinuz --initrd initrd.img --memory 512MiB --disk root=debian.qcow2\n" +
			"  cryovisor run --flat hello.bin --base 0x200000",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runGuest(cmd, &flags, &boot)
		},
	}
	boot.add(cmd)
	flags.add(cmd)
	flags.devices.addBoot(cmd)
	return cmd
}

func runGuest(cmd *cobra.Command, flags *guestFlags, boot *bootFlags) error {
	cfg, err := boot.config()
	if err != nil {
		return err
	}
	defer boot.close()
	f, restore, err := newForeground(cmd, flags)
	if err != nil {
		return err
	}
	defer restore()
	if cfg.Hardware, err = f.hardware(); err != nil {
		return err
	}
	disks, err := flags.devices.disks.boot()
	if err != nil {
		return errors.Join(err, flags.devices.close())
	}
	m, err := lifecycle.Boot(cmd.Context(), cfg, disks)
	if err != nil {
		return errors.Join(err, flags.devices.close())
	}
	return f.finish(m, f.start(m, m.VM.Start))
}

func newResumeCommand() *cobra.Command {
	var (
		flags    guestFlags
		eager    bool
		prefetch string
	)
	cmd := &cobra.Command{
		Use:   "resume SNAPSHOT",
		Short: "Let a paused guest go on, with its console on the terminal",
		Long: "Resume a snapshot where it stopped. Memory is read when the guest touches it; the\n" +
			"store must stay until the guest ends, and the images under its disks for ever. Name\n" +
			"its network, vsock, --disk-rw and --disk-ro as when it was booted.\n\n" + consoleHelp + "\n\n" +
			"SNAPSHOT is an id, the beginning of one, or the path of a manifest (*.cryo).",
		Example: "  cryovisor resume 3f9a\n  cryovisor resume 3f9a --image root=/images/debian.qcow2",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			store, id, err := flags.store.find(args[0])
			if err != nil {
				return err
			}
			flags.store.dir = store.Dir() // pauses go where the snapshot is: they are diffs of it
			opts := lifecycle.ResumeOptions{Eager: eager}
			if opts.Prefetch, err = parsePrefetch(prefetch); err != nil {
				return err
			}
			return resumeGuest(cmd, &flags, store, id, opts)
		},
	}
	flags.add(cmd)
	flags.devices.addResume(cmd)
	cmd.Flags().BoolVar(&eager, "eager", false, "load all of the memory first (works without userfaultfd)")
	cmd.Flags().StringVar(&prefetch, "prefetch", "working-set",
		"what to load before the guest asks: working-set (what it touched after the last resume), all, or none")
	return cmd
}

func parsePrefetch(s string) (lifecycle.Prefetch, error) {
	switch s {
	case "working-set":
		return lifecycle.PrefetchWorkingSet, nil
	case "all":
		return lifecycle.PrefetchAll, nil
	case "none":
		return lifecycle.PrefetchNone, nil
	}
	return 0, fmt.Errorf("--prefetch %q: say working-set, all or none", s)
}

func resumeGuest(cmd *cobra.Command, flags *guestFlags, store *snapshot.Store, id snapshot.ID, opts lifecycle.ResumeOptions) error {
	ids, err := flags.keys.identities()
	if err != nil {
		return err
	}
	f, restore, err := newForeground(cmd, flags)
	if err != nil {
		return err
	}
	defer restore()
	hw, err := f.hardware()
	if err != nil {
		return err
	}
	disks, err := flags.devices.disks.resume()
	if err != nil {
		return errors.Join(err, flags.devices.close())
	}
	bar := newProgress(cmd.ErrOrStderr(), "loading")
	opts.Identities, opts.Hardware, opts.Disks, opts.Progress = ids, hw, disks, bar.update
	m, err := lifecycle.Resume(cmd.Context(), store, id, opts)
	if errors.Is(err, vmm.ErrNoUserfaultfd) {
		f.say("%v; loading all of the memory first", err)
		opts.Eager = true
		m, err = lifecycle.Resume(cmd.Context(), store, id, opts)
	}
	bar.finish()
	if err != nil {
		return errors.Join(err, flags.devices.close())
	}
	return f.finish(m, f.start(m, m.VM.Resume))
}
