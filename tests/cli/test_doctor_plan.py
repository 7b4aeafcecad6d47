"""The memory of a run before it starts: by hand, beside what torch really keeps, and beside measured runs."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
)

from benchmarks.plan import words_of
from examples.rollout import TeacherStart
from examples.teacher import SnapshotTeacher
from opcd.accel import precision
from opcd.cli.fit import fit_parser
from opcd.cli.plan import read, size
from opcd.models import ModelConfig, load_model
from opcd.modules import (
    BaseTeacher,
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
    VLLMRollout,
    VLLMServer,
)
from opcd.modules.lm.adapters import add_lora
from opcd.planning import Model, Setting, parts, peak
from opcd.planning.model_shapes import build, kept_by_autograd, measured
from opcd.planning.reading import optimizer_of, teachers_of, writers_of
from opcd.planning.sizes import until_it_fits, ways
from tests.helpers.paths import ROOT

# Two layers of 576, an embedding of 32 x 8 that is the head too, norms of 40. Keys of one head of 4 in each layer.
STUDENT = Model(torch.float32, 1448, 1152, 256, 32, 2, 8, 8, computing=2, kept_bytes=864.0, casts_bytes=2304)
TEACHER = replace(STUDENT, dtype=torch.bfloat16, kept_bytes=0.0, casts_bytes=0)
# Rows of 6 + 4 tokens, two of them in a micro-batch of 20 tokens, so two passes.
RUN = Setting(STUDENT, TEACHER, 2896, batch=4, query=6, context=10, response=4, micro_batch_tokens=20, gpu=True)
PARSER = cache(fit_parser)
"""One for all: it takes a second to build."""


def total(setting: Setting, phase: str) -> int:
    """Bytes of a phase."""
    return sum(of.get(phase, 0) for of in parts(setting).values())


def test_the_parts_of_a_run_by_hand():
    found = parts(RUN)
    assert set(found["student's weights"].values()) == {1448 * 4}
    assert set(found["optimizer's states"].values()) == {1448 * 8}
    assert set(found["teacher's weights"].values()) == {1448 * 2}
    assert found["casts of weights"] == {"student": 2304, "backward": 2304, "optimizer": 2304}
    assert found["contexts' keys and values"]["rollout"] == 10 * 32
    # Of a layer: own keys and values of the 20 tokens, and three results of width 8.
    assert found["keys and values"] == {"rollout": 4 * 10 * 32, "teacher": 20 * (16 + 3 * 8 * 2)}
    # The head's are made by the loss, and those of the first micro-batch are there.
    assert found["gradients"] == {"student": 1024 + 5792, "backward": 5792, "optimizer": 5792}
    assert found["activations"] == {"student": 20 * 864, "backward": 20 * 864 + 1024}
    # Eight tokens of 32 probabilities, 32 bytes each with their bfloat16 logits; two bfloat16 matrices of the head.
    assert found["loss chunk"] == {"student": 8 * 32 * 32 + 2 * 256 * 2}
    on_cpu = parts(replace(RUN, gpu=False))["loss chunk"]  # 12 bytes, and 4 for bfloat16 logits
    assert on_cpu == {"student": 8 * 32 * 16 + 2 * 256 * 2}
    small = parts(replace(RUN, memory=10 * 3 * 32 * 32))["loss chunk"]  # a tenth of it holds three tokens
    assert small == {"student": 3 * 32 * 32 + 2 * 256 * 2}
    assert found["copy that writes"] == {"rollout": 1448 * 2}
    assert peak(found) == ("student", 5792 + 11584 + 2896 + 320 + 2304 + 17280 + 9216 + 6816)
    whole = parts(replace(RUN, micro_batch_tokens=40, query=1, batch=1))  # one pass: 5 x 864 bytes go as 4,768 come
    assert whole["gradients"] == {"student": 1024, "backward": 5792, "optimizer": 5792}
    assert whole["activations"] == {"student": 4320, "backward": 0}
    several = parts(replace(RUN, contexts=7, prefix_bytes=1000))
    assert several["contexts' keys and values"]["student"] == 1000
    assert not {"contexts' keys and values", "DDP's buckets"} & parts(replace(RUN, prefix_bytes=0)).keys()


def test_gradient_checkpointing_by_hand():
    found = parts(replace(RUN, checkpointing=True))
    assert found["activations"]["student"] == 20 * 2 * 8 * 4
    assert found["a layer computed again"] == {"backward": (20 * 864 + 1152 * 2) // 2}
    assert "casts of weights" not in found


def test_an_adapter_by_hand():
    base = replace(TEACHER, adapter=512)
    found = parts(replace(RUN, student=base, scorer=base, teacher_bytes=0))
    assert found["student's weights"]["teacher"] == 2896 + 512 * 4
    assert found["optimizer's states"]["teacher"] == 512 * 8
    assert found["gradients"] == {"student": 2048, "backward": 2048, "optimizer": 2048}
    assert found["loss chunk"] == {"student": 8 * 32 * 32}
    assert "teacher's weights" not in found and "copy that writes" not in found


def test_ranks_by_hand():
    alone, ddp = parts(RUN), parts(replace(RUN, ranks=4))
    assert ddp.pop("DDP's buckets")["rollout"] == 5792
    assert ddp == alone
    sharded = parts(replace(RUN, ranks=4, sharded=True))
    assert sharded["student's weights"]["optimizer"] == 1448
    assert sharded["optimizer's states"]["optimizer"] == 2896
    assert sharded["gradients"] == {"student": 1024 + 1448, "backward": 1448, "optimizer": 1448}
    # Embedding and norms in float32, two layers of 576 in bfloat16; no casts beside them.
    assert sharded["gathered weights"] == {"student": 296 * 4 + 2 * 576 * 2, "backward": 296 * 4 + 2 * 576 * 2}
    assert "casts of weights" not in sharded


def test_who_writes_by_hand():
    teacher = parts(replace(RUN, writers=("teacher",)))
    assert teacher["keys and values"]["rollout"] == 4 * 10 * 32  # the context is there once
    for change in ({"contexts": 2}, {"prefix_bytes": 0}, {"scorer": replace(TEACHER, masks=1)}):
        assert parts(replace(RUN, writers=("teacher",), **change))["keys and values"]["rollout"] == 4 * 20 * 32
    window = replace(RUN, writers=("teacher",), scorer=replace(TEACHER, windows=True))
    assert parts(window)["keys and values"]["rollout"] == 4 * 20 * 32
    assert "copy that writes" not in teacher
    assert parts(replace(RUN, writers=("teacher",), gpu=False))["copy that writes"]["rollout"] == 2 * (1152 + 256)
    recorded = parts(replace(RUN, scorer=None, teacher_bytes=0, writers=()))
    assert "keys and values" not in recorded


@pytest.mark.case("W3")
def test_models_that_need_a_mask_by_hand():
    one, two = (parts(replace(RUN, scorer=replace(TEACHER, masks=n)))["keys and values"]["teacher"] for n in (1, 2))
    assert one == (10 + 20) * 32 + 20 * 30 * 3  # of all pairs, three bytes each
    assert two - one == 20 * 30


@pytest.mark.parametrize(
    ("family", "masks"),
    [(LlamaConfig, 0), (Qwen3Config, 0), (Gemma2Config, 0), (FalconConfig, 1), (BloomConfig, 1), (DeepseekV3Config, 1)],
)
def test_who_needs_a_mask(family, masks, tmp_path):
    """Falcon and Bloom keep their own attention; DeepSeek-V3's cache holds compressed states."""
    family(hidden_size=64, num_hidden_layers=2, vocab_size=512, num_attention_heads=4).save_pretrained(tmp_path)
    found = measured(build(ModelConfig(str(tmp_path)), "model.student", torch.float32))
    assert found.masks == masks and found.windows is (family is Gemma2Config)


