# "beacon": a program for kernel mode (CPL 0) of x86-64 that sleeps, counts the
# ticks of its local APIC timer, and says so on COM1 now and then, through pauses.
#
# The host gives long mode and a stack (internal/testvm/beacon.go, which also
# describes the block); r13 is the block's address. It keeps to instructions that
# an interpreting KVM has. Exceptions have no handler: they end it.

	.intel_syntax noprefix
	.code64
	.text

	.set PERIOD,  0x00	# of the timer, in ns
	.set EVERY,   0x08	# ticks from one line to the next
	.set TICKS,   0x10	# now; the handler counts here
	.set NEXT,    0x18	# ticks of the next line
	.set IDT,     0x2000	# address of the table

	.set TIMER, 0x40	# vectors
	.set SPURIOUS, 0xff

	.set COM1, 0x3f8
	.set COM1_LSR, 0x3fd
	.set LSR_EMPTY, 0x20	# it takes a byte

	# Local APIC registers (r15 is its address).
	.set APIC_TPR, 0x80
	.set APIC_EOI, 0xb0
	.set APIC_SVR, 0xf0
	.set APIC_TIMER, 0x320
	.set APIC_INITIAL, 0x380
	.set APIC_DIVIDE, 0x3e0

	.globl	start
start:
	cld
	mov	r15d, 0xfee00000
	lea	rsi, [rip + on_timer]
	mov	edi, IDT + 16*TIMER
	call	write_gate
	lea	rsi, [rip + on_nothing]
	mov	edi, IDT + 16*SPURIOUS
	call	write_gate
	lidt	[rip + idtr]
	mov	dword ptr [r15 + APIC_TPR], 0
	mov	dword ptr [r15 + APIC_SVR], 0x100 + SPURIOUS
	mov	dword ptr [r15 + APIC_DIVIDE], 0xb	# by 1
	mov	dword ptr [r15 + APIC_TIMER], 0x20000 + TIMER	# periodic
	mov	eax, [r13 + PERIOD]
	mov	[r15 + APIC_INITIAL], eax
	lea	rsi, [rip + ready]
	call	print

# Interrupts are off between the look at the count and hlt, so none is missed.
sleep:	cli
	mov	rax, [r13 + TICKS]
	cmp	rax, [r13 + NEXT]
	jae	tell
	sti
	hlt
	jmp	sleep

tell:	mov	rcx, [r13 + EVERY]
	add	rcx, rax
	mov	[r13 + NEXT], rcx
	call	number
	lea	rsi, [rip + ticks]
	call	print
	jmp	sleep

on_timer:
	inc	qword ptr [r13 + TICKS]
	mov	dword ptr [r15 + APIC_EOI], 0
on_nothing:
	iretq

# Writes rax in decimal; changes rax, rcx, rdx, r8.
number:	mov	ecx, 10
	xor	r8d, r8d
1:	xor	edx, edx
	div	rcx
	add	edx, '0'
	push	rdx
	inc	r8d
	test	rax, rax
	jnz	1b
2:	pop	rax
	call	put
	dec	r8d
	jnz	2b
	ret

# Writes the text at rsi, which a zero ends; changes rax, rdx, rsi.
print:	lodsb
	test	al, al
	jz	1f
	call	put
	jmp	print
1:	ret

# Writes the byte al; changes rax, rdx.
put:	push	rax
	mov	edx, COM1_LSR
1:	in	al, dx
	test	al, LSR_EMPTY
	jz	1b
	pop	rax
	mov	edx, COM1
	out	dx, al
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

ready:	.asciz	"ready\n"
ticks:	.asciz	" ticks\n"

idtr:	.word	4095
	.quad	IDT
