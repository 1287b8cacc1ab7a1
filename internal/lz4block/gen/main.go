// Gen writes the assembly of package lz4block. It is a module of its own, so
// that the assembler's generator is not a dependency of the package.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// These are the package's.
const (
	minMatch    = 4
	inToken     = 15
	tableBits   = 13
	hashMul     = 0x9e3779b185eb << 16
	stride      = 3
	strideShift = 6
	tail        = 13
)

const (
	// copySize is the least that is copied of literals, and the most by which a
	// copy of them goes beyond their ends.
	copySize = 32
	// slack is what a sequence takes at most besides literals and lengths: the
	// token, the offset, the last byte of either length, the end of a copy.
	slack = 64
)

func main() {
	TEXT("search", NOSPLIT, "func(table *[8192]uint16, dst, src []byte) (used, done, start, end, offset int)")
	Pragma("noescape")
	Doc("search makes the block of src in dst up to the first match that is too close to the",
		"end of either for wide loads and stores, and returns that match. Its end is not final.",
		"If end is 0, all matches are in dst. The table must be clear.")
	newEncoder().generate()
	Generate()
}

// encoder has what lives in registers throughout. Positions are relative to src.
type encoder struct {
	table, src, dst reg.Register
	s, done, limit  reg.Register // limit: the last position where a search can start
	offset, mul     reg.Register
	dstEnd          Mem

	end, next reg.Register // of the match; s+1
}

func newEncoder() *encoder {
	e := &encoder{
		table: Load(Param("table"), GP64()),
		src:   Load(Param("src").Base(), GP64()),
		dst:   Load(Param("dst").Base(), GP64()),
		limit: Load(Param("src").Len(), GP64()),
		s:     GP64(), done: GP64(), offset: GP64(), mul: GP64(), end: GP64(), next: GP64(),
		dstEnd: AllocLocal(8),
	}
	end := Load(Param("dst").Len(), GP64())
	ADDQ(e.dst, end)
	MOVQ(end, e.dstEnd)
	SUBQ(Imm(tail), e.limit)
	XORL(low(e.done, 32), low(e.done, 32))
	MOVQ(U32(1), e.s)
	MOVQ(U32(1), e.offset)
	MOVQ(U64(hashMul), e.mul)
	return e
}

func (e *encoder) generate() {
	CMPQ(e.s, e.limit)
	JGT(LabelRef("none"))
	e.find()
	e.extendBack()
	e.extend()
	e.put()
	e.results()
}

// at is the memory at a position plus displacement.
func (e *encoder) at(position reg.Register, displacement int) Mem {
	return Mem{Base: e.src, Index: position, Scale: 1, Disp: displacement}
}

func low(r reg.Register, bits int) reg.Register {
	switch v := r.(reg.GPVirtual); bits {
	case 8:
		return v.As8()
	case 16:
		return v.As16()
	default:
		return v.As32()
	}
}

// entry returns the place of the table for the 6 bytes in v.
func (e *encoder) entry(v reg.Register) Mem {
	h := GP64()
	MOVQ(v, h)
	IMULQ(e.mul, h)
	SHRQ(Imm(64-tableBits), h)
	return Mem{Base: e.table, Index: h, Scale: 2}
}

// look replaces the entry for v with position and returns the distance to what
// was there.
func (e *encoder) look(v, position reg.Register) reg.Register {
	entry, old, distance := e.entry(v), GP64(), GP64()
	MOVWLZX(entry, low(old, 32))
	MOVW(low(position, 16), entry)
	MOVL(low(position, 32), low(distance, 32))
	SUBL(low(old, 32), low(distance, 32))
	MOVWLZX(low(distance, 16), low(distance, 32))
	return distance
}

// compare jumps to label if the bytes at distance before position are the low 4
// of v.
func (e *encoder) compare(v, position, distance reg.Register, label string) {
	at := GP64()
	MOVQ(position, at)
	SUBQ(distance, at)
	CMPL(e.at(at, 0), low(v, 32))
	JEQ(LabelRef(label))
}

