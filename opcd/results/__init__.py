"""What a run has left, read from its folder, and how it is shown: tables, plots, pages."""
