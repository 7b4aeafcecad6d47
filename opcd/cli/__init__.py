"""The commands of `opcd`."""

TRAINER = {
    "fit": "train: the student answers without the context, the teacher scores the answers with it",
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
    "report": ("opcd.cli.pages.report", "one page about a run, or several side by side"),
    "experience": ("opcd.cli.experience", "make a context: lessons from attempts, the list that serves best"),
    "show": ("opcd.cli.pages.show", "the results of an experience run, also as a page"),
    "sweep": ("opcd.cli.sweep", "many fits from one file"),
    "record": (
        "opcd.cli.record",
        "responses and the teacher's likeliest tokens on disk, for trainings without the teacher",
    ),
    "export": ("opcd.cli.export", "a trained student as a folder, merged, as a GGUF file, or on the hub"),
    "blend": ("opcd.cli.blend", "a student between its start and its end: score shares of the change, keep one"),
    "completion": ("opcd.cli.completion", "a script for a shell that completes commands and options"),
    "doctor": ("opcd.cli.doctor", "the installed packages, devices and models, and what is missing"),
}
"""The project's own commands -> module and description. The module has `main`, which takes the words after the name,
and `make_parser`."""
WITHOUT_TORCH = ("init", "report", "show", "completion", "doctor")
"""Commands that start without torch, or import it after they have read their options."""