def test_what_an_optimizer_takes_in_its_step():
    assert "optimizer's scratch" not in parts(RUN)
    assert parts(replace(RUN, fused=False))["optimizer's scratch"] == {"optimizer": 5792}
    unpacks = replace(RUN, gpu=False, state_bytes=2.0)
    assert parts(unpacks)["optimizer's scratch"] == {"optimizer": 256 * 20}


def test_what_glibc_keeps_by_hand():
    run = replace(RUN, gpu=False, heap=True, process=100)
    comes_and_goes, stays = 2304 + 17280 + 5120 + 6816, 100 + 64 * 2**20 + 5792 + 11584 + 320 + 2896
    assert {total(run, phase) for phase in ("rollout", "student", "optimizer")} == {stays + round(1.3 * comes_and_goes)}
    assert peak(parts(run))[0] == "student"
    small = replace(run, checkpointing=True)  # then it is given back
    in_use = total(replace(small, heap=False), "optimizer")
    assert total(small, "optimizer") == in_use + round(0.3 * (in_use - stays))


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("lora", [None, Lora(rank=8), Lora(rank=4, targets=["q_proj", "down_proj"], head=True)])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen3Config])
def test_sizes_beside_a_real_model(family, lora, mixed, tmp_path):
    dtype, autocast = torch.bfloat16 if lora else torch.float32, torch.bfloat16 if mixed else None
    small = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8, "vocab_size": 512}
    family(**small, num_attention_heads=4, num_key_value_heads=2, head_dim=16).save_pretrained(tmp_path)
    built = build(ModelConfig(str(tmp_path)), "model.student", dtype, lora)
    ours, (token, casts) = measured(built, autocast), kept_by_autograd(built, autocast)
    assert {weight.device.type for weight in built.parameters()} == {"meta"}
    real = AutoModelForCausalLM.from_config(family.from_pretrained(tmp_path), dtype=dtype).train()
    if lora is not None:
        add_lora(real, lora)
    assert ours.bytes == sum(weight.nbytes for weight in real.parameters())
    assert ours.adapter == sum(weight.numel() for name, weight in real.named_parameters() if "lora_" in name)
    assert ours.keys == 8 * 2 * 16
    assert 64 * token + casts == pytest.approx(saved(real, 64, mixed), rel=0.01)


