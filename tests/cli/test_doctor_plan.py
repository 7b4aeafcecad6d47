"""The memory of a run on paper: by hand, and beside what torch really keeps."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from opcd.accel.cpu.onednn_linear import FEWEST_STEPS
from opcd.cli.fit import fit_parser
from opcd.cli.plan import size
from opcd.models import ModelConfig, load_model
from opcd.modules import (
    Distiller,
    FrozenTeacher,
    Lora,
    MixedRollout,
    MovingAverageTeacher,
    RecordedRollout,
    RoutedTeachers,
    SelfTeacher,
    ServedTeacher,
    StudentRollout,
    TeacherRollout,
    distiller,
)
from opcd.modules.lm.adapters import add_lora
from opcd.planning import Setting, Shape, Weights, parts, peak, shape_of
from opcd.planning.activations import kept_of_pass
from opcd.planning.levers import until_it_fits, ways
from opcd.planning.reading import _kept, _optimizer, _unpacked
from opcd.planning.roles import teacher_of, writers_of
from opcd.planning.setting import UNPACKED, adapter_weights
from opcd.planning.sizes import casts
from opcd.runtime.errors import UserError

LAYER = (("q", 8, 8), ("k", 8, 4), ("v", 8, 4), ("o", 8, 8), ("gate", 8, 16), ("up", 8, 16), ("down", 16, 8))
# Two layers of 64 + 32 + 32 + 64 + 3 x 128 = 576, an embedding of 32 x 8 that is the head too, five norms of 8.
SMALL = Shape(
    hidden=8,
    intermediate=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocabulary=32,
    weights=1448,
    linears=LAYER * 2,
    norms=2,
    head_norms=False,
    dtype=torch.bfloat16,
)
STUDENT, TEACHER = Weights(SMALL, torch.float32), Weights(SMALL, torch.bfloat16)
# Rows of 6 + 4 tokens, two of them in a micro-batch of 20 tokens, so two passes.
RUN = Setting(
    STUDENT,
    TEACHER,
    teacher_bytes=2896,
    batch=4,
    query=6,
    context=10,
    response=4,
    answers=0,
    micro_batch_tokens=20,
    gpu=True,
)
CASES = ("float32", "bfloat16", "checkpointing", "adapter", "few targets")
PARSER = cache(fit_parser)
"""One for all: it takes a second to build."""


def sizes(setting: Setting) -> dict[str, dict[str, int]]:
    """Bytes of each part in each phase that it lives in."""
    return {part.name: {phase: n for phase, n in part.phases.items() if n} for part in parts(setting)}


def total(setting: Setting, phase: str) -> int:
    """Bytes of a phase."""
    return sum(of.get(phase, 0) for of in sizes(setting).values())


def test_the_parts_of_a_run_by_hand():
    found = sizes(RUN)
    assert set(found["student's weights"].values()) == {1448 * 4}
    assert set(found["optimizer's states"].values()) == {1448 * 8}
    assert "samples" not in found["optimizer's states"]
    assert set(found["teacher's weights"].values()) == {1448 * 2}
    assert found["casts of weights"]["backward"] == 1152 * 2
    # Two layers, one group of 4: 2 x 4 numbers of 2 bytes each for keys and for values of a token of the teacher.
    assert found["contexts' keys and values"]["rollout"] == 10 * 32
    assert found["keys and values"] == {"rollout": 4 * 10 * 32, "teacher": (10 + 20) * 32}
    # Norms 2 x (8 x 8 + 4), queries to result 2 x 2 x 12 + 8, MLP 3 x 2 x 16, inputs 5 x 2 x 8 + 2 x 16: 400 a layer.
    assert found["activations"] == {"student": 20 * (2 * 400 + 64), "backward": 20 * (2 * 400 + 64)}
    # Eight tokens of 32 probabilities, 12 bytes each and 4 for bfloat16 logits; two bfloat16 matrices of the head.
    assert found["loss chunk"] == {"student": 8 * 32 * 16 + 2 * 256 * 2}
    # The head's are made by the loss, and those of the first micro-batch are there.
    assert found["gradients"] == {"student": 1024 + 5792, "backward": 1024 + 5792, "optimizer": 5792}
    assert found["copy that generates"] == {"rollout": 1448 * 2}
    assert found["drawing a token"] == {"rollout": 4 * 32 * 18}
    assert found["teacher's states"] == {"teacher": 8 * 8 * 2, "student": 8 * 8 * 2}
    assert found["one layer's pass"]["student"] == 20 * (3 * 4 * 8 + 3 * 2 * 16)
    student = 5792 + 11584 + 2896 + 320 + 2304 + 17280 + 5120 + 6816 + 128 + 3840
    assert peak(parts(RUN)) == ("student", student)


def test_states_that_a_step_unpacks_by_hand():
    run = replace(RUN, gpu=False, state_bytes=2.0, unpacked=20.0)
    assert sizes(run)["optimizer's scratch"] == {"optimizer": 32 * 8 * 20}  # the embedding's
    assert "optimizer's scratch" not in sizes(replace(run, lora=Lora(rank=2)))


def test_one_pass_has_no_gradients_when_it_begins():
    found = sizes(replace(RUN, micro_batch_tokens=40))  # 40 x 864 bytes of activations go as 5,792 - 1,024 come
    assert found["gradients"] == {"student": 1024, "backward": 1024, "optimizer": 5792}
    found = sizes(replace(RUN, micro_batch_tokens=40, checkpointing=True, query=1, batch=1))
    assert found["activations"] == {"student": 5 * (2 * 32 + 64)}  # 640 bytes: most is there when it ends
    assert found["gradients"] == {"student": 1024, "backward": 5792, "optimizer": 5792}


def test_gradient_checkpointing_by_hand():
    found = sizes(replace(RUN, checkpointing=True))
    assert found["activations"]["student"] == 20 * (2 * 32 + 64)
    assert "casts of weights" not in found
    # A layer's own, its scratch, and the casts of its 576 weights.
    assert found["one layer's pass"]["backward"] == 20 * (192 + 400) + 576 * 2


def test_an_adapter_by_hand():
    base = Weights(SMALL, torch.bfloat16)
    run = replace(RUN, student=base, scorer=base, teacher_bytes=0, lora=Lora(rank=2))
    # 2 x (16 + 12 + 12 + 16 + 3 x 24) numbers a layer.
    assert run.adapter_weights == 512
    found = sizes(run)
    assert found["student's weights"]["teacher"] == 2896 + 512 * 4
    assert found["optimizer's states"]["teacher"] == 512 * 8
    assert found["gradients"] == {"student": 2048, "backward": 2048, "optimizer": 2048}
    assert found["loss chunk"] == {"student": 8 * 32 * 16}
    assert found["casts of weights"]["student"] == 512 * 2
    assert "teacher's weights" not in found and "copy that generates" not in found
    # Norms 2 x (4 x 8 + 4), 56 and 96 as before, inputs of seven targets (5 x 8 + 8 + 16 and 2 for each) in 2 bytes.
    assert found["activations"]["student"] == 20 * (2 * (72 + 56 + 96 + 2 * (64 + 14)) + 6 * 8)
    assert replace(run, lora=Lora(rank=2, targets=["q", "v"], head=True)).adapter_weights == 2 * (2 * 28 + 40)


def test_ranks_by_hand():
    alone, ddp = sizes(RUN), sizes(replace(RUN, ranks=4))
    assert ddp.pop("DDP's buckets")["rollout"] == 5792
    assert ddp == alone
    sharded = sizes(replace(RUN, ranks=4, sharded=True))
    assert sharded["student's weights"]["optimizer"] == 1448
    assert sharded["optimizer's states"]["optimizer"] == 2896
    assert sharded["gradients"] == {"student": 1024 + 1448, "backward": 1024 + 1448, "optimizer": 1448}
    # Embedding and norms in float32, two layers of 576 in bfloat16; no casts beside them.
    assert sharded["gathered weights"] == {"student": 296 * 4 + 2 * 576 * 2, "backward": 296 * 4 + 2 * 576 * 2}
    assert "casts of weights" not in sharded
    assert sharded["teacher's weights"] == alone["teacher's weights"]


def test_teachers_and_writers_by_hand():
    assert "teacher's weights" not in sizes(replace(RUN, scorer=STUDENT, teacher_bytes=0))
    recorded = sizes(replace(RUN, scorer=None, teacher_bytes=0, writers=()))
    assert "keys and values" not in recorded and "teacher" not in recorded["one layer's pass"]
    assert recorded["loss chunk"] == {"student": 8 * 32 * 12 + 1024}  # no log-probabilities of a teacher
    teacher = sizes(replace(RUN, writers=("teacher",)))
    assert teacher["keys and values"]["rollout"] == 4 * 20 * 32
    assert "copy that generates" not in teacher
    whole = sizes(replace(RUN, shared_prefix=False, micro_batch_tokens=45))  # two rows of 20 tokens with the context
    assert "contexts' keys and values" not in whole
    assert whole["one layer's pass"]["teacher"] == 40 * (3 * 2 * 8 + 96)
    several = sizes(replace(RUN, contexts=7, prefix_bytes=1000))
    assert several["contexts' keys and values"]["student"] == 1000


def test_packed_layers_take_the_memory_of_a_copy():
    """Beside it comes the head alone, where that is the embedding; beside weights that are no copy, all of them."""
    run = replace(RUN, packs=True, response=FEWEST_STEPS)
    shape = run.student.shape
    assert shape.tied and sizes(run)["packed or cast weights"] == {"rollout": 2 * shape.head}
    untied = replace(shape, weights=shape.weights + shape.head)
    assert "packed or cast weights" not in sizes(replace(run, student=replace(run.student, shape=untied)))
    own = replace(run, student=replace(run.student, dtype=torch.bfloat16))
    assert sizes(own)["packed or cast weights"]["rollout"] == 2 * (shape.head + shape.linear_weights)


@pytest.mark.case("W3")
def test_a_mask_of_all_pairs():
    with_mask, without = (sizes(replace(RUN, masks=masks))["keys and values"]["teacher"] for masks in (True, False))
    assert with_mask - without == 20 * 30 * 3
    two_kinds = replace(RUN.scorer, shape=replace(RUN.scorer.shape, masks=2))
    assert sizes(replace(RUN, masks=True, scorer=two_kinds))["keys and values"]["teacher"] - without == 20 * 30 * 4


def test_what_glibc_keeps_by_hand():
    run = replace(RUN, gpu=False, keeps_freed=True, teacher_leaves=True)
    comes_and_goes = 2304 + 17280 + 5120 + 6816 + 128 + 3840
    stays = 5792 + 11584 + 320
    assert total(run, "student") == stays + 512 + round(1.3 * comes_and_goes)  # 512: the teacher's head
    assert peak(parts(run)) == ("teacher", stays + 2896 + round(1.3 * comes_and_goes))
    assert total(run, "optimizer") == stays + round(1.3 * comes_and_goes)
    # With gradient checkpointing it is given back.
    small = replace(run, checkpointing=True)
    in_use = total(replace(small, keeps_freed=False), "optimizer")
    assert total(small, "optimizer") == in_use + round(0.3 * (in_use - stays))


@pytest.mark.parametrize(
    ("family", "case", "mixed"),
    [
        *((LlamaConfig, case, mixed) for case in CASES for mixed in (True, False)),
        *((Qwen3Config, case, True) for case in CASES),
    ],
)
def test_activations_beside_what_autograd_keeps(family, case, mixed, tmp_path):
    dtype = torch.float32 if case in ("float32", "checkpointing") else torch.bfloat16
    lora = {"adapter": Lora(rank=8), "few targets": Lora(rank=4, targets=["q_proj", "down_proj"])}.get(case)
    small = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8, "vocab_size": 512}
    config = family(**small, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_implementation="sdpa")
    config.save_pretrained(tmp_path)
    shape = shape_of(ModelConfig(str(tmp_path)), "model.student")
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    assert sum(weight.numel() for weight in model.parameters()) == shape.weights
    if lora is not None:
        add_lora(model, lora)
    if case == "checkpointing":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    setting = replace(
        Setting(Weights(shape, dtype), None, lora=lora, autocast=torch.bfloat16 if mixed else None),
        checkpointing=case == "checkpointing",
    )
    assert setting.adapter_weights == sum(w.numel() for name, w in model.named_parameters() if "lora_" in name)
    kept = 128 * kept_of_pass(setting) + casts(setting)
    # Of the first layer's norm an adapter keeps nothing: nothing before it learns.
    assert kept == pytest.approx(saved(model, 128, mixed), rel=0.03 if lora else 0.01)


def saved(model, tokens: int, mixed: bool) -> int:
    """Bytes that autograd keeps of a pass, the weights themselves aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # alive, so that no address serves twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor's memory once."""
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def qwen3(folder, tied: bool, **sizes: int):
    """A folder with the config.json of a Qwen3 and nothing else."""
    folder.mkdir()
    config = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
    text = json.dumps(config | {"tie_word_embeddings": tied, "dtype": "bfloat16"} | sizes)
    (folder / "config.json").write_text(text)
    return folder


