//go:build !unix

package main

import "syscall"

const userSignal = syscall.SIGTERM
