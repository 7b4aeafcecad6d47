"""What every part of a program needs: errors, files, locks, signals, output."""