// find finds a match at s with offset, or goes to none.
func (e *encoder) find() {
	Label("search")
	v, v1 := GP64(), GP64()
	MOVQ(e.at(e.s, 0), v)
	MOVQ(v, v1)
	SHRQ(Imm(8), v1)
	LEAQ(Mem{Base: e.s, Disp: 1}, e.next)
	near := e.look(v, e.s)
	far := e.look(v1, e.next)
	e.compare(v1, e.next, e.offset, "again")
	e.compare(v, e.s, near, "near")
	Label("notNear")
	e.compare(v1, e.next, far, "far")
	Label("notFar")
	skip := GP64()
	MOVQ(e.s, skip)
	SUBQ(e.done, skip)
	SHRQ(Imm(strideShift), skip)
	LEAQ(Mem{Base: e.s, Index: skip, Scale: 1, Disp: stride}, e.s)
	CMPQ(e.s, e.limit)
	JLE(LabelRef("search"))
	JMP(LabelRef("none"))

	Comment("A distance of 0 is none.")
	Label("far")
	TESTL(low(far, 32), low(far, 32))
	JEQ(LabelRef("notFar"))
	MOVQ(far, e.offset)
	JMP(LabelRef("again"))

	Label("near")
	TESTL(low(near, 32), low(near, 32))
	JEQ(LabelRef("notNear"))
	MOVQ(near, e.offset)
	JMP(LabelRef("match"))

	Label("again")
	MOVQ(e.next, e.s)
	Label("match")
}

// extendBack notes the end of what is known to match and moves s back.
func (e *encoder) extendBack() {
	Comment("The bytes before, 8 at most.")
	LEAQ(Mem{Base: e.s, Disp: minMatch}, e.end)
	from, differ, same, room := GP64(), GP64(), GP64(), GP64()
	MOVQ(e.s, from)
	SUBQ(e.offset, from)
	CMPQ(from, Imm(8))
	JLT(LabelRef("extend"))
	MOVQ(e.at(e.s, -8), differ)
	MOVQ(U32(8), same)
	XORQ(e.at(from, -8), differ)
	JEQ(LabelRef("back"))
	BSRQ(differ, same)
	SHRQ(Imm(3), same)
	XORQ(Imm(7), same)
	Label("back")
	MOVQ(e.s, room)
	SUBQ(e.done, room)
	CMPQ(same, room)
	CMOVQGT(room, same)
	SUBQ(same, e.s)
}

// extend moves the end of the match.
func (e *encoder) extend() {
	Label("extend")
	Comment("The bytes behind.")
	before, differ := GP64(), GP64()
	MOVQ(e.src, before)
	SUBQ(e.offset, before)
	Label("compare")
	CMPQ(e.end, e.limit)
	JGT(LabelRef("pending"))
	MOVQ(e.at(e.end, 0), differ)
	XORQ(Mem{Base: before, Index: e.end, Scale: 1}, differ)
	JNE(LabelRef("differs"))
	ADDQ(Imm(8), e.end)
	JMP(LabelRef("compare"))
	Label("differs")
	Comment("What is not 0 has the same result from BSF, as which old processors decode it.")
	TZCNTQ(differ, differ)
	SHRQ(Imm(3), differ)
	ADDQ(differ, e.end)
}

