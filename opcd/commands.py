"""The commands: what the first word after `opcd` runs."""

TRAINER = {
    "fit": "train: the student answers without the context, the teacher, which sees it, scores the answers",
    "validate": "a student's divergence from its teacher on data.val",
    "test": "the same on data.test",
    "predict": "a student's answers to data.predict, with and without the context",
}
"""Lightning's subcommands."""
COMMANDS = {
    "init": ("opcd.init", "a folder to begin with: a commented recipe, a context, questions"),
    "evaluate": ("opcd.evaluation.command", "ask any model DAPO-Math, IFEval and other tasks, scored with lm-eval"),
    "chat": ("opcd.chat.command", "the same question to a model before and after, and with the context, side by side"),
    "report": ("opcd.report.command", "one page on a run, or on several side by side"),
    "experience": ("opcd.experience.command", "make a context: lessons from attempts, the list that serves best"),
    "show": ("opcd.experience.show", "what an experience run has made, also as a page"),
    "sweep": ("opcd.sweep.command", "many fits from one file"),
    "record": ("opcd.record", "write down what a teacher says, for trainings without a teacher in memory"),
    "export": ("opcd.export.command", "a trained student as a folder, merged, as a GGUF file, or on the hub"),
    "completion": ("opcd.completion", "what a shell or an editor needs to complete options and recipes"),
    "doctor": ("opcd.doctor", "what is installed here, which devices and models there are, what is missing"),
}
"""The project's own: the module and what it does. `main` takes the words after the name, `make_parser` has the
options."""
WITHOUT_TORCH = ("init", "report", "show", "completion", "doctor")
"""Those that begin without torch: they read and write files, or import it when their options are read."""
