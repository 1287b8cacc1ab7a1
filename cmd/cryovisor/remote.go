package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
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
	cmd.Flags().StringVar(&f.data, "data", "", "a data directory that no server has, instead of a server")
	cmd.Flags().Lookup("data").Hidden = true
}

// allowData is for verbs that need no running machine. The others know the flag too, to say what they need.
func (f *remoteFlags) allowData(cmd *cobra.Command) {
	cmd.Flags().Lookup("data").Hidden = false
	cmd.MarkFlagsMutuallyExclusive("data", "url")
}

func (f *remoteFlags) addJSON(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.json, "json", false, "as JSON")
}

func (f *remoteFlags) addOutput(cmd *cobra.Command) {
	f.addJSON(cmd)
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "ids only")
	cmd.MarkFlagsMutuallyExclusive("json", "quiet")
}

// client never takes a key from the command line, which other users of the host can see.
func (f *remoteFlags) client() (*client.Client, error) {
	if f.data != "" {
		return nil, fmt.Errorf("this needs a process that holds the machine: start 'cryovisor serve --data %s', and leave --data out here", f.data)
	}
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
		for _, k := range slices.Sorted(maps.Keys(s.Metadata)) {
			metadata = append(metadata, fmt.Sprintf("%q=%q", k, s.Metadata[k]))
		}
		fmt.Fprintf(t, "%s\t%q\t%s\t%s\t%s\t%s\t%s\t%s\n", s.ID, template, s.State, humanize.IBytes(s.MemoryMiB<<20), humanize.IBytes(s.StoredBytes),
			fromNow(s.Started), fromNow(s.End), strings.Join(metadata, " "))
	}
	return t.Flush()
}

// fromNow is a time as "3m ago" or "in 3m".
func fromNow(t time.Time) string {
	if d := time.Until(t); d > 0 {
		return "in " + short(d)
	}
	return short(time.Since(t)) + " ago"
}

// short is a duration in the largest unit that it has two of, or in seconds.
func short(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/day)
}

// wholeSeconds checks a duration, which the contract has in seconds.
func wholeSeconds(d time.Duration) error {
	if d < 0 || d%time.Second != 0 {
		return fmt.Errorf("a timeout of %v: want whole seconds", d)
	}
	return nil
}

// outcome is what came of one of several things.
type outcome struct {
	ID    string `json:"id"`
	Error string `json:"error,omitempty"`
}

// each does something for each of several sandboxes or templates, all of them even if some fail.
func each(cmd *cobra.Command, ids []string, asJSON bool, do func(id string) error) error {
	var errs []error
	outcomes := make([]outcome, 0, len(ids))
	for _, id := range ids {
		of := outcome{ID: id}
		if err := do(id); err != nil {
			of.Error = err.Error()
			errs = append(errs, err)
		}
		outcomes = append(outcomes, of)
	}
	var failed error
	if asJSON {
		failed = json.NewEncoder(cmd.OutOrStdout()).Encode(outcomes)
	}
	if len(ids) == 1 {
		return errors.Join(append(errs, failed)...)
	}
	for _, err := range errs {
		fmt.Fprintln(cmd.ErrOrStderr(), "cryovisor:", err)
	}
	if len(errs) > 0 {
		failed = errors.Join(failed, fmt.Errorf("%d of %d failed", len(errs), len(ids)))
	}
	return failed
}