// put writes the sequence and goes on behind it.
func (e *encoder) put() {
	literals, length := GP64(), GP64()
	e.checkRoom(literals, length)
	e.putToken(literals, length)

	x0, x1 := XMM(), XMM()
	Label("copy")
	MOVOU(e.at(e.done, 0), x0)
	MOVOU(e.at(e.done, copySize/2), x1)
	MOVOU(x0, Mem{Base: e.dst})
	MOVOU(x1, Mem{Base: e.dst, Disp: copySize / 2})
	CMPQ(literals, Imm(copySize))
	JHI(LabelRef("copyMore"))
	Label("copied")
	ADDQ(literals, e.dst)
	MOVW(low(e.offset, 16), Mem{Base: e.dst})
	ADDQ(Imm(2), e.dst)
	CMPQ(length, Imm(inToken))
	JGE(LabelRef("longMatch"))

	Label("next")
	MOVQ(e.end, e.s)
	MOVQ(e.end, e.done)
	CMPQ(e.s, e.limit)
	JGT(LabelRef("none"))
	v, position := GP64(), GP64()
	MOVQ(e.at(e.s, -2), v)
	LEAQ(Mem{Base: e.s, Disp: -2}, position)
	MOVW(low(position, 16), e.entry(v))
	JMP(LabelRef("search"))

	Label("copyMore")
	from, at := GP64(), GP64()
	LEAQ(e.at(e.done, 0), from)
	MOVQ(U32(copySize), at)
	Label("copyLoop")
	MOVOU(Mem{Base: from, Index: at, Scale: 1}, x0)
	MOVOU(Mem{Base: from, Index: at, Scale: 1, Disp: copySize / 2}, x1)
	MOVOU(x0, Mem{Base: e.dst, Index: at, Scale: 1})
	MOVOU(x1, Mem{Base: e.dst, Index: at, Scale: 1, Disp: copySize / 2})
	ADDQ(Imm(copySize), at)
	CMPQ(at, literals)
	JLT(LabelRef("copyLoop"))
	JMP(LabelRef("copied"))

	e.putLength("longLiterals", literals, "copy")
	e.putLength("longMatch", length, "next")
}

// checkRoom sets both lengths of the sequence, and leaves it if it or a copy of
// its literals comes near an end. Of a length n, n/255+1 is at most n>>7+1.
func (e *encoder) checkRoom(literals, length reg.Register) {
	last, more, room := GP64(), GP64(), GP64()
	LEAQ(Mem{Base: e.s, Disp: copySize - tail}, last)
	CMPQ(last, e.limit)
	JGT(LabelRef("pending"))
	MOVQ(e.s, literals)
	SUBQ(e.done, literals)
	LEAQ(Mem{Base: e.end, Disp: -minMatch}, length)
	SUBQ(e.s, length)
	MOVQ(literals, more)
	SHRQ(Imm(7), more)
	LEAQ(Mem{Base: e.dst, Index: literals, Scale: 1, Disp: slack}, room)
	ADDQ(more, room)
	MOVQ(length, more)
	SHRQ(Imm(7), more)
	ADDQ(more, room)
	CMPQ(room, e.dstEnd)
	JHI(LabelRef("pending"))
}

// putToken writes the token, and the rest of the literals' length.
func (e *encoder) putToken(literals, length reg.Register) {
	token, half := GP64(), GP64()
	MOVQ(U32(inToken), token)
	MOVQ(token, half)
	CMPQ(literals, token)
	CMOVQLT(literals, token)
	CMPQ(length, half)
	CMOVQLT(length, half)
	SHLL(Imm(4), low(token, 32))
	ORL(low(half, 32), low(token, 32))
	MOVB(low(token, 8), Mem{Base: e.dst})
	INCQ(e.dst)
	CMPQ(literals, Imm(inToken))
	JGE(LabelRef("longLiterals"))
}

// putLength is the code at label, which writes what of n is not in the token and
// jumps back.
func (e *encoder) putLength(label string, n reg.Register, back string) {
	rest := GP64()
	Label(label)
	LEAQ(Mem{Base: n, Disp: -inToken}, rest)
	Label(label + "Loop")
	CMPQ(rest, U32(255))
	JLT(LabelRef(label + "Last"))
	MOVB(U8(255), Mem{Base: e.dst})
	INCQ(e.dst)
	SUBQ(U32(255), rest)
	JMP(LabelRef(label + "Loop"))
	Label(label + "Last")
	MOVB(low(rest, 8), Mem{Base: e.dst})
	INCQ(e.dst)
	JMP(LabelRef(back))
}

// results returns.
func (e *encoder) results() {
	Label("none")
	XORL(low(e.end, 32), low(e.end, 32))
	Label("pending")
	base := Load(Param("dst").Base(), GP64())
	SUBQ(base, e.dst)
	Store(e.dst, Return("used"))
	Store(e.done, Return("done"))
	Store(e.s, Return("start"))
	Store(e.end, Return("end"))
	Store(e.offset, Return("offset"))
	RET()
}
