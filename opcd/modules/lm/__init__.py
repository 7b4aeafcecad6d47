"""Language models: generation, hidden states, adapters."""
