"""What benchmarks/run.py is made of: arms and jobs, results, figures, the page."""
