"""Common prefixes of rows, computed once."""
