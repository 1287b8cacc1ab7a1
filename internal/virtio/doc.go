// Package virtio is the part of virtio that all devices share: split virtqueues with indirect descriptors
// and event index, and the MMIO transport, as specified by OASIS virtio 1.2 (section numbers below
// are that document's). Legacy drivers are not served. Device types are in sub-packages.
//
// # Who runs what
//
// A Transport joins one Device to the guest. It has one goroutine, the worker, which waits for the Doorbell and
// then calls Device.Serve. Everything rings that one bell: a driver's notification (through KVM's
// ioeventfd, or as a register write that reached the transport), the host side of a device (Host.Wake) and
// Resume. So a device needs no lock around its queues, unless it completes requests on goroutines of its own.
//
//	        DRIVER_OK                      Quiesce
//	(reset) ---------> running (worker) <----------> quiesced --Save--> State
//	   ^                  |       |         Resume        ^
//	   '---- status 0 ----'       '-- protocol error      '--Restore-- (fresh)
//	                                  (DEVICE_NEEDS_RESET, no worker until a reset)
//
// # Requests and snapshots
//
// A request is taken from a ring by Queue.Pop and given back by Queue.Push, and is the device's in between.
// Quiesce takes no more requests, and waits until each one taken has been given back; so a State
// never has requests in it, only positions in the rings, which are in guest memory. What the driver
// had made available and the device had not taken is still there for the device that is restored, and Resume
// looks for it. Hence every request is completed exactly once.
//
// # Hostile drivers
//
// All that a driver writes is checked where it is used: ring positions, descriptor indexes, the length and order of
// chains, indirect tables, overflow of addresses and lengths. Memory is reached only through
// Memory, which refuses what isn't RAM. A driver that breaks the protocol gets DEVICE_NEEDS_RESET, and its
// device does nothing more until it is reset. What a driver can make the device allocate is bounded by the
// queue sizes that the device offers.
package virtio
