"""The commands: what the first word after `opcd` runs."""

TRAINER = {
    "fit": "train: the student answers without the context, the teacher, which sees it, scores the answers",
    "validate": "a student's divergence from its teacher on data.val",
    "test": "the same on data.test",
    "predict": "a student's answers to data.predict, with and without the context",
}
"""Lightning's subcommands."""
COMMANDS = {
    "init": ("opcd.cli.init", "a folder to begin with: a commented recipe, a context, questions"),
    "queries": ("opcd.cli.queries", "questions to a context, where there is a context and nothing else"),
    "evaluate": ("opcd.cli.evaluate", "ask any model rows of your own, IFEval, or any task of lm-eval"),
    "chat": ("opcd.cli.chat", "the same question to a model before and after, and with the context, side by side"),
    "report": ("opcd.cli.report", "one page on a run, or on several side by side"),
    "experience": ("opcd.cli.experience", "make a context: lessons from attempts, the list that serves best"),
    "show": ("opcd.cli.show", "what an experience run has made, also as a page"),
    "sweep": ("opcd.cli.sweep", "many fits from one file"),
    "record": ("opcd.cli.record", "write down what a teacher says, for trainings without a teacher in memory"),
    "export": ("opcd.cli.export", "a trained student as a folder, merged, as a GGUF file, or on the hub"),
    "completion": ("opcd.cli.completion", "what a shell needs to complete commands and options"),
    "doctor": ("opcd.cli.doctor", "what is installed here, which devices and models there are, what is missing"),
}
"""The project's own: the module and what it does. `main` takes the words after the name, `make_parser` has the
options."""
WITHOUT_TORCH = ("init", "report", "show", "completion", "doctor")
"""Those that begin without torch: they read and write files, or import it when their options are read."""
