"""What surrounds the method in a step: metrics, memory, ranks, non-finite values, checks."""
