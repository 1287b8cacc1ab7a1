//go:build !unix || solaris || illumos || aix

package snapshot

import "os"

// lockFile does nothing here: only one process at a time may delete from a store
// on such a system, as the documentation of Store says.
func lockFile(*os.File, bool) error { return nil }

// syncDir does nothing here: Windows can't sync directories, and journals names.
func syncDir(string) error { return nil }
