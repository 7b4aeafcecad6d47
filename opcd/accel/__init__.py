"""Faster computation on one kind of hardware. The method does not depend on it."""