SIZES = {
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
}


@pytest.fixture
def pair(tmp_path):
    """Configs of Qwen3-1.7B and Qwen3-8B."""
    return [qwen3(tmp_path / name, tied=name == "1.7B", **sizes) for name, sizes in SIZES.items()]


def test_a_folder_with_a_config_is_enough(pair):
    small, large = (shape_of(ModelConfig(str(folder)), "model.student") for folder in pair)
    # Qwen3-1.7B, a layer: 2 x 2048 x 2048, 2 x 2048 x 1024, 3 x 2048 x 6144, norms 2 x 2048 + 2 x 128.
    assert small.weights == 28 * (8388608 + 4194304 + 37748736 + 4352) + 151936 * 2048 + 2048
    assert large.weights == 8190735360  # what Qwen3-8B is known to have
    assert Weights(large, torch.bfloat16).token(None) == 36 * 8 * 128 * 2 * 2  # docs/speed.md: 147 kB
    assert small.head_norms and small.norms == 2


def test_who_scores_and_who_writes(tiny, tiny_teacher, monkeypatch):
    small = shape_of(ModelConfig(tiny), "model.student")
    student = Weights(small, torch.float32)

    def teachers(teacher, sharded: bool = False, **options) -> tuple[int | None, int, bool]:
        found = teacher_of(
            Distiller(ModelConfig(tiny), teacher, **options), student, torch.bfloat16, False, sharded, ranks=4
        )
        return found["scorer"] and found["scorer"].shape.hidden, found["teacher_bytes"], found["teacher_leaves"]

    large = shape_of(ModelConfig(tiny_teacher), "model.student").weights
    # The files of both are in float32, so that a bfloat16 teacher is converted and stays in memory.
    assert teachers(FrozenTeacher(ModelConfig(tiny_teacher))) == (48, 2 * large, False)
    as_it_is = FrozenTeacher(ModelConfig(tiny_teacher, "float32"))
    assert teachers(as_it_is, gradient_checkpointing=True) == (48, 4 * large, True)
    assert teachers(as_it_is) == (48, 4 * large, False)  # not worth it
    monkeypatch.setattr(distiller, "LARGE", 4 * large)
    assert teachers(as_it_is) == (48, 4 * large, True)
    linears = shape_of(ModelConfig(tiny_teacher), "model.student").linear_weights
    in_parts = 2 * (large - linears) + 2 * linears // 4 + 2 * linears // 2  # a quarter of both layers, and one whole
    assert teachers(FrozenTeacher(ModelConfig(tiny_teacher), shard=True)) == (48, in_parts, False)
    both = RoutedTeachers({"own": FrozenTeacher(), "other": FrozenTeacher(ModelConfig(tiny_teacher))})
    assert teachers(both) == (48, 2 * large + 2 * small.weights, False)
    assert teachers(SelfTeacher()) == (32, 0, False)
    assert teachers(SelfTeacher(), sharded=True) == (32, 4 * small.weights, False)
    assert teachers(MovingAverageTeacher()) == (32, 4 * small.weights, False)
    lora = Lora(rank=2)
    assert teachers(MovingAverageTeacher(), adapter=lora) == (32, 4 * adapter_weights(small, lora), False)
    assert teachers(ServedTeacher("http://localhost:1", "large")) == (None, 0, False)

    mixed = MixedRollout([StudentRollout(dtype="float32"), TeacherRollout()], [0.5, 0.5])
    assert writers_of(mixed, False, torch.bfloat16) == {
        "writers": ("student", "teacher"),
        "rollout_dtype": torch.float32,
    }
    assert writers_of(TeacherRollout(), True, torch.bfloat16) == {"writers": ()}
    assert writers_of(RecordedRollout(), False, torch.bfloat16) == {"writers": ()}


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_weights_beside_those_of_bitsandbytes(quantization, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    name = ModelConfig(str(tmp_path), "bfloat16", quantization)
    weights = Weights(shape_of(name, "model.student"), torch.bfloat16, quantization)
    model = load_model(name)
    assert weights.bytes == pytest.approx(sum(map(nbytes, tensors_of(model))), rel=0.01)


def tensors_of(model) -> Iterator[torch.Tensor]:
    """Weights, and the scales of quantized ones."""
    for weight in model.parameters():
        yield weight
        if (state := getattr(weight, "quant_state", None)) is not None:
            yield from (state.absmax, *([state.state2.absmax] if state.nested else []))
        if (scales := getattr(weight, "SCB", None)) is not None:
            yield scales


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def test_an_optimizer_is_asked_what_it_keeps():
    def of(optimizer) -> float:
        return _kept(_optimizer(Distiller(optimizer=optimizer), torch.float32))

    assert of(torch.optim.AdamW) == pytest.approx(8, abs=0.01)  # and one number of steps
    assert of(lambda weights: torch.optim.AdamW(weights, amsgrad=True)) == pytest.approx(12, abs=0.01)
    assert of(torch.optim.SGD) == 0
    assert of(lambda weights: torch.optim.SGD(weights, momentum=0.9)) == 4
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # Two bytes, and two scales of four bytes for 256 numbers.
    assert of(bitsandbytes.optim.AdamW8bit) == pytest.approx(2 + 8 / 256, abs=0.01)


def test_who_unpacks_its_states():
    def of(optimizer, gpu=False) -> float:
        return _unpacked(_optimizer(Distiller(optimizer=optimizer), torch.float32), gpu)

    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert of(torch.optim.AdamW) == of(bitsandbytes.optim.AdamW) == of(bitsandbytes.optim.AdamW8bit, gpu=True) == 0
    assert of(bitsandbytes.optim.AdamW8bit) == UNPACKED


def test_levers_are_tried_until_it_fits():
    before = peak(parts(RUN))[1]
    assert until_it_fits(RUN, before) == []
    first = until_it_fits(RUN, before - 1)
    assert first[0][1] == min(peak(parts(other))[1] for _, other in ways(RUN)) < before
    # 64 rows of 4,006 tokens are 8.2 MB of keys and values; what is halved again and again is named once.
    long = replace(RUN, response=4000, batch=64, shared_prefix=False, checkpointing=True, micro_batch_tokens=1)
    assert sizes(long)["keys and values"] == {"rollout": 64 * 4006 * 32}
    taken = until_it_fits(long, 4_000_000)
    assert [name for name, _ in taken] == ["data.batch_size: 16"]
    assert taken[0][1] == peak(parts(replace(long, batch=16)))[1] <= 4_000_000 < peak(parts(replace(long, batch=32)))[1]


@pytest.mark.parametrize(("text", "number"), [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 3 * 2**19)])
def test_sizes_are_read(text, number):
    assert size(text) == number


