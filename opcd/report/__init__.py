"""`opcd report`: one page on a run, or on several side by side."""
