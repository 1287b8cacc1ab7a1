// Package vsock is the virtio socket device (virtio 1.2, section 5.10), stream sockets only. It is the channel between
// a sandbox and its host, and ends in unix sockets of the host, in the convention that Firecracker introduced:
//
//   - A host program connects to Config.Path and writes "CONNECT <port>\n". When a program in the guest that listens on
//     that port has accepted, it reads "OK <host port>\n", and from then on the guest's bytes. If nobody listens, or
//     the guest says no, the connection is closed without an answer.
//   - A guest program that connects to CID 2, port P, reaches the program that listens on the unix socket "<Path>_<P>".
//     If there is none, its connection is refused.
//
// # Who runs what
//
//	guest <-- queues --> Serve, on the worker <-- pipe --> goroutines, two for each connection <--> unix socket
//
// Only Serve touches queues and what the connections know of the protocol; neither needs a lock. The
// goroutines move bytes between a unix socket and a pipe, a bounded buffer; when there is something new for the guest
// they put their connection on the list of the ready and wake the worker. The pipe towards the host is as large
// as the space that the guest is told it may fill (section 5.10.6.3), so Serve never waits for a host program, and one
// that does not read stops nobody but its peer.
//
// # Snapshots
//
// No packet is kept between two calls of Serve but in pipes, so a device that is quiesced and goes on in the same
// process has lost nothing. In a new process there are no connections: the guest is told so by a transport
// reset event, and whatever it still sends for one of them is answered with a reset. Its listening sockets do not
// notice. It gets no packets before it has dealt with the event, so that a host program may connect at once.
package vsock
