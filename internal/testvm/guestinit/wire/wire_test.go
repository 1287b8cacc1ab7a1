package wire

import (
	"strings"
	"testing"
)

func TestLine(t *testing.T) {
	line := strings.TrimSuffix(Line("done echo a b"), "\n")
	if text, ok := Parse(line); !ok || text != "done echo a b" {
		t.Errorf("Parse(%q) = %q, %t", line, text, ok)
	}
	if text, ok := Parse(line + "\r"); !ok || text != "done echo a b" {
		t.Errorf("with a carriage return: %q, %t", text, ok)
	}
	for _, bad := range []string{"", "#", "[    1.2] kernel", line[1:], line + "x", line[:len(line)-1], strings.Replace(line, "a", "c", 1)} {
		if text, ok := Parse(bad); ok {
			t.Errorf("Parse(%q) = %q", bad, text)
		}
	}
}

func TestLogs(t *testing.T) {
	a, b := Log{Name: "a"}, Log{Name: "b"}
	logs := Logs{}
	for i := range 5 {
		for _, l := range []*Log{&a, &b} {
			name, e, ok, err := logs.Check(l.Next(int64(i), "x=1 y=2"))
			if name != l.Name || e != (Entry{int64(i), "x=1 y=2"}) || !ok || err != nil {
				t.Fatalf("line %d: %s %+v, %t, %v", i, name, e, ok, err)
			}
		}
	}
	if _, _, ok, err := logs.Check("done stop"); ok || err != nil {
		t.Errorf("another line: %t, %v", ok, err)
	}
}

func TestLogsSeeDamage(t *testing.T) {
	var l Log
	l.Name = "a"
	lines := []string{l.Next(1, "one"), l.Next(2, "two"), l.Next(3, "three")}
	for name, seen := range map[string][]string{
		"gap":     {lines[0], lines[2]},
		"repeat":  {lines[0], lines[0]},
		"change":  {lines[0], strings.Replace(lines[1], "two", "too", 1)},
		"history": {strings.Replace(lines[0], "one", "eno", 1)},
		"garbage": {"log a b c"},
	} {
		logs := Logs{}
		var err error
		for _, line := range seen {
			if _, _, _, e := logs.Check(line); e != nil {
				err = e
			}
		}
		if err == nil {
			t.Errorf("%s is not seen", name)
		}
	}
}
