"""What a run says of how far it has come."""

import io
import logging
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from opcd.callbacks import step_progress as progress
from opcd.models import ModelConfig, load_model
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.runtime import interruption
from opcd.runtime.interruption import Interrupted
from tests.helpers.rows import write_rows

METRICS = {
    "train/divergence": 0.5,
    "train/tokens_per_s": 40,
    "train/response_tokens": 12,
    "train/finished_fraction": 0.75,
}
SHOWN = "0.5000 nats/token  40 tokens/s  12 tokens a response, 75% ended"


@pytest.fixture
def steps(monkeypatch, capsys):
    """Run a bar over steps that end at these seconds; the lines that it printed."""

    def run(seconds: list[float], total: int, every_n_steps: int = 1) -> list[str]:
        clock = iter(seconds)
        monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        bar = progress.StepProgress(every_n_steps=every_n_steps)
        trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=total, progress_bar_metrics=METRICS)
        bar.on_train_start(trainer, None)
        for step in range(1, len(seconds) + 1):
            trainer.global_step = step
            bar.on_train_batch_end(trainer, None)
        return capsys.readouterr().out.splitlines()

    return run


def test_the_time_to_go_is_known_from_the_second_step_on_and_leaves_the_first_out(steps):
    assert steps(
        [110.0, 120.0, 130.0, 140.0], 10, every_n_steps=2
    ) == [  # the first has taken 110 s, the others take 10
        f"step 1/10  {SHOWN}  ? to go",
        f"step 2/10  {SHOWN}  1:20 to go",
        f"step 4/10  {SHOWN}  1:00 to go",
    ]


@pytest.mark.case("C3")
def test_the_time_to_go_is_the_median_of_the_last_steps(steps):
    ends = [100.0, 160.0, 162.0, 164.0, 166.0, 266.0, 268.0, 270.0]  # a slow second step, and a pause at the sixth
    assert [line.split()[-3] for line in steps(ends, 20)] == [
        "?",
        "18:00",
        "8:47",
        "0:32",
        "0:30",
        "0:28",
        "0:26",
        "0:24",
    ]


@pytest.fixture
def words(tiny, tmp_path, context):
    """Words of a command on a tiny model."""
    rows = write_rows(
        tmp_path / "asked.jsonl", [{"query": f"What is {n} + {n}?", "reference": 2 * n} for n in range(4)]
    )
    shorter = ("--model.eval_sampling.max_new_tokens", 3, "--model.rollout.init_args.sampling.max_new_tokens", 3)
    root = ("--trainer.default_root_dir", tmp_path / "runs", "--data.batch_size", 4, "--data.eval_batch_size", 2)

    def make(command: str) -> list[object]:
        source = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}[command]
        given = ("--model.student.name", tiny, f"--data.{source}", rows, "--data.context", context)
        return [command, *given, *shorter, *root]

    return make


@pytest.mark.case("C2", "C20", "C24")
def test_a_run_says_what_it_does_and_nothing_else(opcd, words, caplog, tiny):
    with caplog.at_level(logging.INFO):
        code, said = opcd(*words("fit"), "--trainer.max_steps", 2)
    assert code == 0
    lines = said.splitlines()
    begun = lines[: next(number for number, line in enumerate(lines) if line.startswith("step 1/2"))]
    assert begun[:2] == [f"loading {tiny}", "sample answers"]  # student and teacher are one model here
    assert "sample answers with the context" in begun and "first pass over the context (once)" in begun
    assert "recovery: answers with the context" in begun and "drift: answers to general prompts" in begun
    assert "first step" in begun and "comparing the shared context with a full pass (once)" in begun
    assert not [line for line in begun if not re.match("loading|sample answers|first|comparing|recovery|drift", line)]
    about_types = [text for text in caplog.messages if re.search("float32|bfloat16|precision|GPU", text)]
    assert len(about_types) <= 1
    chatter = [text for text in caplog.messages if re.search("Seed set|Using |available|stopped:|Converting", text)]
    assert chatter == []
    assert [text for text in caplog.messages if "checkpoint" in text and "--trainer.enable_checkpointing false" in text]


@pytest.mark.case("C2")
@pytest.mark.parametrize(
    ("command", "what"), [("predict", "answers"), ("validate", "held-out queries"), ("test", "test queries")]
)
def test_the_other_commands_count_their_batches(opcd, words, command, what):
    code, said = opcd(*words(command))
    assert code == 0
    assert f"{what}: batch 1/2" in said and f"{what}: batch 2/2" in said


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.case("C2")
def test_on_a_terminal_the_bar_says_how_far_it_is_and_messages_stand_above_it(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Screen", lambda: console)
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
    bar = progress.StepProgress()
    trainer = SimpleNamespace(
        is_global_zero=True, global_step=0, estimated_stepping_batches=10, state=SimpleNamespace(fn="fit")
    )
    bar.setup(trainer, None, "fit")
    bar.on_train_start(trainer, None)
    interruption.doing("sample answers", "3/6")
    logging.getLogger("lightning.pytorch").warning("a message")
    assert handler.stream is not screen  # it goes through the bar, which is drawn anew below it
    bar.on_exception(trainer, None, KeyboardInterrupt())
    assert handler.stream is screen
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "sample answers 3/6" in text
    assert any(line.strip() == "a message" for line in re.split(r"[\r\n]", text))
    interruption.doing("nobody hears this")


def test_a_second_context_of_a_prefix_is_not_a_first_pass(tiny):
    model, said = load_model(ModelConfig(tiny), torch.float32), []

    def show(what: str, how_far: str) -> None:
        said.append((what, how_far))

    interruption.show_activity(show)
    prefix = PrefixCache("always")
    with torch.no_grad():
        for first in (5, 6):
            prefix._entry(model, tuple(range(first, first + 20)))
    interruption.hide_activity(show)
    assert said == [("first pass over the context (once)", "20 tokens")]


@pytest.mark.case("C2")
def test_a_signal_is_noticed_between_two_layers(tiny):
    model = load_model(ModelConfig(tiny), torch.float32)
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    passed = []

    def told(*_: object) -> None:
        passed.append(0)
        interruption.ask(signal.SIGINT)

    layers[0].register_forward_hook(told)
    layers[1].register_forward_hook(lambda *_: passed.append(1))
    ids = torch.arange(8)[None]
    try:
        with pytest.raises(Interrupted):
            model(input_ids=ids)
        assert passed == [0]
        interruption.reset(apart=False)  # others wait for this rank: it leaves with them alone
        model(input_ids=ids)
        assert passed == [0, 0, 1]
    finally:
        interruption.reset()
