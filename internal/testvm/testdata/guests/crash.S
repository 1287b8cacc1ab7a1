# Guest C, "crash": the ways in which a guest ends, or does not. The host starts
# it at start + 64*n, with rdx a port, rax a value, rcx a width, and an interrupt
# table of no entries.

	.intel_syntax noprefix
	.code64
	.text
	.globl	start

# 0: a page fault that can't be delivered is a triple fault.
start:	movabs	rcx, 0x7f0000000000
	mov	rcx, [rcx]
	ud2

# 1: an instruction that an interpreting KVM can't execute in kernel mode. A
# processor can, and then gets to the write.
	.org	0x40, 0xcc
	popcnt	rbx, rcx
	jmp	write

# 2: write the value to the port: reset, power-off.
	.org	0x80, 0xcc
write:	cmp	ecx, 1
	je	1f
	cmp	ecx, 2
	je	2f
	out	dx, eax
	jmp	spin
1:	out	dx, al
	jmp	spin
2:	out	dx, ax
	jmp	spin

# 3: sleep for ever.
	.org	0xc0, 0xcc
	cli
1:	hlt
	jmp	1b

# 4: run for ever, without an exit.
	.org	0x100, 0xcc
spin:	jmp	spin
