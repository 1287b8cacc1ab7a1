// Package lifecycle joins a virtual machine, its memory and a store of
// snapshots: it pauses a running machine to a snapshot, at once or prepared while it runs, makes checkpoints of one that runs on,
// and resumes a snapshot as a machine, in the same process or another.
//
// A pause that fails, or is cancelled, leaves the machine running and nothing in
// the store. A pause that returns without an error has made the snapshot durable.
package lifecycle
