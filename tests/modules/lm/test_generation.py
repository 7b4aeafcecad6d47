"""What decides how tokens are drawn: `Sampling`, and nothing that a model's folder says."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from opcd.models import ModelConfig
from opcd.modules import FrozenTeacher, Student, StudentRollout
from opcd.modules.lm import rows_at_a_time
from opcd.modules.lm.generation import DRAWING, OPTIONS, Sampling, generate
from opcd.modules.lm.rows_at_a_time import at_a_time

PAD, ENDS = 2, set(range(0, 49152, 12))
SETTINGS = {
    "max_length": 5,
    "min_length": 200,
    "min_new_tokens": 10,
    "max_time": 1e-9,
    "stop_strings": ["a", "e"],
    "do_sample": True,
    "num_beams": 3,
    "use_cache": False,
    "cache_implementation": "offloaded",
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "top_h": 0.1,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(3, 49152, 2)],
    "suppress_tokens": list(range(3, 49152, 2)),
    "begin_suppress_tokens": list(range(3, 49152, 2)),
    "sequence_bias": [[[7], 1000.0]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": [1, 10.0],
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 20.0, "greenlist_ratio": 0.1},
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "bos_token_id": 7,
    "prompt_lookup_num_tokens": 3,
    "token_healing": True,
    "constraints": ["a"],
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 3,
    "diversity_penalty": 1.0,
    "force_words_ids": [[9]],
    "prefill_chunk_size": 2,
}
"""Values that change what `generate` writes, or make it fail, where a model's generation config has them."""
ENDS_AND_PADS = {"eos_token_id", "pad_token_id"}
"""What a model may say: where its answers end."""
FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_") and name not in ENDS_AND_PADS)


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def write(model):
    """Responses to four prompts, greedy or drawn from one seed."""
    draws = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, 40000, (length,), generator=draws) for length in (5, 9, 3, 7)]

    def written(temperature: float) -> list[list[int]]:
        torch.manual_seed(0)
        return [row.tolist() for row in generate(model, prompts, Sampling(12, temperature), ENDS, PAD)]

    return written


@pytest.fixture(scope="module")
def plain(write):
    """The responses of the model that says nothing."""
    return {temperature: write(temperature) for temperature in (0.0, 1.0)}


@pytest.mark.case("B1", "D1", "D10")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("field", FIELDS)
def test_no_setting_of_a_model_reaches_what_is_written(model, write, plain, monkeypatch, field, temperature):
    theirs = GenerationConfig()
    setattr(theirs, field, SETTINGS.get(field, 3))
    if field == "watermarking_config":
        theirs = GenerationConfig(watermarking_config=SETTINGS[field])
    monkeypatch.setattr(model, "generation_config", theirs)
    assert write(temperature) == plain[temperature]
    assert model.generation_config is theirs


@pytest.mark.case("B1")
def test_the_settings_tried_are_fields(plain):
    assert set(SETTINGS) <= set(FIELDS)
    assert plain[0.0] != plain[1.0]


@pytest.mark.case("B1")
def test_a_function_of_the_folders_own_does_not_write(model, write, plain, monkeypatch):
    """transformers puts `custom_generate/generate.py` of a folder with trusted code on the instance."""
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: pytest.fail("the folder's own function ran"))
    assert write(0.0) == plain[0.0]


PENALTY = {"repetition_penalty": 1.3, "temperature": 0.7, "top_k": 20, "num_beams": 3, "stop_strings": ["a"]}


