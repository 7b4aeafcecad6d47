"""What surrounds the algorithm in a step: metrics, memory, ranks, failures."""
