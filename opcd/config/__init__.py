"""Options and recipes: reading and checks, before torch is imported if possible."""
