# Guest A, "worker": a deterministic program for user mode (CPL 3) of x86-64.
#
# Each vCPU runs this code on its own parameter block and its own stripe of
# memory. It chooses a page by a seeded generator, folds all of the page into a
# running checksum, turns all vector registers over once, and XORs part of the
# page with the checksum. Every so many steps it reports with a string OUT and
# reads an answer with IN and a string IN, which enter the checksum as well, with
# the registers that a step leaves alone. So a lost register, a lost page and a
# lost I/O completion all show in what it reports next,
# and in what it writes to memory from then on.
#
# The host builds tables and start state (internal/testvm/worker.go, which also
# describes the parameter block); r13 is the block's address. There is no stack,
# no privileged instruction and no end: the host tells it to hold or to power off.

	.intel_syntax noprefix
	.code64
	.text

	.set SEED,     0x00	# initial checksum
	.set PRNG,     0x08	# initial state of the generator, not 0
	.set FIRST,    0x10	# first content page of the stripe
	.set PAGES,    0x18	# pages of the stripe
	.set WORKSET,  0x20	# pages that are chosen from
	.set SPACING,  0x28	# pages from one run of 64 chosen pages to the next
	.set BASE,     0x30	# address of content page 0
	.set HOLE,     0x38	# content addresses from here on ...
	.set HOLELEN,  0x40	# ... are moved up by this much
	.set STRIDE,   0x48	# qwords from one rewritten qword to the next, a power of 2
	.set EVERY,    0x50	# steps from one report to the next
	.set FLAGS,    0x58
	.set FILLSEED, 0x60	# seed of the pattern of flag FILL
	.set OUTPORT,  0x68	# report, 16 dwords
	.set INPORT,   0x6c	# token, 1 dword
	.set INSPORT,  0x70	# echo, 4 dwords
	.set OFFPORT,  0x74	# power-off
	.set OFFVALUE, 0x78
	.set OFFWIDTH, 0x7c	# bytes: 1, 2 or 4
	.set RECORD,   0x100	# the report
	.set STEP,     0x108
	.set SUM,      0x110
	.set STATE,    0x118
	.set LANES,    0x120	# vector register 0 after the last step
	.set ECHO,     0x140	# what the string IN read
	.set X87,      0x150	# scratch
	.set CONTROL,  0x158	# x87 control word (2 bytes), and 4 bytes on, MXCSR
	.set VECTORS,  0x200	# initial vector registers, 16 of 32 bytes

	.set F_AVX2, 1		# use YMM
	.set F_FILL, 2		# write the pattern of FILLSEED before the first step
	.set F_FAULT, 4		# execute ud2 at the start

	.set HOLD, 1		# token bits
	.set OFF, 2

# rbx checksum, rbp generator, r8 steps until the report, r9 to r11 accumulators,
# r12 step, r13 block, r14 page, r15 multiplier; st(0) a checksum; fs and gs have
# the bases block + SEED and block + PRNG.

	.macro mix value
	xor	rbx, \value
	imul	rbx, r15
	rol	rbx, 29
	.endm

	.macro random state	# xorshift64; changes rax
	mov	rax, \state
	shl	rax, 13
	xor	\state, rax
	mov	rax, \state
	shr	rax, 7
	xor	\state, rax
	mov	rax, \state
	shl	rax, 17
	xor	\state, rax
	.endm

	.macro address page, out
	mov	\out, \page
	shl	\out, 12
	add	\out, [r13 + BASE]
	cmp	\out, [r13 + HOLE]
	jb	1f
	add	\out, [r13 + HOLELEN]
1:
	.endm

	# Vector register i += j, then k ^= i.
	.macro turn_sse i, j, k
	paddq	xmm\i, xmm\j
	pxor	xmm\k, xmm\i
	.endm

	.macro turn_avx i, j, k
	vpaddq	ymm\i, ymm\i, ymm\j
	vpxor	ymm\k, ymm\k, ymm\i
	.endm

	.globl	start
start:
	cld
	mov	rbx, [r13 + SEED]
	mov	rbp, [r13 + PRNG]
	movabs	r15, 0x9e3779b97f4a7c15
	xor	r9d, r9d
	xor	r10d, r10d
	xor	r11d, r11d
	xor	r12d, r12d
	fninit
	fldcw	[r13 + CONTROL]
	ldmxcsr	[r13 + CONTROL + 4]
	fild	qword ptr [r13 + SEED]
	test	dword ptr [r13 + FLAGS], F_FAULT
	jz	1f
	ud2
1:	test	dword ptr [r13 + FLAGS], F_FILL
	jnz	fill
load:	test	dword ptr [r13 + FLAGS], F_AVX2
	jnz	load_avx
	.irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
	movdqu	xmm\i, [r13 + VECTORS + 32*\i]
	.endr
	jmp	report
load_avx:
	.irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
	vmovdqu	ymm\i, [r13 + VECTORS + 32*\i]
	.endr
	jmp	report

step:	# choose a page: xorshift64*, scaled to the working set
	mov	rax, rbp
	shr	rax, 12
	xor	rbp, rax
	mov	rax, rbp
	shl	rax, 25
	xor	rbp, rax
	mov	rax, rbp
	shr	rax, 27
	xor	rbp, rax
	movabs	rax, 0x2545f4914f6cdd1d
	imul	rax, rbp
	mul	qword ptr [r13 + WORKSET]
	mov	r14, rdx
	shr	r14, 6
	imul	r14, [r13 + SPACING]
	and	edx, 63
	add	r14, rdx
	add	r14, [r13 + FIRST]
	address	r14, rsi

	# fold the page into the checksum
	mov	rdi, rsi
	lea	rcx, [rsi + 4096]
