"""Weights that are sharded over ranks (FSDP2)."""
