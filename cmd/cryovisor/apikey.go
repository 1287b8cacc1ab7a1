package main

import (
	"encoding/json"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/server"
)

func newAPIKeyCommand() *cobra.Command {
	var data string
	cmd := &cobra.Command{
		Use:   "apikey",
		Short: "Make, list and revoke the API keys of a server",
		Long: `Make, list and revoke the API keys of a data directory, also while a server has it.

Each key sees only the sandboxes that were made with it. Keys are stored hashed:
what is shown when one is made is not shown again.`,
	}
	cmd.PersistentFlags().StringVar(&data, "data", "", "data directory")
	_ = cmd.MarkPersistentFlagRequired("data")
	with := func(do func(cmd *cobra.Command, keys *server.Keys, args []string) error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(data, 0o700); err != nil {
				return err
			}
			keys, err := server.OpenKeys(cmd.Context(), data)
			if err != nil {
				return err
			}
			defer keys.Close()
			return do(cmd, keys, args)
		}
	}
	asJSON := false
	list := &cobra.Command{Use: "list", Short: "List the keys, without their secrets", Args: cobra.NoArgs}
	list.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	list.RunE = with(func(cmd *cobra.Command, keys *server.Keys, _ []string) error { return listAPIKeys(cmd, keys, asJSON) })
	cmd.AddCommand(list, &cobra.Command{
		Use: "create NAME", Short: "Make a key, and print it this once", Args: cobra.ExactArgs(1),
		RunE: with(func(cmd *cobra.Command, keys *server.Keys, args []string) error {
			key, secret, err := keys.Create(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "API key %s:\n", key.ID)
			fmt.Fprintln(cmd.OutOrStdout(), secret)
			return nil
		}),
	}, &cobra.Command{
		Use: "revoke ID", Short: "Revoke a key; its sandboxes stay until their time is over", Args: cobra.ExactArgs(1),
		RunE: with(func(cmd *cobra.Command, keys *server.Keys, args []string) error {
			return keys.Revoke(cmd.Context(), args[0])
		}),
	})
	return cmd
}

func listAPIKeys(cmd *cobra.Command, keys *server.Keys, asJSON bool) error {
	all, err := keys.List(cmd.Context())
	if err != nil {
		return err
	}
	if asJSON {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(all)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tNAME\tCREATED")
	for _, key := range all {
		fmt.Fprintf(w, "%s\t%q\t%s\n", key.ID, key.Name, key.Created.Format(time.RFC3339))
	}
	return w.Flush()
}
