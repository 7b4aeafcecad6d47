"""A model that solves and writes by rule, and a process that ends itself with kill -9 where it is told to.

    python -m tests.helpers.scripted [--kill STAGE:CALL] -- WORDS OF opcd experience

Each call of the model is a line of the file that SCRIPTED_CALLS names.
"""

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from opcd.cli.experience import main
from opcd.data.example import Message
from opcd.experience import Writer, Written
from opcd.experience import loop as loop_module

EVEN = "An even number doubled: halve it first, then take four of the halves together."
ODD = "An odd number needs care with the last digit."
ANSWERS = {  # what the extractor writes about the attempt at "What is n + n?"
    1: f"I see.\nLESSON: {ODD}",
    2: f"- **Lesson:** {EVEN}",
    3: "There is nothing to learn here.",
    4: f"1. LESSON: {EVEN.upper()}\nLESSON:  \nLESSON: Read the question twice.",
    5: f"<think>\nLESSON: A thought is no lesson.\n</think>\nLESSON: {ODD.replace('needs care', 'needs much care')}",
    6: "LESSON: Never guess.",
}


class ScriptedWriter(Writer):
    """With the lesson about even (odd) numbers in its prompt it doubles even (odd) numbers right; else it says 0."""

    def __init__(self, stage: str, kill: str | None) -> None:
        self.stage, self.kill = stage, kill

    def write(self, conversations: Sequence[list[Message]], context: str | None = None) -> list[Written]:
        calls = Path(os.environ["SCRIPTED_CALLS"])
        with calls.open("a") as stream:
            stream.write(f"{self.stage}\n")
        mine = calls.read_text().splitlines().count(self.stage)
        if self.kill == f"{self.stage}:{mine}":
            os.kill(os.getpid(), signal.SIGKILL)
        texts = [self._text(messages[-1]["content"], context or "") for messages in conversations]
        return [Written(text, len(text.split()), False) for text in texts]

    def _text(self, prompt: str, context: str) -> str:
        number = int(re.search(r"What is (\d+)", prompt)[1])
        if self.stage == "extract":
            assert f"Answer: {2 * number}" not in prompt
            return ANSWERS[number]
        knows = "AN EVEN" if number % 2 == 0 else "AN ODD"
        return f"Answer: {2 * number if knows in context.upper() else 0}"


class ScriptedWriters:
    """The same model in every stage."""

    kill: str | None = None

    def __init__(self, *_: object) -> None:
        pass

    def open(self, stage: str) -> Writer:
        return ScriptedWriter(stage, self.kill)

    def close(self) -> None:
        pass


def kill_at_file(name: str) -> None:
    """End the process in the middle of writing a file of the loop's."""

    for function in ("write_records", "write_atomic"):
        whole = getattr(loop_module, function)
        setattr(loop_module, function, lambda path, *rest, whole=whole: _or_die(path, name, whole, *rest))


def _or_die(path: Path, name: str, whole, *rest: object) -> None:
    if path.name == name:
        path.with_name(f".{name}-being-written").write_text("half of ")
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, *rest)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "--kill":
        if ":" in words[1]:
            ScriptedWriters.kill = words[1]
        else:
            kill_at_file(words[1])
        words = words[2:]
    sys.exit(main(words[1:], ScriptedWriters))
