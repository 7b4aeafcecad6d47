"""The results of a run: reading its folder, and tables, plots and pages."""
