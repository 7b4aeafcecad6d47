"""A Cartridge: the prefix that every pass sees, compared with peft's own model; folders, runs, and what is refused."""

import json

import pytest
import torch
from lightning import Callback
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from benchmarks.tiny import make_tiny
from opcd.accel.cpu.attention import use_cpu_attention
from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig, load_model, load_tokenizer
from opcd.models.key_value_prefix import prefix_of
from opcd.modules import BaseTeacher, Cartridge, Distiller, MovingAverageTeacher, Sampling, StudentRollout
from opcd.modules.lm.adapters import trainable, twin, without_adapter
from opcd.modules.lm.cartridge import add_cartridge, context_start
from opcd.modules.lm.generation import generate
from opcd.modules.lm.hidden_states import last_hidden
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.prefix.student_prefix import StudentPrefix
from opcd.modules.student import Student
from opcd.runtime.errors import UserError
from tests.helpers.small_models import FAMILIES, WITHOUT, ids
from tests.helpers.training import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of transformers, in peft

EXACT = {"rtol": 1e-9, "atol": 1e-10}
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}  # transformers' RMSNorm and eager attention round float64 to float32
TOKENS = 6
SERVER = "{class_path: VLLMServer, init_args: {base_url: http://127.0.0.1:1, name: a, weights: /tmp}}"
SERVED = f"{{class_path: VLLMRollout, init_args: {{engine: {SERVER}}}}}"
GREEDY = Sampling(8, temperature=0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("models") / "tiny", hidden=64))


