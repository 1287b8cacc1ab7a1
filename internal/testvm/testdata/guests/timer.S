# Guest B, "timer": a program for kernel mode (CPL 0) of x86-64 that lives on
# interrupts. vCPU 0 sets up its interrupt table and a timer, sleeps, counts
# ticks, and reports every so many of them; at a report it can send an interrupt
# to vCPU 1, which counts and reports those. Other vCPUs than these two are not
# meant to run it.
#
# The host gives long mode and a stack (internal/testvm/timer.go, which also
# describes the block); r13 is the block's address. It keeps to instructions that
# an interpreting KVM has: no SSE, no rdtscp, no int3.

	.intel_syntax noprefix
	.code64
	.text

	.set MODE,    0x00
	.set PERIOD,  0x08	# of the timer, in its own units
	.set EVERY,   0x10	# ticks from one report to the next
	.set FLAGS,   0x18
	.set SEED,    0x20	# initial checksum
	.set OUTPORT, 0x68	# report, 16 dwords
	.set INPORT,  0x6c	# orders, 1 dword
	.set RECORD,  0x100
	.set SEQ,     0x108	# number of the report
	.set COUNT,   0x110	# ticks, or interrupts from vCPU 0, at the report
	.set SUM,     0x118	# over all COUNTs reported
	.set TSC,     0x120	# at the report
	.set TICKS,   0x200	# now; the handlers count here
	.set IDT,     0x2000	# address of the table

	.set MODE_PERIODIC, 0	# LAPIC timer, periodic
	.set MODE_DEADLINE, 1	# LAPIC timer, TSC deadline
	.set MODE_PIT, 2	# 8254 through 8259 and LINT0

	.set F_BUSY, 1		# spin instead of hlt
	.set F_IPI, 2		# send an interrupt to vCPU 1 at each report
	.set F_RECEIVE, 4	# be vCPU 1

	.set ORDER_HOLD, 1

	.set TIMER, 0x40	# vectors
	.set IPI, 0x41
	.set PIC, 0x20
	.set SPURIOUS, 0xff

	.set IA32_TSC_DEADLINE, 0x6e0

	# Local APIC registers (r15 is its address).
	.set APIC_TPR, 0x80
	.set APIC_EOI, 0xb0
	.set APIC_SVR, 0xf0
	.set APIC_ICR, 0x300
	.set APIC_ICRHI, 0x310
	.set APIC_TIMER, 0x320
	.set APIC_LINT0, 0x350
	.set APIC_INITIAL, 0x380
	.set APIC_DIVIDE, 0x3e0

# rbx checksum, rbp ticks of the next report, r12 reports, r13 block, r14
# interrupts sent, r15 local APIC.

	.macro gate vector, handler
	lea	rsi, [rip + \handler]
	mov	edi, IDT + 16*\vector
	call	write_gate
	.endm

	.macro port number, value
	mov	al, \value
	out	\number, al
	.endm

	.globl	start
start:
	cld
	mov	r15d, 0xfee00000
	mov	rbx, [r13 + SEED]
	mov	rbp, [r13 + EVERY]
	xor	r12d, r12d
	xor	r14d, r14d
	test	dword ptr [r13 + FLAGS], F_RECEIVE
	jnz	apic			# vCPU 0 writes the table
	lea	rsi, [rip + vectors]
	mov	edi, IDT
1:	call	write_gate
	add	rsi, 16
	add	edi, 16
	cmp	edi, IDT + 4096
	jne	1b
	gate	TIMER, on_timer
	gate	IPI, on_ipi
	gate	PIC, on_pit
	gate	(PIC + 7), on_nothing
	gate	(PIC + 15), on_nothing
	gate	SPURIOUS, on_nothing
apic:	lidt	[rip + idtr]
	mov	dword ptr [r15 + APIC_TPR], 0
	mov	dword ptr [r15 + APIC_SVR], 0x100 + SPURIOUS
	test	dword ptr [r13 + FLAGS], F_RECEIVE
	jnz	sleep
	cmp	dword ptr [r13 + MODE], MODE_PIT
	je	pit
	cmp	dword ptr [r13 + MODE], MODE_DEADLINE
	je	deadline
	mov	dword ptr [r15 + APIC_DIVIDE], 0xb	# by 1
	mov	dword ptr [r15 + APIC_TIMER], 0x20000 + TIMER
	mov	eax, [r13 + PERIOD]
	mov	[r15 + APIC_INITIAL], eax
	jmp	sleep
