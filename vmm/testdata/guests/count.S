# A flat image, at any address: accesses to devices in a tight loop. The device at
# PORTS counts what it is asked for and answers with the count, so that the guest
# sees an access that was lost or made twice; where no device is, loads must read
# all ones. At a mismatch it writes the number of the check to PORTS+12 and stops.

	.intel_syntax noprefix
	.code64
	.text
	.globl	start

	.set PORTS, 0x5000
	.set NOTHING, 0xd0000000	# no RAM, no device

	.macro	check number, jump
	mov	ebp, \number
	\jump	bad
	.endm

start:	xor	ebx, ebx		# what the device counts
	lea	r8, [rip + buffer]
	mov	r9d, NOTHING
loop:	mov	rax, [r9]
	cmp	rax, -1
	check	1, jne
	mov	rax, [r9 + 4092]	# over the end of a page: two accesses
	cmp	rax, -1
	check	2, jne
	mov	eax, [r9 + 4]
	cmp	eax, -1
	check	3, jne
	movzx	eax, word ptr [r9 + 2]
	cmp	eax, 0xffff
	check	4, jne
	movzx	eax, byte ptr [r9 + 1]
	cmp	eax, 0xff
	check	5, jne
	mov	[r9 + 4092], rbx	# dropped

	mov	edx, PORTS
	in	eax, dx
	cmp	eax, ebx
	check	6, jne
	inc	ebx
	in	ax, dx
	cmp	ax, bx
	check	7, jne
	inc	ebx
	in	al, dx
	cmp	al, bl
	check	8, jne
	inc	ebx
	mov	rdi, r8
	mov	ecx, 8
	cld
	rep insd
	mov	rdi, r8
	mov	ecx, 8
1:	cmp	[rdi], ebx
	check	9, jne
	inc	ebx
	add	rdi, 4
	dec	ecx
	jnz	1b
	mov	rsi, r8			# and back
	mov	ecx, 8
	add	edx, 4
	rep outsd
	add	edx, 4
	mov	eax, ebx
	out	dx, eax
	mov	edx, 0x4ffe		# no device
	in	eax, dx			# straddles the start of PORTS
	cmp	eax, -1
	check	10, jne
	jmp	loop

bad:	mov	edx, PORTS + 12
	mov	eax, ebp
	out	dx, eax
1:	jmp	1b

	.balign 8
buffer:	.space	32