@pytest.mark.case("B1", "D1", "D10")
def test_a_run_is_the_same_whatever_the_folder_says(opcd, tiny, rows, context, tmp_path):
    """One that transformers would not save (a temperature without do_sample), and one whose config has no cache."""
    says = shutil.copytree(tiny, tmp_path / "says")
    (says / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | PENALTY))
    uncached = shutil.copytree(tiny, tmp_path / "uncached")
    (uncached / "generation_config.json").unlink()
    config = json.loads((uncached / "config.json").read_text())
    (uncached / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    found = []
    for number, student in enumerate((tiny, says, uncached)):
        command = ["fit", "--model.student.name", student, "--data.train", rows, "--data.context", context]
        command += ["--trainer.max_steps", 1, "--trainer.precision", "32-true", "--data.batch_size", 2]
        command += ["--model.rollout.init_args.sampling.max_new_tokens", 6, "--model.eval_sampling.max_new_tokens", 6]
        command += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", tmp_path / str(number)]
        code, printed = opcd(*command)
        assert code == 0, printed
        run = tmp_path / str(number) / "version_0"
        found.append([divergence(run), (run / "samples.jsonl").read_text()])
        assert (run / "student" / "model.safetensors").is_file()
    assert found[0] == found[1] == found[2]


def divergence(run: Path) -> list[str]:
    """The divergence of each step."""
    header, *lines = (run / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("train/divergence")
    return [line.split(",")[column] for line in lines]


@pytest.mark.case("B6")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"num_beams": 3}}, "num_beams is not a sampling option; there are min_p"),
        ({"options": {"stop_strings": ["a"]}}, "stop_strings is not a sampling option"),
        ({"options": {"bad_words_ids": [[10**6]]}}, "bad_words_ids is not a sampling option"),
        ({"options": {"suppress_tokens": [10**6]}}, "suppress_tokens is not a sampling option"),
        ({"options": {"cache_implementation": "offloaded"}}, "cache_implementation is not a sampling option"),
        ({"options": {"compile_config": {}}}, "compile_config is not a sampling option"),
        ({"options": {"top_p": 0.5}}, "top_p is not a sampling option; did you mean"),
        ({"options": {"repetition_penality": 1.1}}, "did you mean repetition_penalty"),
        ({"options": {"min_p": 5}}, "min_p must be a number from 0 to 1, got 5"),
        ({"options": {"min_p": "0.1"}}, "min_p must be a number from 0 to 1, got '0.1'"),
        ({"options": {"min_p": True}}, "min_p must be a number"),
        ({"options": {"min_p": None}}, "min_p must be a number"),
        ({"options": {"min_p": float("nan")}}, "min_p must be a number"),
        ({"options": {"repetition_penalty": 0}}, r"repetition_penalty must be a number from 0\.01 to 100, got 0"),
        ({"options": {"repetition_penalty": float("inf")}}, "repetition_penalty must be"),
        ({"options": {"typical_p": 0}}, "typical_p must be"),
        ({"options": {"eta_cutoff": 1.0}}, "eta_cutoff must be"),
        ({"options": {"no_repeat_ngram_size": 2.5}}, "no_repeat_ngram_size must be a whole number from 1 to 128"),
        ({"options": {"no_repeat_ngram_size": 10**9}}, "no_repeat_ngram_size must be a whole number from 1 to 128"),
        ({"options": {"min_new_tokens": 129}}, "min_new_tokens must be a whole number from 0 to 128, got 129"),
        ({"options": {"min_p": 0.1}, "temperature": 0.0}, "min_p has no effect at temperature 0"),
        ({"temperature": float("inf")}, r"temperature must be 0 .* or between 0\.001 and 1000, got inf"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 1e-30}, "temperature must be 0"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_what_cannot_be_sampled_with_is_refused_when_the_config_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


@pytest.mark.case("B6")
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_reaches_what_is_written(model, name):
    values = {"min_p": 0.9, "typical_p": 0.01, "top_h": 0.01, "epsilon_cutoff": 0.9, "eta_cutoff": 0.9}
    values |= {"repetition_penalty": 100.0, "no_repeat_ngram_size": 1, "min_new_tokens": 20}
    ends = set(range(0, 49152, 3)) if name == "min_new_tokens" else {7}
    temperature = 2.0 if name in DRAWING else 0.0
    found = []
    for options in ({}, {name: values[name]}):
        torch.manual_seed(1)
        sampling = Sampling(20, temperature, options=options)
        found.append(generate(model, [torch.arange(100, 109)], sampling, ends, PAD)[0].tolist())
    assert found[0] != found[1]


