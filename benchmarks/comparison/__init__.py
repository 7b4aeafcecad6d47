"""The parts of benchmarks/run.py: arms and jobs, results, figures, the page."""
