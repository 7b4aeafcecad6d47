"""Pages of a run, and of an experience run."""