@pytest.mark.parametrize("family", [MixtralConfig, FalconConfig, BloomConfig, MambaConfig])
def test_a_pass_of_other_families_is_counted(family, tmp_path):
    family(hidden_size=64, num_hidden_layers=2, vocab_size=512, num_attention_heads=4).save_pretrained(tmp_path)
    built = build(ModelConfig(str(tmp_path)), "model.student", torch.float32)
    token, casts = kept_by_autograd(built, torch.bfloat16)
    assert token > 2 * 4 * 64 and casts > 0  # each layer's input at least
    assert measured(built).weights == sum(weight.numel() for weight in built.parameters())


def saved(model, tokens: int, mixed: bool) -> int:
    """Bytes that autograd keeps of a pass, the weights themselves aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # alive, so that no address serves twice
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
    )
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def qwen3(folder, tied: bool, **sizes: int):
    """A folder with the config.json of a Qwen3 and nothing else."""
    folder.mkdir()
    config = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
    text = json.dumps(config | {"tie_word_embeddings": tied, "dtype": "bfloat16"} | sizes)
    (folder / "config.json").write_text(text)
    return folder


@pytest.fixture
def pair(tmp_path):
    """Configs of Qwen3-1.7B and Qwen3-8B."""
    small = {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144}
    large = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288}
    return [qwen3(tmp_path / "1.7B", True, **small), qwen3(tmp_path / "8B", False, **large)]


def test_a_folder_with_a_config_is_enough(pair):
    small, large = (measured(build(ModelConfig(str(folder)), "model.student", torch.bfloat16)) for folder in pair)
    # Qwen3-1.7B, a layer: 2 x 2048 x 2048, 2 x 2048 x 1024, 3 x 2048 x 6144, norms 2 x 2048 + 2 x 128.
    assert small.weights == 28 * (8388608 + 4194304 + 37748736 + 4352) + 151936 * 2048 + 2048
    assert large.weights == 8190735360  # what Qwen3-8B is known to have
    assert large.token_bytes == 36 * 8 * 128 * 2 * 2  # GPU shapes: 147 kB


class _Unknown(FrozenTeacher):
    """A teacher of the user's own: what it loads is known when it has loaded it."""

    def __init__(self) -> None:
        self._model = None


def test_what_teachers_have_beside_the_student(tiny, tiny_teacher):
    def of(teacher, adapter=None, sharded: bool = False) -> tuple[int | None, int, int]:
        """Width of the model that scores, bytes beside the student's, lines of what is not known."""
        model = Distiller(ModelConfig(tiny), teacher, adapter=adapter)
        built = build(model.student_config, "model.student", torch.float32, adapter)
        scorer, size, unknown = teachers_of(model, built, measured(built), torch.bfloat16, sharded, ranks=4)
        return scorer and scorer.hidden, size, len(unknown)

    student, large = (measured(build(ModelConfig(name), "x", torch.float32)) for name in (tiny, tiny_teacher))
    assert of(FrozenTeacher(ModelConfig(tiny_teacher))) == (48, 2 * large.weights, 0)
    in_parts = 2 * (large.weights - large.linear) + 2 * large.linear // 4 + 2 * large.linear // 2  # one layer is whole
    assert of(FrozenTeacher(ModelConfig(tiny_teacher), shard=True)) == (48, in_parts, 0)
    assert of(FrozenTeacher()) == (32, 2 * student.weights, 0)
    both = RoutedTeachers({"own": FrozenTeacher(), "other": FrozenTeacher(ModelConfig(tiny_teacher))})
    assert of(both) == (48, 2 * large.weights + 2 * student.weights, 0)
    assert of(SelfTeacher()) == (32, 0, 0)
    assert of(SelfTeacher(), sharded=True) == (32, student.bytes, 0)
    assert of(MovingAverageTeacher()) == (32, student.bytes, 0)
    lora = Lora(rank=2)
    adapter = measured(build(ModelConfig(tiny), "x", torch.float32, lora)).adapter
    assert of(MovingAverageTeacher(), lora) == (32, 4 * adapter, 0)
    assert of(BaseTeacher(), lora) == (32, 0, 0)
    assert of(SnapshotTeacher(5)) == (32, student.bytes, 0)  # of examples/: counted without a word about memory
    assert of(ServedTeacher("http://localhost:1", "large")) == (None, 0, 1)
    assert of(_Unknown()) == (None, 0, 1)


