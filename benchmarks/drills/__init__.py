"""Drills: what kills runs, done to runs on purpose (docs/checkpoints.md)."""