@pytest.fixture
def data(rows, context):
    return ContextQueryDataModule(train=str(rows), context=str(context), batch_size=4)


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def pair(request, tmp_path):
    """A model in float64 with a prefix that has moved, and peft's model of the folder that it is saved to."""
    torch.manual_seed(0)
    FAMILIES[request.param]().save_pretrained(tmp_path / "base")
    model = load_model(ModelConfig(str(tmp_path / "base"), dtype="float64"))
    use_cpu_attention(model)
    add_cartridge(model, Cartridge(TOKENS), ids(TOKENS)[0])
    stirred(model)
    Student(model, load_tokenizer(ModelConfig())).save(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter", autocast_adapter_dtype=False)
    theirs.prompt_encoder.double()
    theirs.prompt_encoder.default.trainable_embedding.requires_grad_()
    theirs.prompt_encoder.default.load_prompt_embeddings(prefix_of(model).weight)
    return model.eval(), theirs.eval()


def stirred(model):
    generator = torch.Generator().manual_seed(1)
    for weight in trainable(model).values():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def of_peft(theirs, prompts, responses):
    """The logits that predict the responses, one row alone after the other."""
    rows = [
        theirs(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return torch.cat(rows)


def prompts_with_a_start(shared=20):
    start = ids(shared, seed=9)[0]
    return [torch.cat([start, rest]) for rest in ids(3, 7, 5, seed=2)], ids(4, 2, 6, seed=3)


@pytest.mark.parametrize("how", ["rows", "shared start"])
def test_values_and_gradients_are_those_of_peft(pair, how):
    """Rows of different lengths beside each other, whose start is computed once or not."""
    model, theirs = pair
    prompts, responses = prompts_with_a_start()
    run = last_hidden if how == "rows" else StudentPrefix("always").last_hidden
    logits = model.get_output_embeddings()(run(model, prompts, responses))
    expected = of_peft(theirs, prompts, responses)
    assert_close(logits, expected, **(EXACT if how == "rows" else ROUNDED))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    (own,) = trainable(model).values()
    assert_close(own.grad, theirs.prompt_encoder.default.trainable_embedding.grad, **ROUNDED)
    assert own.grad.abs().min(1).values.gt(0).all()


def test_a_shared_start_is_shared(pair, monkeypatch):
    """And not passed in full because a comparison had failed."""
    model, _ = pair
    rows = StudentPrefix("auto")
    rows.last_hidden(model, *prompts_with_a_start())
    assert rows._agrees


def test_greedy_answers_are_those_of_whole_passes_of_peft(pair):
    """Beside others, with padding on the left, and alone."""
    model, theirs = pair
    prompts = ids(3, 9, 5, seed=2)
    together = generate(model, prompts, GREEDY, set(), 0)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = generate(model, [prompt], GREEDY, set(), 0)
        row = prompt
        for _ in range(GREEDY.max_new_tokens):
            row = torch.cat([row, theirs(row[None]).logits[0, -1:].argmax(-1)])
        assert answer.tolist() == alone.tolist() == row[len(prompt) :].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_context_in_the_prompt_is_computed_once(attention, pair):
    """Packed rows behind a cached context, and answers behind contexts of different lengths, as peft's whole passes."""
    model, theirs = pair
    if attention == "eager":
        model.config._attn_implementation = attention
    cache = PrefixCache("auto" if attention == "sdpa" else "always")
    contexts = [one for one in ids(24, 18, seed=5) for _ in range(2)]
    rows = [
        (torch.cat([context, rest]), response)
        for context, rest, response in zip(contexts, ids(3, 7, 5, 4, seed=2), ids(4, 2, 6, 3, seed=3), strict=True)
    ]
    with torch.no_grad():
        found = cache.score(model, contexts, rows, 4096)
        assert sorted(found) == [0, 1, 2, 3]
        expected = of_peft(theirs, *zip(*rows, strict=True))
        head = model.get_output_embeddings()
        assert_close(head(torch.cat([found[n] for n in range(4)])), expected, **ROUNDED)
        prompts = [prompt for prompt, _ in rows]
        prefixes = cache.encoded(model, contexts, prompts)
        assert prefixes is not None
        behind, whole = (generate(model, prompts, GREEDY, set(), 0, given) for given in (prefixes, None))
    assert [answer.tolist() for answer in behind] == [answer.tolist() for answer in whole]


def test_it_begins_as_the_context_in_the_cache():
    """Behind the prefix, a token's state is that behind the context itself; the first token is not trained."""
    torch.manual_seed(0)
    model = FAMILIES["llama"]().double().eval()
    start, rest = ids(TOKENS, 5)
    full = model(torch.cat([start, rest])[None]).logits[0, TOKENS:]
    add_cartridge(model, Cartridge(TOKENS), start)
    assert_close(model(rest[None]).logits[0], full, **EXACT)
    (learnt,) = trainable(model).values()
    assert len(learnt) == TOKENS - 1 and learnt.dtype == torch.float64
    model.base_model.cartridge.frozen_embedding.data.zero_()
    assert (model(rest[None]).logits[0] - full).abs().max() > 1e-3  # it is seen


def test_low_precision_weights_train_a_prefix_in_float32(tiny):
    model = load_model(ModelConfig(tiny, dtype="bfloat16"))
    add_cartridge(model, Cartridge(TOKENS), torch.arange(5, 5 + TOKENS))
    assert {weight.dtype for weight in trainable(model).values()} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_the_base_is_the_same_memory_without_the_prefix(tiny):
    plain = load_model(ModelConfig(tiny, dtype="float32"))
    row = torch.arange(5, 12)[None]
    before = plain(row).logits
    model = load_model(ModelConfig(tiny, dtype="float32"))
    add_cartridge(model, Cartridge(TOKENS), torch.arange(5, 5 + TOKENS))
    stirred(model)
    base, other = without_adapter(model), twin(model)
    assert_close(base(row).logits, before, rtol=0, atol=0)
    assert {p.data_ptr() for p in base.parameters()} == {p.data_ptr() for p in model.parameters()} - {
        *(p.data_ptr() for p in prefix_of(model).parameters())
    }
    live = model(row).logits
    assert (live - before).abs().max() > 0.1
    stirred(model)
    assert_close(other(row).logits, live, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mistral, sliding window", "gemma3, both kinds of layer", *WITHOUT])
def test_a_model_with_other_layers_is_refused(family):
    torch.manual_seed(0)
    model = {**FAMILIES, **WITHOUT}[family]()
    with pytest.raises(UserError, match="needs full attention"):
        add_cartridge(model.eval(), Cartridge(TOKENS), ids(TOKENS)[0])


def written(tmp_path, rows, context, tiny, *words):
    """The words of a run of two steps."""
    return (
        *("fit", "--model.student.name", tiny, "--data.train", rows, "--data.context", context),
        *("--model.adapter", "Cartridge", "--model.adapter.num_virtual_tokens", TOKENS),
        *("--model.teacher", "BaseTeacher", "--data.batch_size", 4, "--model.eval_sampling.max_new_tokens", 4),
        *("--model.rollout", "{class_path: StudentRollout, init_args: {sampling: {max_new_tokens: 4}}}"),
        *("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 0.02),
        *("--trainer.max_steps", 2, "--trainer.default_root_dir", tmp_path, *words),
    )


def test_a_run_writes_an_adapter_that_every_command_takes(tiny, rows, context, tmp_path, opcd):
    code, output = opcd(*written(tmp_path, rows, context, tiny))
    assert code == 0, output
    run = tmp_path / "version_0"
    student = load_model(ModelConfig(str(run / "student"), dtype="float32"))
    assert prefix_of(student).config.num_virtual_tokens == TOKENS and not trainable(student)
    assert {file.name for file in (run / "student").glob("*.safetensors")} == {"adapter_model.safetensors"}
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, run / "student").eval()
    row = torch.arange(5, 15)[None]
    assert_close(student(row).logits, theirs(row).logits, rtol=1e-4, atol=1e-4)
    measured = [json.loads(line) for line in (run / "recovery.jsonl").read_text().splitlines()]
    assert measured[0]["drift"] > 0 and measured[0]["effect"] == measured[-1]["effect"]  # both of the base
    assert measured[0]["left"] < measured[0]["effect"]  # it begins as the context
    for words in (
        ("predict", "--model.student.name", run / "student", "--data.predict", rows, "--data.context", context),
        ("validate", "--config", run / "config.yaml", "--ckpt_path", "last", "--data.val", rows),
        ("export", run, "--to", "hf", "--out", tmp_path / "copy"),
        ("evaluate", run / "student", "--tasks", "contains", "--data.contains", rows, "--out", tmp_path / "evaluated"),
    ):
        if words[0] in ("predict", "validate"):
            words += ("--model.eval_sampling.max_new_tokens", 2, "--trainer.default_root_dir", tmp_path)
        if words[0] == "evaluate":
            words += ("--max_new_tokens", 2)
        code, output = opcd(*words)
        assert code == 0, (words, output)
    for target in ("merged", "gguf"):
        code, output = opcd("export", run, "--to", target, "--out", tmp_path / f"no.{target}")
        assert code == 2 and "cannot be merged" in output, output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.adapter.num_virtual_tokens", 1], "at least 2"),
        (["--model.adapter.num_virtual_tokens", "x"], "num_virtual_tokens: Expected a <class 'int'>"),
        (["--model.adapter.num_virtual_tokens", 400], "more than the context has: the teacher's prompts begin with"),
        (["--model.gradient_checkpointing", "true"], "model.gradient_checkpointing"),
        (["--model.student.attention", "flash_attention_2"], "model.student.attention"),
        (["--model.rollout", SERVED], "takes weights"),
        (["--trainer.callbacks+", "{class_path: ExportStudent, init_args: {merge: true}}"], "cannot be merged"),
    ],
)
def test_what_a_cartridge_cannot_is_refused(words, says, tiny, rows, context, tmp_path, opcd):
    code, output = opcd(*written(tmp_path, rows, context, tiny, *words))
    assert code == 2 and says in " ".join(output.split()), output


def test_several_contexts_are_refused(tiny, rows, tmp_path, opcd):
    several = tmp_path / "contexts.json"
    several.write_text(json.dumps(["One context.", "And another one."]))
    code, output = opcd(*written(tmp_path, rows, several, tiny))
    assert code == 2 and "holds one context, and the data has 2" in " ".join(output.split()), output


def distiller(tiny, teacher=None, tokens=TOKENS, **options):
    return Distiller(
        ModelConfig(tiny, **options),
        teacher or BaseTeacher(),
        rollout=StudentRollout(Sampling(1)),
        adapter=Cartridge(tokens),
        optimizer=lambda params: torch.optim.Adam(params, lr=0.3),
    )


class Curve(Callback):
    """The divergence of each step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *args):
        self.values.append(float(trainer.callback_metrics["train/divergence"]))


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_its_divergence_falls(quantization, tiny, data, tmp_path):
    torch.manual_seed(0)
    module, curve = distiller(tiny, tokens=20, quantization=quantization), Curve()
    trainer(tmp_path, 15, callbacks=[curve]).fit(module, datamodule=data)
    assert max(curve.values[-3:]) < 0.5 * curve.values[0], curve.values
    base = load_model(ModelConfig(tiny, quantization=quantization), module.teacher.model.dtype)
    row = torch.arange(5, 12)[None]
    scale = 0.03 if quantization == "4bit" else 1e-5
    with torch.no_grad():
        taught, plain = module.teacher.model.eval()(row).logits, base(row).logits
    assert (taught - plain).abs().max() <= scale * plain.abs().max()


def test_a_moving_average_is_of_the_prefix_alone(tiny, data, tmp_path):
    torch.manual_seed(0)
    module = distiller(tiny, MovingAverageTeacher(0.5), dtype="float32")
    trainer(tmp_path, 1).fit(module, datamodule=data)
    (learnt,), (average,) = (trainable(model).values() for model in (module.student.model, module.teacher.model))
    start = load_model(ModelConfig(tiny, dtype="float32"))
    add_cartridge(start, Cartridge(TOKENS), context_start(data, Cartridge(TOKENS)))
    (first,) = trainable(start).values()
    assert_close(average, (first + learnt) / 2, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_holds_the_prefix_and_goes_on_bit_for_bit(tiny, rows, context, tmp_path, opcd):
    options = ("--model.student.dtype", "float32", "--trainer.precision", "32-true")
    code, output = opcd(*written(tmp_path / "whole", rows, context, tiny, *options))
    assert code == 0, output
    code, output = opcd(*written(tmp_path / "part", rows, context, tiny, *options, "--trainer.max_steps", 1))
    assert code == 0, output
    code, output = opcd(*written(tmp_path / "part", rows, context, tiny, *options, "--ckpt_path", "last"))
    assert code == 0, output
    whole, part = (
        load_model(ModelConfig(str(tmp_path / run / "student"))) for run in ("whole/version_0", "part/version_1")
    )
    assert torch.equal(prefix_of(whole).weight, prefix_of(part).weight)
    (file,) = (tmp_path / "part/version_0/checkpoints").glob("*.ckpt")
    state = torch.load(file, weights_only=False)["state_dict"]
    names = {f"student.model.model.cartridge.{name}_embedding" for name in ("frozen", "trainable")}
    assert {name for name in state if name.startswith("student.")} == names