@pytest.fixture
def plan(opcd, monkeypatch):
    """Run `opcd doctor --plan`."""
    monkeypatch.setattr("opcd.cli.plan.fit_parser", PARSER)
    return partial(opcd, "doctor", "--plan")


def test_a_plan_reads_the_rows(plan, tiny, rows, context):
    where = ("--model.student.name", tiny, "--data.train", rows, "--data.context", context)
    code, text = plan("--config", "configs/quickstart.yaml", *where, "--json")
    assert code == 0, text
    found = json.loads(text.splitlines()[-1])
    # Embedding 49,152 x 32; two layers of 2 x 32 x 32, 2 x 32 x 16, 3 x 32 x 64 and two norms of 32; another norm.
    assert found["parts"]["student's weights"]["student"] == 4 * (49152 * 32 + 2 * (3072 + 6144 + 64) + 32)
    assert found["parts"]["process"]["student"] > 100 * 2**20
    code, text = plan("--config", "configs/quickstart.yaml", *where, "--memory", "64MiB")
    assert code == 1
    assert "does not fit in 0.1 GiB" in text and "that is not enough" in text
    assert re.search(r"1 CPU; 8 rows a step, prompts of \d+ tokens, with the context \d+ more, responses of 24", text)


def test_the_papers_case(plan, pair):
    small, large = pair
    words = ("--config", "configs/cross_size.yaml", "--model.student.name", small)
    words = (*words, "--model.teacher.init_args.model.name", large, "--trainer.accelerator", "gpu")
    code, text = plan(*words)
    assert code == 2 and "--query_tokens and --context_tokens" in text
    lengths = ("--query_tokens", 512, "--context_tokens", 4096)
    code, text = plan(*words, *lengths, "--memory", "80GB")
    assert code == 1
    # 128 rows of 512 + 16,384 tokens of 114,688 bytes.
    assert f"{128 * 16896 * 114688 / 2**20:,.0f}" in text
    assert "67.5 GiB  with data.batch_size: 16" in text
    ranks = ("--config", "configs/node_8gpu.yaml", "--config", "configs/fsdp2.yaml")
    code, text = plan(*words, *ranks, *lengths, "--memory", "80GB")
    assert code == 0, text
    assert "8 GPUs, each with a part of the student; 16 rows a step" in text


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--trainer.strategy", "fsdp"), "trainer.strategy: fsdp is not supported"),
        (("--trainer.precision", "16-mixed"), "trainer.precision: there is no plan for 16-mixed"),
        (("--trainer.accelerator", "tpu"), "trainer.accelerator: there is no plan for tpu"),
        (("--model.student.attention", "eager"), "no plan for eager"),
        (("--model.student.quantization", "4bit"), "set model.adapter"),
        (("--model.teacher", "BaseTeacher"), "set model.adapter"),
        (("--memory", "much"), "wants a number and one of MB, GB, MiB, GiB"),
    ],
)
def test_what_is_refused(plan, tiny, words, why, capsys):
    lengths = ("--query_tokens", 8, "--context_tokens", 8)
    try:
        code, text = plan("--config", "configs/quickstart.yaml", "--model.student.name", tiny, *lengths, *words)
    except SystemExit as end:  # argparse's own
        code, text = end.code, capsys.readouterr().err
    assert code == 2 and why in text


def test_a_model_that_is_not_here_is_named(plan):
    code, text = plan("--config", "configs/quickstart.yaml", "--model.student.name", "org/name")
    assert code == 2
    assert text.count("\n") == 1 and "org/name is not on this machine" in text


def test_a_config_of_no_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"model\.student\.name: no plan for .* \(mamba\)"):
        shape_of(ModelConfig(str(tmp_path)), "model.student")
