"""What makes a step on a CPU faster or smaller. Nothing here runs on a GPU."""
