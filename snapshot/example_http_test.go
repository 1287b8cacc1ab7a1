package snapshot_test

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/snapshot"
)

// web is the Blobs of a web server that serves a store's directory, or of an object store.
type web struct {
	client *http.Client // with a time limit
	url    string
}

func (w web) Open(name string) (snapshot.Blob, error) {
	resp, err := w.client.Head(w.url + "/" + name)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
		return &webFile{w, name, resp.ContentLength}, nil
	case http.StatusNotFound:
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	default:
		return nil, fmt.Errorf("%s: %s", name, resp.Status)
	}
}

type webFile struct {
	web
	name string
	size int64
}

func (f *webFile) Size() int64  { return f.size }
func (f *webFile) Close() error { return nil }

func (f *webFile) ReadAt(p []byte, off int64) (int, error) {
	req, err := http.NewRequest(http.MethodGet, f.url+"/"+f.name, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1))
	resp, err := f.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		return 0, fmt.Errorf("%s: %s", f.name, resp.Status)
	}
	return io.ReadFull(resp.Body, p)
}

// Read a snapshot that lies on a web server.
func ExampleOpenFrom() {
	store, key, cleanup := tempStore()
	defer cleanup()
	mem := make([]byte, 1<<20)
	copy(mem[64<<10:], "hello")
	opts := snapshot.Options{Recipients: []age.Recipient{key.Recipient()}}
	info, err := save(store, opts, mem, snapshot.Range{GPA: 0, Len: 1 << 20})
	if err != nil {
		log.Fatal(err)
	}
	server := httptest.NewServer(http.FileServer(http.Dir(store.Dir())))
	defer server.Close()

	ctx := context.Background()
	far := web{&http.Client{Timeout: 10 * time.Second}, server.URL}
	defer far.client.CloseIdleConnections()
	r, err := snapshot.OpenFrom(ctx, far, info.ID, snapshot.OpenOptions{}, key)
	if err != nil {
		log.Fatal(err)
	}
	defer r.Close()
	_, _, chunk := r.Lookup(64 << 10)
	err = r.FetchBatch(ctx, []int64{chunk}, func(gpa uint64, pages []byte) error {
		fmt.Printf("%#x: %s\n", gpa, pages[:5])
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output: 0x10000: hello
}
