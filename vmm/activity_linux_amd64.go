package vmm

import (
	"time"

	"golang.org/x/sys/unix"
)

// Activity says what the guest has done so far. It may be called at any time; when the guest has ended, times are zero.
func (vm *VM) Activity() Activity {
	var a Activity
	if !vm.hasEnded() {
		for _, c := range vm.vcpus {
			a.VCPU += threadTime(c.tid)
		}
	}
	for _, d := range vm.virtio {
		if d.traffic != nil {
			a.Frames += d.traffic()
		}
	}
	return a
}

// threadTime is the processor time of a thread of this process; KVM counts what the guest uses as the thread's. The number of
// the clock is made as Linux's include/linux/posix-timers.h has it: the complement of the thread's id, and below it 3 bits, of which 4 says that it is a
// thread's, and 2 that it is the scheduler's time.
func threadTime(tid int) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^tid)<<3|4|2, &ts); err != nil {
		return 0 // it has ended
	}
	return time.Duration(ts.Nano())
}
