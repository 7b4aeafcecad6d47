"""Teachers: a model, several, a record, a server."""
