"""What shells are told: options by prefix, values of an option."""

import subprocess
from contextlib import redirect_stdout

import pytest

from opcd.cli import COMMANDS, TRAINER
from opcd.cli.completion import main


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """Completes the last of the words as bash does."""
    script = tmp_path_factory.mktemp("bash") / "opcd.bash"
    with script.open("w") as stream, redirect_stdout(stream):
        assert main(["bash"]) == 0

    def complete(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in ("opcd", *words))
        code = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_opcd; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    return complete


def test_commands_options_and_values_complete_in_bash(bash):
    assert set(bash("")) >= {*COMMANDS, *TRAINER}
    assert bash("ex") == ["experience", "export"]
    assert set(bash("fit", "--model.los")) == {"--model.loss", "--model.loss.help"}
    assert bash("fit", "--trainer.precision", "bf16-m") == ["bf16-mixed"]
    assert bash("predict", "--model.loss", "J") == ["JSD"]
    assert bash("fit", "--model.gradient_checkpointing", "t") == ["true"]
    assert bash("export", "--to", "g") == ["gguf"]
    assert bash("evaluate", "--gre") == ["--greedy"]
    assert "--data.teacher" not in bash("fit", "--data.")


def test_a_target_that_is_no_shell_is_refused_with_the_shells(opcd):
    code, text = opcd("completion", "jsonschema")
    assert code == 2 and "jsonschema" in text and "bash" in text


def test_zsh_is_told_what_the_fields_of_a_class_are_for(opcd):
    code, text = opcd("completion", "zsh")
    assert code == 0 and "Attention implementation of transformers" in text
