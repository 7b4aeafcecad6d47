"""The splits that a stage of the Trainer reads."""

STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
"""The first of them is required."""


def not_set(stage: str) -> str:
    """What is wrong where a stage's first split is not set."""
    name = str.__str__(stage)  # Lightning's enumeration prints another one
    return (
        f"data.{STAGES[stage][0]} is not set; `{name}` needs it: name a file or a hub data set (`opcd init FOLDER` "
        "makes a recipe to begin with)"
    )
