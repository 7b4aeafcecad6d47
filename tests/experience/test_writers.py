"""A real model as the loop's writer."""

import pytest
import torch

from opcd.experience import MathProblems
from opcd.experience.experience_config import Experience, Stage
from opcd.experience.writers import ModelWriters
from opcd.models import ModelConfig
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.runtime.errors import UserError

LIST = "Lessons:\n" + "\n".join(f"- Lesson number {n} says to add carefully." for n in range(9))
QUESTIONS = [[{"role": "user", "content": f"What is {n} + {n}?"}] for n in (1, 23, 456)]


def writers(tiny: str, sampling: Sampling, **settings: object) -> ModelWriters:
    stage = Stage(model=ModelConfig(tiny, dtype="float32"), sampling=sampling)
    config = Experience(problems=MathProblems("a.jsonl", "b.jsonl"), model=stage.model, solve=stage, **settings)
    config.extract.sampling = config.select.sampling = sampling
    return ModelWriters(config, torch.device("cpu"))


def test_a_list_is_encoded_once_and_changes_nothing_but_time(tiny, monkeypatch):
    encoded = []
    entry = PrefixCache._entry

    def counting(self: PrefixCache, model: object, ids: tuple[int, ...]) -> object:
        encoded.extend([] if ids in self._entries else [ids])
        return entry(self, model, ids)

    monkeypatch.setattr(PrefixCache, "_entry", counting)
    writer = writers(tiny, Sampling(max_new_tokens=8, temperature=0)).open("select")
    together = writer.write(QUESTIONS, LIST)
    assert writer.write(QUESTIONS[:1], LIST) == together[:1]  # a batch of one, as the last may be
    assert len(encoded) == 1
    writer._prefix.mode, writer._prefix._agrees = "never", False
    assert writer.write(QUESTIONS, LIST) == together != writer.write(QUESTIONS)
    assert all(len(answer.text) > 0 and answer.tokens <= 8 for answer in together)


def test_the_first_batch_after_a_kill_is_as_it_was(tiny):
    sampling = Sampling(max_new_tokens=8, temperature=1.0)
    first = writers(tiny, sampling).open("select")
    first.write(QUESTIONS, LIST)
    torch.manual_seed(5)
    expected = first.write(QUESTIONS[2:], LIST)
    torch.manual_seed(5)
    assert writers(tiny, sampling).open("select").write(QUESTIONS[2:], LIST) == expected


def test_windows(tiny):
    with pytest.raises(UserError, match=r"solve.sampling.max_new_tokens: 512 leaves no room .*model.name\) has 512"):
        writers(tiny, Sampling(max_new_tokens=512))
    writer = writers(tiny, Sampling(max_new_tokens=480)).open("solve")
    with pytest.raises(UserError, match=r"takes 512 tokens, but a prompt has \d+ and up to 480 are added"):
        writer.write([[{"role": "user", "content": "word " * 40}]])


def test_models_of_stages(tiny):
    made = writers(tiny, Sampling(max_new_tokens=4))
    assert made.open("solve").student is made.open("select").student  # one model in memory
    assert made.config.model_of("extract") == (made.config.model, "model")
    assert made.config.model_of("student") == (ModelConfig(), "student")
    made.close()
    assert made._loaded is None
