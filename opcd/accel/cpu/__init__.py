"""Optimizations of a step on a CPU, in time and memory. Nothing here runs on a GPU."""