1:	mix	[rdi]
	add	rdi, 8
	cmp	rdi, rcx
	jne	1b

	# turn the vector registers over
	mov	edi, r12d
	shl	edi, 6
	and	edi, 0xfc0
	test	dword ptr [r13 + FLAGS], F_AVX2
	jnz	1f
	pxor	xmm15, [rsi + rdi]
	turn_sse 14, 15, 13
	turn_sse 12, 13, 11
	turn_sse 10, 11, 9
	turn_sse 8, 9, 7
	turn_sse 6, 7, 5
	turn_sse 4, 5, 3
	turn_sse 2, 3, 1
	paddq	xmm0, xmm1
	movdqu	[r13 + LANES], xmm0
	jmp	2f
1:	vpxor	ymm15, ymm15, [rsi + rdi]
	turn_avx 14, 15, 13
	turn_avx 12, 13, 11
	turn_avx 10, 11, 9
	turn_avx 8, 9, 7
	turn_avx 6, 7, 5
	turn_avx 4, 5, 3
	turn_avx 2, 3, 1
	vpaddq	ymm0, ymm0, ymm1
	vmovdqu	[r13 + LANES], ymm0
2:	mix	[r13 + LANES]
	mix	[r13 + LANES + 8]
	mix	[r13 + LANES + 16]
	mix	[r13 + LANES + 24]
	add	r9, rbx
	xor	r10, r9
	add	r11, r10
	mix	r11

	# rewrite part of the page
	inc	r12
	mov	rcx, [r13 + STRIDE]
	dec	rcx
	and	rcx, r14
1:	mov	rax, rbx
	rol	rax, cl
	xor	[rsi + rcx*8], rax
	add	rcx, [r13 + STRIDE]
	cmp	rcx, 512
	jb	1b
	dec	r8
	jnz	step

report:
	mov	[r13 + STEP], r12
	mov	[r13 + SUM], rbx
	mov	[r13 + STATE], rbp
	lea	rsi, [r13 + RECORD]
	mov	ecx, 16
	mov	edx, [r13 + OUTPORT]
	rep outsd
poll:	mov	edx, [r13 + INPORT]
	in	eax, dx
	test	al, OFF
	jnz	power_off
	test	al, HOLD
	jnz	hold
	and	eax, ~7
	mix	rax
	lea	rdi, [r13 + ECHO]
	mov	ecx, 4
	mov	edx, [r13 + INSPORT]
	rep insd
	mix	[r13 + ECHO]
	mix	[r13 + ECHO + 8]

	# registers that seldom change: x87 stack and controls, segment bases
	fistp	qword ptr [r13 + X87]
	mix	[r13 + X87]
	mov	[r13 + X87], rbx
	fild	qword ptr [r13 + X87]
	mov	qword ptr [r13 + X87], 0
	fnstcw	[r13 + CONTROL]
	stmxcsr	[r13 + CONTROL + 4]
	mix	[r13 + CONTROL]
	mix	fs:[0]
	mix	gs:[0]
	mov	r8, [r13 + EVERY]
	jmp	step

power_off:
	mov	edx, [r13 + OFFPORT]
	mov	eax, [r13 + OFFVALUE]
	mov	ecx, [r13 + OFFWIDTH]
	cmp	ecx, 1
	je	1f
	cmp	ecx, 2
	je	2f
	out	dx, eax
	jmp	hold
1:	out	dx, al
	jmp	hold
2:	out	dx, ax
hold:	mov	ecx, 20000
1:	pause
	dec	ecx
	jnz	1b
	jmp	poll

# The pattern: a quarter of the pages stay as they are (zero); in the others each
# line of 64 bytes has 20 random bytes and a word that is the page's own.
fill:	xor	r8d, r8d
fill_next:
	cmp	r8, [r13 + PAGES]
	je	load
	mov	r14, [r13 + FIRST]
	add	r14, r8
	inc	r8
	movabs	rax, 0xbf58476d1ce4e5b9
	movabs	rcx, 0x94d049bb133111eb
	mov	rdx, r14
	imul	rdx, r15
	add	rdx, [r13 + FILLSEED]
	mov	rdi, rdx
	shr	rdi, 30
	xor	rdx, rdi
	imul	rdx, rax
	mov	rdi, rdx
	shr	rdi, 27
	xor	rdx, rdi
	imul	rdx, rcx
	mov	rdi, rdx
	shr	rdi, 31
	xor	rdx, rdi
	test	dl, 3
	jz	fill_next
	address	r14, rsi
	lea	rdi, [rsi + 4096]
	mov	rcx, rdx
2:	random	rcx
	mov	[rsi], rcx
	random	rcx
	mov	[rsi + 8], rcx
	random	rcx
	mov	eax, ecx
	mov	[rsi + 16], rax
	mov	[rsi + 24], rdx
	mov	[rsi + 32], rdx
	mov	[rsi + 40], rdx
	mov	[rsi + 48], rdx
	mov	[rsi + 56], rdx
	add	rsi, 64
	cmp	rsi, rdi
	jne	2b
	jmp	fill_next

	.include "fault.inc"