@pytest.mark.case("B6")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.rollout.init_args.sampling.options", "{num_beams: 2}"], "num_beams is not a sampling option"),
        (["--model.rollout.init_args.sampling.temperature", ".inf"], "temperature must be 0"),
        (["--model.eval_sampling.options", "{min_p: 5}"], "min_p"),
        (["--model.temperature", ".inf"], "model.temperature must be a finite number"),
        (["--trainer.devices", "-7"], "trainer.devices: -7: there is no such device"),
        (["--trainer.devices", "[0,-1]"], "there is no such device"),
        (["--trainer.num_nodes", "0"], "trainer.num_nodes must be at least 1"),
        (["--seed_everything", "-1"], "seed_everything: -1 is no seed"),
        (["--seed_everything", "4294967296"], "seed_everything: 4294967296 is no seed"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_a_model_is_loaded(opcd, monkeypatch, rows, context, words, message):
    monkeypatch.setattr("opcd.modules.student.load_model", lambda *args: pytest.fail("a model was loaded"))
    code, printed = opcd("fit", "--data.train", rows, "--data.context", context, *words)
    assert code == 2
    assert message in printed


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_few_rows_at_a_time_are_those_of_all_side_by_side(model, most):
    prompts = [torch.arange(3, 3 + length) for length in (4, 9, 2, 6, 5)]
    told = {None: {}, most: {}}

    def written(rows_at_a_time):
        def tell(rows, tokens):
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                told[rows_at_a_time].setdefault(row, []).append(token)

        greedy = Sampling(6, temperature=0.0)
        return generate(model, prompts, greedy, ENDS, PAD, told=tell, rows_at_a_time=rows_at_a_time)

    for number, (part, whole) in enumerate(zip(written(most), written(None), strict=True)):
        assert torch.equal(part, whole)
        assert told[most][number] == told[None][number] == whole.tolist()


def test_no_prompts_are_no_responses(model):
    assert generate(model, [], Sampling(2), ENDS, PAD) == []


def test_parts_are_of_nearly_one_size(model):
    assert [at_a_time(model, 10, 100, most) for most in (1, 3, 8, 10, 100)] == [1, 3, 5, 10, 10]
    assert at_a_time(model, 1000, 100000) == 1000  # a CPU: all


def test_as_many_rows_as_fit_into_a_gpu(model, monkeypatch):
    config = model.config
    gpu = SimpleNamespace(device=torch.device("cuda"), config=config, dtype=torch.bfloat16)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    row = 1000 * (2 * cache + 4 * (config.hidden_size + config.intermediate_size) * 2) + 16 * config.vocab_size
    for free, rows in ((2 * row, 1), (6.2 * row, 3), (0, 1), (1000 * row, 10)):
        monkeypatch.setattr(rows_at_a_time, "free_of_gpu", lambda device, free=free: int(free))
        assert min(10, rows_at_a_time.rows_that_fit(gpu, 1000, int(free))) == rows
        assert at_a_time(gpu, 10, 1000) == -(-10 // -(-10 // rows))


def test_a_rollout_in_parts(tiny, batch):
    student = Student.load(ModelConfig(tiny))
    whole, parts = (StudentRollout(Sampling(4, 0.0), rows_at_a_time=rows) for rows in ("auto", 3))
    written = []
    for rollout in (whole, parts):
        with rollout.active(student):
            written.append(rollout.generate(student, FrozenTeacher(), batch).responses)
    assert len(written[0]) == len(batch) > 3
    assert all(torch.equal(one, other) for one, other in zip(*written, strict=True))
    with pytest.raises(ValueError, match="rows_at_a_time must be auto or at least 1, got 0"):
        StudentRollout(rows_at_a_time=0)
