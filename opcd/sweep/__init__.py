"""Many `opcd` processes from one file: arms, the jobs that run them, and what came of them."""
