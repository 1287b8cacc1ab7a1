# A flat image, at any address: it greets on COM1 and then sends back every byte
# that it receives, with bit 5 toggled; a dot powers the machine off.

	.intel_syntax noprefix
	.code64
	.text
	.globl	start

	.set DATA, 0x3f8
	.set STATUS, 0x3fd	# bit 0: received, bit 5: may send
	.set SLEEP, 0x600	# ACPI sleep control
	.set S5, 0x34		# enable, type 5

start:	lea	rsi, [rip + greeting]
1:	mov	bl, [rsi]
	test	bl, bl
	jz	2f
	inc	rsi
	call	send
	jmp	1b
2:	mov	edx, STATUS
	in	al, dx
	test	al, 1
	jz	2b
	mov	edx, DATA
	in	al, dx
	cmp	al, '.'
	je	off
	mov	bl, al
	xor	bl, 0x20
	call	send
	jmp	2b

send:	mov	edx, STATUS
1:	in	al, dx
	test	al, 0x20
	jz	1b
	mov	edx, DATA
	mov	al, bl
	out	dx, al
	ret

off:	mov	edx, SLEEP
	mov	al, S5
	out	dx, al
1:	jmp	1b

greeting:
	.asciz	"ready\n"
