package main

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
)

const (
	updateRows = 3    // that a step updates
	insertRows = 6    // that a step inserts
	removeRows = 8    // that a step deletes when there are too many
	maxRows    = 48   // at which a step deletes some
	owners     = 13   // values of the indexed column
	maxBody    = 6000 // bytes, more than a page of the database
)

// row is a row of the table. Its body follows from its id and from the step that wrote it last.
type row struct {
	id, owner, step uint64
}

// body is what the row holds besides.
func (r row) body() []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], r.id)
	binary.LittleEndian.PutUint64(seed[8:], r.step)
	b := make([]byte, (r.id*7919+r.step*104729)%maxBody)
	_, _ = rand.NewChaCha8(seed).Read(b) // it never fails
	return b
}

// change is what a step does to the table, in this order.
type change struct {
	update, remove, insert []row
}

// model is the content that a database must have after some steps.
type model struct {
	steps uint64
	rows  []row // by id
}

// replay is the model after some steps.
func replay(steps uint64) model {
	var m model
	for m.steps < steps {
		m.next()
	}
	return m
}

// next takes the next step, and returns what it changes.
func (m *model) next() change {
	var c change
	n := m.steps
	for i := range uint64(updateRows) {
		if len(m.rows) > 0 {
			r := &m.rows[(n*31+i*17)%uint64(len(m.rows))]
			r.step, r.owner = n, (r.owner+n)%owners
			c.update = append(c.update, *r)
		}
	}
	if len(m.rows) > maxRows {
		for i := range uint64(removeRows) {
			at := int((n*13 + i*29) % uint64(len(m.rows)))
			c.remove = append(c.remove, m.rows[at])
			m.rows = slices.Delete(m.rows, at, at+1)
		}
	}
	for i := range uint64(insertRows) {
		id := n*insertRows + i
		c.insert = append(c.insert, row{id: id, owner: id * 7 % owners, step: n})
	}
	m.rows = append(m.rows, c.insert...)
	m.steps++
	return c
}

// group is what the rows of one owner come to.
type group struct {
	count, steps uint64
}

// groups are the rows by their owners.
func (m *model) groups() map[uint64]group {
	all := map[uint64]group{}
	for _, r := range m.rows {
		g := all[r.owner]
		all[r.owner] = group{g.count + 1, g.steps + r.step}
	}
	return all
}
