"""A common beginning of rows, computed once."""
