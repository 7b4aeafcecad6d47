"""`opcd chat`: the same question to a model, to the one that it was, and with the context in the prompt."""
