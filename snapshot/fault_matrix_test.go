package snapshot

import "errors"

var errInjected = errors.New("injected")

func isNotFound(err error) bool { return errors.Is(err, ErrNotFound) }
