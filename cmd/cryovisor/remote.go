package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/server/client"
)

// remoteFlags are the flags of verbs that talk to a server.
type remoteFlags struct {
	url, keyFile string
	data         string // the directory to look at instead; empty: none
	json, quiet  bool
}

// The environment variables of the SDKs; the first that is set counts.
var (
	urlVariables = []string{"CRYOVISOR_URL", "E2B_API_URL"}
	keyVariables = []string{"CRYOVISOR_API_KEY", "E2B_API_KEY", "AGENTBOX_API_KEY"}
)

func (f *remoteFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.url, "url", "", "the server (default $"+strings.Join(urlVariables, ", else $")+", else http://"+defaultListen+")")
	cmd.Flags().StringVar(&f.keyFile, "api-key-file", "", "file with the API key (default: the key in $"+strings.Join(keyVariables, ", else $")+")")
}

func (f *remoteFlags) addData(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.data, "data", "", "a data directory that no server has, instead of a server")
	cmd.MarkFlagsMutuallyExclusive("data", "url")
}

func (f *remoteFlags) addOutput(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.json, "json", false, "as JSON")
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "ids only")
	cmd.MarkFlagsMutuallyExclusive("json", "quiet")
}

// client never takes a key from the command line, which other users of the host can see.
func (f *remoteFlags) client() (*client.Client, error) {
	c := &client.Client{URL: f.url, Key: firstSet(keyVariables)}
	if c.URL == "" {
		c.URL = firstSet(urlVariables)
	}
	if c.URL == "" {
		c.URL = "http://" + defaultListen
	}
	c.URL = strings.TrimSuffix(c.URL, "/")
	if f.keyFile != "" {
		b, err := os.ReadFile(f.keyFile)
		if err != nil {
			return nil, err
		}
		c.Key = strings.TrimSpace(string(b))
	}
	if c.Key == "" {
		return nil, fmt.Errorf("no API key: set $%s, or name a file with --api-key-file", keyVariables[0])
	}
	return c, nil
}

func firstSet(variables []string) string {
	for _, v := range variables {
		if s := os.Getenv(v); s != "" {
			return s
		}
	}
	return ""
}

// pairs reads flags of the form key=value.
func pairs(flags []string) (map[string]string, error) {
	m := make(map[string]string, len(flags))
	for _, flag := range flags {
		k, v, ok := strings.Cut(flag, "=")
		if !ok {
			return nil, fmt.Errorf("metadata %q: want key=value", flag)
		}
		m[k] = v
	}
	return m, nil
}

// show prints sandboxes as the flags say.
func (f *remoteFlags) show(w io.Writer, sandboxes []client.Sandbox) error {
	switch {
	case f.json:
		if sandboxes == nil {
			sandboxes = []client.Sandbox{}
		}
		return json.NewEncoder(w).Encode(sandboxes)
	case f.quiet:
		for _, s := range sandboxes {
			fmt.Fprintln(w, s.ID)
		}
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tTEMPLATE\tSTATE\tMEMORY\tSTORED\tSTARTED\tEND\tMETADATA")
	for _, s := range sandboxes {
		template := s.Alias
		if template == "" {
			template = s.Template
		}
		var metadata []string
		for k, v := range s.Metadata {
			metadata = append(metadata, fmt.Sprintf("%q=%q", k, v))
		}
		fmt.Fprintf(t, "%s\t%q\t%s\t%s\t%s\t%s\t%s\t%s\n", s.ID, template, s.State, humanize.IBytes(s.MemoryMiB<<20), humanize.IBytes(s.StoredBytes),
			humanize.Time(s.Started), humanize.Time(s.End), strings.Join(metadata, " "))
	}
	return t.Flush()
}

// seconds checks a duration of whole seconds.
func wholeSeconds(d time.Duration) error {
	if d < 0 || d%time.Second != 0 {
		return fmt.Errorf("a timeout of %v: want whole seconds", d)
	}
	return nil
}

// each does something for each of several sandboxes, all of them even if some fail.
func each(cmd *cobra.Command, ids []string, do func(id string) error) error {
	var errs []error
	for _, id := range ids {
		if err := do(id); err != nil {
			fmt.Fprintln(cmd.ErrOrStderr(), "cryovisor:", err)
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 && len(ids) > 1 {
		return fmt.Errorf("%d of %d failed", len(errs), len(ids))
	}
	return errors.Join(errs...)
}
