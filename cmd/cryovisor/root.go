package main

import (
	"github.com/spf13/cobra"
)

func newRootCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cryovisor",
		Short: "Freeze running microVMs and thaw them where they stopped",
		Long: `Cryovisor runs microVMs on Linux KVM, freezes them (memory, processors, devices)
into encrypted and compressed snapshots, and thaws a snapshot in milliseconds:
memory is read from storage when the guest touches it.

Start with 'cryovisor demo', which shows all of it and needs nothing but /dev/kvm.
Then make a key ('keygen'), boot an image of yours ('run'), pause it with Ctrl-]
followed by p, look at the snapshot ('inspect'), and go on ('resume').`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.CompletionOptions.HiddenDefaultCmd = true
	cmd.AddCommand(newDemoCommand(), newDemoStageCommand(), newKeygenCommand(), newRunCommand(),
		newResumeCommand(), newExportCommand(), newDiskCommand(), newInspectCommand(), newVerifyCommand(), newRekeyCommand(),
		newServeCommand(), newAPIKeyCommand(), newTemplateCommand())
	cmd.AddCommand(sandboxCommands()...)
	return cmd
}
