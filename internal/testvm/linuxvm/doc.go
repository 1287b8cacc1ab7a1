// Package linuxvm boots Debian's kernels with the guest program of the project's tests, ../guestinit, and talks to it
// over the console. Tests that use it are named TestLinux... and begin with [Run].
package linuxvm
