package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// Errors that a Manager in the same process does not have.
var (
	// ErrKey says that the server does not accept the API key.
	ErrKey = errors.New("the server does not accept the API key")
	// ErrRateLimited says that there were too many requests with the API key; Error.RetryAfter says for how long.
	ErrRateLimited = errors.New("too many requests")
)

// Error is an answer that says that something was not done. Behind it is, for errors.Is and errors.As, what a Manager in the same process would
// have said: lifecycle.ErrNotFound, ErrInvalid, ErrExists, a *lifecycle.StateError, a *lifecycle.LimitError; or ErrKey, or ErrRateLimited.
type Error struct {
	Op         string          `json:"-"` // what was to be done
	ID         string          `json:"-"` // to which sandbox; empty: to none
	Code       int             `json:"code"`
	Message    string          `json:"message"`
	State      lifecycle.State `json:"state"` // that the sandbox is in, if that is why
	Limit      *Limit          `json:"limit"` // that is reached, if that is why
	RetryAfter time.Duration   `json:"-"`
}

// Limit is a limit of the server's: how much of what there may be.
type Limit struct {
	What string `json:"what"`
	Most uint64 `json:"most"`
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s: %s (%d)", named(e.Op, e.ID), e.Message, e.Code)
}

func named(op, id string) string {
	if id == "" {
		return op
	}
	return op + " " + id
}

// Unwrap says what the error is in this process.
func (e *Error) Unwrap() error {
	switch {
	case e.Code == http.StatusNotFound:
		return lifecycle.ErrNotFound
	case e.Code == http.StatusBadRequest:
		return lifecycle.ErrInvalid
	case e.Code == http.StatusUnauthorized:
		return ErrKey
	case e.State != "":
		return &lifecycle.StateError{ID: e.ID, Op: e.Op, State: e.State}
	case e.Limit != nil:
		return &lifecycle.LimitError{What: e.Limit.What, Limit: e.Limit.Most}
	case e.Code == http.StatusConflict:
		return lifecycle.ErrExists
	case e.Code == http.StatusTooManyRequests:
		return ErrRateLimited
	}
	return nil
}

// failure is the error of an answer, which may be that of a proxy, or not be JSON.
func failure(op, id string, answer *http.Response, text []byte) error {
	e := &Error{}
	if json.Unmarshal(text, e) != nil || e.Code == 0 {
		e = &Error{Code: answer.StatusCode, Message: "the server answers " + answer.Status}
	}
	e.Op, e.ID = op, id
	if n, err := strconv.Atoi(answer.Header.Get("Retry-After")); err == nil {
		e.RetryAfter = time.Duration(n) * time.Second
	}
	return e
}
