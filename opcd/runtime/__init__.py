"""Basics for all parts of the program: errors, files, locks, signals, output."""
