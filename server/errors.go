package server

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// apiError is an answer that says what went wrong. SDKs read the code from the body.
type apiError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
	// What follows is an addition of ours, for clients that tell errors of one code apart: the state that a sandbox is in, or the limit that is reached.
	State lifecycle.State `json:"state,omitempty"`
	Limit *limitBody      `json:"limit,omitempty"`
}

type limitBody struct {
	What string `json:"what"`
	Most uint64 `json:"most"`
}

func newError(code int, message string) *apiError { return &apiError{Code: code, Message: message} }

func (e *apiError) Error() string { return e.Message }

var (
	errInternal = newError(http.StatusInternalServerError, "the server has failed; its log says more, by the request's id")
	errBusy     = newError(http.StatusServiceUnavailable, "too many requests are under way; try again")
	errNoKey    = newError(http.StatusUnauthorized, "the X-API-KEY header has no valid API key")
)

// tooMany is an error that says when to try again.
type tooMany struct {
	message string
	seconds int
}

func (e *tooMany) Error() string { return e.message }

func badRequest(message string) error { return newError(http.StatusBadRequest, message) }

// statusOf is what an error is in HTTP.
func statusOf(err error) int { return answerOf(err).Code }

// answerOf is what a caller is told of an error. Errors of this host are in the log only: they have paths and the like.
func answerOf(err error) *apiError {
	var (
		known *apiError
		state *lifecycle.StateError
		limit *lifecycle.LimitError
		many  *tooMany
		body  *http.MaxBytesError
	)
	switch {
	case errors.As(err, &known):
		return known
	case errors.As(err, &many):
		return newError(http.StatusTooManyRequests, many.message)
	case errors.As(err, &limit):
		return &apiError{Code: http.StatusTooManyRequests, Message: limit.Error(), Limit: &limitBody{limit.What, limit.Limit}}
	case errors.As(err, &state):
		return &apiError{Code: http.StatusConflict, Message: state.Error(), State: state.State}
	case errors.As(err, &body):
		return newError(http.StatusRequestEntityTooLarge, "the body is too large")
	case errors.Is(err, lifecycle.ErrNotFound):
		return newError(http.StatusNotFound, "not found")
	case errors.Is(err, lifecycle.ErrInvalid):
		return newError(http.StatusBadRequest, err.Error())
	case errors.Is(err, lifecycle.ErrExists):
		return newError(http.StatusConflict, "the name is in use")
	case errors.Is(err, lifecycle.ErrManagerClosed), errors.Is(err, context.DeadlineExceeded):
		return newError(http.StatusServiceUnavailable, "the server is busy or about to end; try again")
	}
	return errInternal
}

func writeError(w http.ResponseWriter, err error) {
	answer := answerOf(err)
	if many := (*tooMany)(nil); errors.As(err, &many) {
		w.Header().Set("Retry-After", strconv.Itoa(many.seconds))
	}
	writeJSON(w, answer.Code, answer)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // who does not read the answer is not told of that
}