deadline:
	mov	dword ptr [r15 + APIC_TIMER], 0x40000 + TIMER
	call	arm
	jmp	sleep
pit:	mov	dword ptr [r15 + APIC_LINT0], 0x700	# ExtINT
	port	0x20, 0x11
	port	0x21, PIC
	port	0x21, 4
	port	0x21, 1
	port	0xa0, 0x11
	port	0xa1, PIC + 8
	port	0xa1, 2
	port	0xa1, 1
	port	0x21, 0xfe
	port	0xa1, 0xff
	port	0x43, 0x34			# channel 0, rate generator
	mov	eax, [r13 + PERIOD]
	out	0x40, al
	mov	al, ah
	out	0x40, al

# Interrupts are off between the look at the count and hlt, so none is missed.
sleep:	cli
	mov	rax, [r13 + TICKS]
	cmp	rax, rbp
	jae	report
	test	dword ptr [r13 + FLAGS], F_BUSY
	jnz	1f
	sti
	hlt
	jmp	sleep
1:	sti
	nop
	nop
	jmp	sleep

report:	inc	r12
	mov	[r13 + SEQ], r12
	mov	[r13 + COUNT], rax
	add	rax, [r13 + EVERY]
	mov	rbp, rax
	movabs	rcx, 0x9e3779b97f4a7c15
	xor	rbx, [r13 + COUNT]
	imul	rbx, rcx
	rol	rbx, 29
	mov	[r13 + SUM], rbx
	rdtsc
	shl	rdx, 32
	or	rax, rdx
	mov	[r13 + TSC], rax
	lea	rsi, [r13 + RECORD]
	mov	ecx, 16
	mov	edx, [r13 + OUTPORT]
	rep outsd
1:	mov	edx, [r13 + INPORT]
	in	eax, dx
	test	al, ORDER_HOLD
	jz	2f
	mov	ecx, 1000
3:	dec	ecx
	jnz	3b
	jmp	1b
2:	test	dword ptr [r13 + FLAGS], F_IPI
	jz	sleep
	cmp	r14, [r13 + 4096 + TICKS]	# vCPU 1 has seen the last one
	jne	sleep
	inc	r14
	mov	dword ptr [r15 + APIC_ICRHI], 1 << 24
	mov	dword ptr [r15 + APIC_ICR], 0x4000 + IPI
	jmp	sleep

on_timer:
	inc	qword ptr [r13 + TICKS]
	mov	dword ptr [r15 + APIC_EOI], 0
	cmp	dword ptr [r13 + MODE], MODE_DEADLINE
	jne	1f
	push	rax
	push	rcx
	push	rdx
	call	arm
	pop	rdx
	pop	rcx
	pop	rax
1:	iretq

on_ipi:	inc	qword ptr [r13 + TICKS]
	mov	dword ptr [r15 + APIC_EOI], 0
	iretq

on_pit:	inc	qword ptr [r13 + TICKS]
	push	rax
	port	0x20, 0x20
	pop	rax
on_nothing:
	iretq

# Sets the deadline; changes rax, rcx, rdx.
arm:	rdtsc
	shl	rdx, 32
	or	rax, rdx
	add	rax, [r13 + PERIOD]
	mov	rdx, rax
	shr	rdx, 32
	mov	ecx, IA32_TSC_DEADLINE
	wrmsr
	ret

# Makes the gate at rdi an interrupt gate to rsi, which is below 4 GiB; changes rax.
write_gate:
	mov	eax, esi
	and	eax, 0xffff
	or	eax, 0x08 << 16
	mov	[rdi], eax
	mov	eax, esi
	and	eax, 0xffff0000
	or	eax, 0x8e00
	mov	[rdi + 4], eax
	mov	qword ptr [rdi + 8], 0
	ret

idtr:	.word	4095
	.quad	IDT

	.include "fault.inc"
