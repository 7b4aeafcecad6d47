"""Many families of random tiny models against plain transformers: logits, generation, shared prefixes, folders."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from opcd.accel.cpu.attention import use_cpu_attention
from opcd.models import ModelConfig, load_model, load_tokenizer
from opcd.modules.lm.generation import Sampling, generate
from opcd.modules.lm.hidden_states import check_head, head_of, last_hidden
from opcd.modules.student import Student
from opcd.modules.trajectories import Trajectories, Trajectory
from tests.helpers.families import DENSE, FAMILIES, MIXTURES, attention_of, make
from tests.helpers.small_models import Teaches

NOT_SHARED = {"Bloom"}
"""Of those with keys and values alone: whose attention takes no mask or positions of packed rows."""
SHARED = (DENSE.keys() | MIXTURES.keys()) - NOT_SHARED - {"Qwen3Next"}


def ids(*lengths: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator) for length in lengths]


def rows() -> Trajectories:
    """Five rows: three behind one context, two behind another."""
    one, two = ids(29, 21, seed=1)
    prefixes = [one, two, one, two, one]
    queries, responses = ids(5, 9, 3, 7, 4, seed=2), ids(6, 1, 12, 4, 5, seed=3)
    prompts = [torch.cat([prefix, query]) for prefix, query in zip(prefixes, queries, strict=True)]
    views = zip(queries, prompts, prefixes, responses, strict=True)
    return Trajectories([Trajectory(*row) for row in views])


@torch.no_grad()
def plain_logits(model, prompt: Tensor, response: Tensor) -> Tensor:
    """What transformers says about the response's tokens, one row alone."""
    logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
    return logits[len(prompt) - 1 : -1]


def near(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, about single families
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_family_is_as_in_transformers(family, tmp_path) -> None:
    torch.manual_seed(0)
    made = make(family)
    made.save_pretrained(tmp_path / "model")
    config = ModelConfig(str(tmp_path / "model"), dtype="float32", attention=attention_of(made))
    plain = AutoModelForCausalLM.from_pretrained(config.name, attn_implementation=config.attention).eval()
    model = load_model(config)
    use_cpu_attention(model)
    check_head(model, "model")
    expected = expected_logits(plain)
    found = head_of(model)(last_hidden(model, rows().student_prompts, rows().responses))
    near(found, expected["student"])
    check_prefix(family, model, expected["teacher"])
    check_generation(model, plain)
    check_folder(model, plain, tmp_path / "student")


def expected_logits(plain) -> dict[str, Tensor]:
    both = {"student": rows().student_prompts, "teacher": rows().teacher_prompts}
    return {
        view: torch.cat([plain_logits(plain, *row) for row in zip(prompts, rows().responses, strict=True)])
        for view, prompts in both.items()
    }


def check_prefix(family: str, model, expected: Tensor) -> None:
    """Shared where it can be; whole where not, with a reason."""
    teacher = Teaches(model, "auto")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        states = teacher.score(rows(), 4096)
    near(states.head(states.hidden), expected)
    said = [str(w.message) for w in caught if "the shared prefix does not work" in str(w.message)]
    assert (teacher.prefix._agrees, len(said)) == ((True, 0) if family in SHARED else (False, 1)), said


def check_generation(model, plain) -> None:
    """Greedy, prompts of several lengths padded on the left, against one prompt at a time in transformers."""
    prompts = ids(7, 3, 12, 5, seed=4)
    ours = generate(model, prompts, Sampling(8, temperature=0.0), {2}, 0)
    for prompt, response in zip(prompts, ours, strict=True):
        own = prompt
        for _ in range(8):
            own = torch.cat([own, plain(input_ids=own[None]).logits[0, -1].argmax()[None]])
            if own[-1] == 2:
                break
        assert response.tolist() == own[len(prompt) :].tolist()


def check_folder(model, plain, folder: Path) -> None:
    Student(model, load_tokenizer(ModelConfig())).save(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=plain.config._attn_implementation)
    expected, found = plain.state_dict(), again.eval().state_dict()
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert_close(found[name], weight, rtol=0, atol=0)
