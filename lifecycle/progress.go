package lifecycle

// progress joins what a snapshot's writer reports of one part after another.
type progress struct {
	report       func(done, total uint64) // may be nil
	total        uint64                   // of all parts
	before, done uint64                   // of the parts before this one, and of this one
}

// function is the writer's Progress, nil if nobody wants to know.
func (p *progress) function() func(done, total uint64) {
	if p.report == nil {
		return nil
	}
	return func(done, _ uint64) {
		p.done = done
		p.report(p.before+done, p.total)
	}
}

// next says that the next part begins. The writer does nothing meanwhile.
func (p *progress) next() { p.before, p.done = p.before+p.done, 0 }
