"""Questions to a context: what a user would ask, so that a context alone is enough to train on."""