def test_who_writes():
    def of(rollout) -> tuple[tuple[str, ...], torch.dtype, list[str]]:
        return writers_of(Distiller(rollout=rollout), torch.bfloat16)

    mixed = MixedRollout([StudentRollout(dtype="float32"), TeacherRollout()], [0.5, 0.5])
    assert of(mixed) == (("student", "teacher"), torch.float32, [])
    assert of(StudentRollout()) == (("student",), torch.bfloat16, [])
    assert of(RecordedRollout())[2] == []  # nobody writes
    assert of(VLLMRollout(VLLMServer("http://localhost:1", "student", "weights")))[2] == [
        "model.rollout: the memory of VLLMServer on this device"
    ]
    assert of(TeacherStart())[2] == ["model.rollout: the memory of TeacherStart on this device"]


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_weights_beside_those_of_bitsandbytes(quantization, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    name = ModelConfig(str(tmp_path), "bfloat16", quantization)
    ours = measured(build(name, "model.student", torch.bfloat16), None, quantization)
    assert ours.bytes == pytest.approx(sum(x.nbytes for x in tensors_of(load_model(name))), rel=0.02)


def tensors_of(model) -> Iterator[torch.Tensor]:
    """Weights, and the scales of quantized ones."""
    for weight in model.parameters():
        yield weight
        if (state := getattr(weight, "quant_state", None)) is not None:
            yield from (state.absmax, *([state.state2.absmax] if state.nested else []))
        if (scales := getattr(weight, "SCB", None)) is not None:
            yield scales


def test_an_optimizer_is_asked_what_it_keeps():
    def of(optimizer) -> float:
        return optimizer_of(Distiller(optimizer=optimizer), torch.float32)[1]

    assert of(torch.optim.AdamW) == pytest.approx(8, abs=0.01)  # and one number of steps
    assert of(torch.optim.SGD) == 0
    assert of(lambda weights: torch.optim.SGD(weights, momentum=0.9)) == 4
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # Two bytes, and two scales of four bytes for 256 numbers.
    assert of(bitsandbytes.optim.AdamW8bit) == pytest.approx(2 + 8 / 256, abs=0.01)


def test_levers_are_tried_until_it_fits():
    before = peak(parts(RUN))[1]
    assert until_it_fits(RUN, before) == []
    first = until_it_fits(RUN, before - 1)
    assert first[0][1] == min(peak(parts(other))[1] for _, other in ways(RUN)) < before
    # 64 rows of 4,006 tokens are 8.2 MB of keys and values; what is halved again and again is named once.
    long = replace(RUN, response=4000, batch=64, prefix_bytes=0, checkpointing=True, micro_batch_tokens=1, memory=2**20)
    assert parts(long)["keys and values"]["rollout"] == 64 * 4006 * 32
    taken = until_it_fits(long, 4_000_000)
    assert [name for name, _ in taken] == ["data.batch_size: 16"]
    assert taken[0][1] == peak(parts(replace(long, batch=16)))[1] <= 4_000_000 < peak(parts(replace(long, batch=32)))[1]


@pytest.mark.parametrize(("text", "number"), [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 3 * 2**19)])
def test_sizes_are_read(text, number):
    assert size(text) == number


