"""What the commands that let a model write share: prompts as files, a journal, a claimed folder, progress."""
