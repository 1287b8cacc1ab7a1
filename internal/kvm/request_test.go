//go:build linux && amd64

package kvm

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strings"
	"testing"
)

// TestRequests looks for requests that Requests lacks: a filter of system calls would refuse them.
func TestRequests(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "request.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	declared, listed := make(map[string]bool), make(map[string]bool)
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			for _, name := range n.Names {
				declared[name.Name] = true
			}
		case *ast.FuncDecl:
			ast.Inspect(n, func(n ast.Node) bool {
				if id, ok := n.(*ast.Ident); ok {
					listed[id.Name] = true
				}
				return true
			})
		}
		return true
	})
	for name := range declared {
		if strings.HasPrefix(name, "req") && !listed[name] {
			t.Errorf("%s is not among the requests", name)
		}
	}
	if len(Requests()) == 0 || Requests()[0] != reqRun {
		t.Error("KVM_RUN is not the first")
	}
}
