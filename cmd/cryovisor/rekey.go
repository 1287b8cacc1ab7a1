package main

import (
	"errors"
	"fmt"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/snapshot"
)

func newRekeyCommand() *cobra.Command {
	var (
		store storeFlag
		keys  keyFlags
	)
	cmd := &cobra.Command{
		Use:   "rekey SNAPSHOT...",
		Short: "Change who can open snapshots",
		Long: `Encrypt snapshots to other recipients: those that you name, and nobody else; so
name your own key, too, if you are to open them further on. Only the manifest of each is
written, so it takes no longer for a large snapshot; a crash leaves the old manifest or
the new one. The ids are printed.

The recipients can be age keys (X25519, post-quantum, of plugins) and SSH public keys, several
at once, except that post-quantum recipients are not mixed with others; or else a
passphrase (scrypt, work factor 2^18: a second and 256 MiB of memory to open).

Ancestors and descendants are not changed: name them as well if somebody is to lose
a whole history. Who has opened a snapshot before can have kept its manifest or the
keys of its packs, with which the packs can still be read. To take more than the
manifest from somebody, copy the snapshot ('disk compact') and delete the old one.

SNAPSHOT is an id, the beginning of one, or the path of a manifest (*.cryo).`,
		Example: `  cryovisor rekey 3f9a -i old.key -r age1...
  cryovisor rekey 3f9a 51c0 -r "$(cat ~/.ssh/id_ed25519.pub)" -R team.txt
  cryovisor rekey 3f9a --new-passphrase`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			to, err := keys.namedRecipients()
			if err != nil {
				return err
			}
			if len(to) == 0 {
				return errors.New("say who is to open the snapshots from now on: --recipient, --recipients-file or --new-passphrase")
			}
			ids, err := keys.identities()
			if err != nil {
				return err
			}
			return rekey(cmd, &store, args, ids, to)
		},
	}
	store.add(cmd)
	keys.addIdentity(cmd)
	keys.addRecipients(cmd, "")
	return cmd
}

// rekey rekeys what was named, but nothing if something was named that there is not. Of what fails
// then, each is said, and the others are done.
func rekey(cmd *cobra.Command, flag *storeFlag, names []string, ids []age.Identity, to []age.Recipient) error {
	type named struct {
		store *snapshot.Store
		id    snapshot.ID
	}
	var all []named
	for _, name := range names {
		store, id, err := flag.find(name)
		if err != nil {
			return err
		}
		if _, err := store.Header(id); err != nil {
			return err
		}
		all = append(all, named{store, id})
	}
	var failed []error
	for _, n := range all {
		if err := n.store.Rekey(cmd.Context(), n.id, ids, to); err != nil {
			failed = append(failed, err)
			continue
		}
		fmt.Fprintln(cmd.OutOrStdout(), n.id)
	}
	return errors.Join(failed...)
}
