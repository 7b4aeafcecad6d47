"""Models that continue conversations, and the files that they need: prompts, a journal, a claimed folder."""