@pytest.mark.parametrize("cell", ["quickstart, micro-batches of 256 tokens", "checkpointing", "lora", "long"])
def test_the_plan_is_within_15_percent_of_measured_runs(cell, tmp_path, monkeypatch):
    """Those of docs/memory.md, on a machine with bfloat16 instructions, whose process took 501 MiB before a model."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device="cpu": True)
    monkeypatch.setattr("opcd.cli.plan.fit_parser", PARSER)
    table = (ROOT / "docs/memory.md").read_text()
    found = re.search(rf"^\| {cell} \| [\d,]+ \| ([\d,]+) \| \w+ \| ([\d,]+) \|", table, re.MULTILINE)
    ours, then = (int(number.replace(",", "")) * 2**20 for number in found.groups())
    run = replace(read(words_of(cell, tmp_path)), process=501 * 2**20, heap=True)
    assert peak(parts(run))[1] == pytest.approx(ours, rel=0.005)
    assert ours == pytest.approx(then, rel=0.15)


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
    assert found["parts"]["process"]["student"] > 100 * 2**20 and found["not_counted"] == []
    code, text = plan("--config", "configs/quickstart.yaml", *where, "--memory", "64MiB")
    assert code == 1
    assert "does not fit in 0.1 GiB" in text and "this is not enough" in text
    assert re.search(r"1 CPU; 8 rows a step, prompts of \d+ tokens, with the context \d+ more, responses of 24", text)


def test_components_of_the_users_own(plan, tiny):
    words = ("--config", "configs/quickstart.yaml", "--model.student.name", tiny)
    lengths = ("--query_tokens", 8, "--context_tokens", 8)
    own = "{class_path: examples.teacher.SnapshotTeacher, init_args: {every_n_steps: 20}}"
    code, text = plan(*words, *lengths, "--model.teacher", own, "--model.rollout", "examples.rollout.TeacherStart")
    assert code == 0, text
    assert "teacher's weights" in text and "model.rollout: the memory of TeacherStart on this device" in text


def test_the_papers_case(plan, pair):
    small, large = pair
    words = ("--config", "configs/cross_size.yaml", "--model.student.name", small)
    words = (*words, "--model.teacher.init_args.model.name", large, "--trainer.accelerator", "gpu")
    code, text = plan(*words)
    assert code == 2 and "--query_tokens and --context_tokens" in text
    lengths = ("--query_tokens", 512, "--context_tokens", 4096)
    code, text = plan(*words, *lengths, "--memory", "80GB", "--model.rollout.init_args.rows_at_a_time", 128)
    assert code == 1
    # 128 rows of 512 + 16,384 tokens of 114,688 bytes.
    assert f"{128 * 16896 * 114688 / 2**20:,.0f}" in text
    assert re.search(r"\d+\.\d GiB  with data.batch_size: 16", text)
    code, text = plan(*words, *lengths, "--memory", "80GB")
    assert code == 0, text
    rows = int(re.search(r"the rollout writes (\d+) of 128 rows at a time", text)[1])
    assert f"{rows * 16896 * 114688 / 2**20:,.0f}" in text and 4 < rows < 30
    ranks = ("--config", "configs/node_8gpu.yaml", "--config", "configs/fsdp2.yaml")
    code, text = plan(*words, *ranks, *lengths, "--memory", "80GB")
    assert code == 0, text
    assert "8 GPUs, the student sharded; 16 rows a step on each" in text


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--trainer.strategy", "fsdp"), "trainer.strategy: fsdp is not supported"),
        (("--trainer.precision", "16-mixed"), "trainer.precision: float16 needs loss scaling"),
        (("--trainer.accelerator", "tpu"), "trainer.accelerator: --plan does not support tpu"),
        (("--model.student.quantization", "4bit"), "set model.adapter"),
        (("--model.teacher", "BaseTeacher"), "set model.adapter"),
        (("--memory", "much"), "needs a number and one of MB, GB, MiB, GiB"),
        (("--model.student.name", "org/name"), "org/name is not on this machine"),
    ],
)
def test_what_is_refused(plan, tiny, words, why, capsys):
    lengths = ("--query_tokens", 8, "--context_tokens", 8)
    try:
        code, text = plan("--config", "configs/quickstart.yaml", "--model.student.name", tiny, *lengths, *words)
    except SystemExit as end:  # argparse's own
        code, text = end.code, capsys.readouterr().err
    assert code == 2 and why in text


def test_a_teacher_in_parts_is_planned_for_its_ranks_with_rows_that_are_read(plan, tiny):
    """The checks of data know how many ranks there are."""
    words = ("--config", "configs/quickstart.yaml", "--model.student.name", tiny, "--model.rollout", "StudentRollout")
    parts_of = ("--model.teacher", "FrozenTeacher", "--model.teacher.init_args.shard", "true")
    two = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--model.shared_prefix", "always")
    code, text = plan(*words, *parts_of, *two)
    assert code == 0 and "2 CPUs" in text, text
    code, text = plan(*words, *parts_of, "--trainer.accelerator", "cpu", "--trainer.devices", 1)
    assert code == 2 and "has no effect on one rank" in text and "no row is read" not in text, text
