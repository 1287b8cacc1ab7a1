// Package snapshot stores and reads snapshots of guest memory and machine state:
// encrypted, compressed, durable, and readable at random.
//
// A snapshot is a manifest and the packs that it names. The manifest starts with
// a [Header] that anybody may read; the rest is one age file for the recipients
// that the writer chose. It holds the sections that the caller handed in (this
// package stores them and attaches no meaning to them) and the page map: which
// guest pages come from which chunk of which pack. A page that the map does not
// name is zero. A pack is a standard age file whose plaintext is chunks of guest
// pages, compressed one by one. docs/FORMAT.md describes every byte.
//
// A snapshot with a parent stores only what was written since; its map is still
// complete, because it names the packs of its ancestors directly. Reading never
// needs the parent's manifest, and a parent may be deleted before its children.
//
// Nothing becomes visible under its final name before it is complete and on
// stable storage. A [Writer] that fails, is cancelled or is aborted leaves
// nothing behind; a process that dies in between leaves at most packs that no
// manifest names, which [Store.Collect] removes.
//
// The package works on every operating system and processor that Go supports.
package snapshot
