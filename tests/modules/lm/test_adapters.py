"""Adapters: what learns, the base under them as a teacher, checkpoints, folders, and quantized weights."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from benchmarks.tiny import make_tiny
from opcd.accel.cpu.attention import use_cpu_attention
from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig, load_model, load_tokenizer
from opcd.modules import BaseTeacher, Distiller, FrozenTeacher, Lora, MovingAverageTeacher, Sampling, StudentRollout
from opcd.modules.lm.adapters import add_lora, merged, trainable, twin, without_adapter
from opcd.modules.student import Student
from opcd.runtime.errors import UserError
from tests.helpers.families import MIXTURES, attention_of, make
from tests.helpers.training import trainer

IDS = torch.tensor([[5, 17, 33, 8, 90]])
FLOAT64 = {"precision": "64-true"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """As wide as a block of 4-bit weights."""
    return str(make_tiny(tmp_path_factory.mktemp("models") / "wide", hidden=64))


@pytest.fixture
def data(rows, context):
    return ContextQueryDataModule(train=str(rows), context=str(context), batch_size=4)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device)).logits.float().cpu()


@pytest.fixture(params=["none", "8bit", "4bit"])
def adapted(request, tiny):
    """A model with an adapter that does something, over weights of every kind."""
    model = load_model(ModelConfig(tiny, dtype="float32", quantization=request.param))
    add_lora(model, Lora(rank=4, head=True))
    return stirred(model)


def stirred(model):
    """The adapter is the identity at first; not after this."""
    generator = torch.Generator().manual_seed(0)
    for weight in trainable(model).values():
        weight.data.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def test_only_the_adapter_learns_and_in_float32(tiny):
    model = load_model(ModelConfig(tiny), torch.bfloat16)
    before = logits(model)
    add_lora(model, Lora(rank=4))
    assert_close(logits(model), before, rtol=0, atol=0)
    assert all("lora_" in name for name in trainable(model))
    assert not any("lm_head" in name for name in trainable(model))
    assert {weight.dtype for weight in trainable(model).values()} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_the_base_is_the_same_memory_without_the_adapter(adapted, tiny):
    base = without_adapter(adapted)
    kind = {"none": "none", "int8": "8bit", "uint8": "4bit"}
    found = {str(p.dtype)[6:] for p in adapted.parameters()}
    quantization = next((kind[name] for name in found if name in kind), "none")
    plain = load_model(ModelConfig(tiny, dtype="float32", quantization=quantization))
    scale = 0.02 if quantization == "4bit" else 0  # frozen 4-bit weights have a kernel of their own on some CPUs
    assert (logits(base) - logits(plain)).abs().max() <= scale * logits(plain).abs().max()
    own = {p.data_ptr() for p in adapted.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in base.parameters()} == own
    assert (logits(adapted) - logits(base)).abs().max() > 0.1  # the adapter is still in the student


def test_a_twin_copies_what_learns_alone(adapted):
    other = twin(adapted)
    stirred(adapted)
    for (name, one), (_, two) in zip(adapted.named_parameters(), other.named_parameters(), strict=True):
        assert (one.data_ptr() == two.data_ptr()) == ("lora_" not in name)


def test_the_merged_model_gives_the_logits_of_the_live_one(adapted, tmp_path):
    live = logits(adapted)
    scale = 0.02 if adapted.config.to_dict().get("quantization_config") else 1e-5  # 8 bit: inputs are rounded too
    assert (logits(merged(adapted, torch.float32)) - live).abs().max() <= scale * live.abs().max()
    assert (logits(adapted) - live).abs().max() <= scale * live.abs().max()  # and leaves it as it was


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_folder_loads_in_plain_transformers(tied, tiny, tmp_path):
    student = Student.load(ModelConfig(tiny, dtype="float32"), adapter=Lora(rank=4, head=tied))
    assert student.model.config.tie_word_embeddings
    live = logits(stirred(student.model))
    student.save(tmp_path / "merged", torch.float32, merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(loaded), live, rtol=1e-3, atol=1e-4)
    assert loaded.config.tie_word_embeddings != tied


def test_an_adapter_folder_loads_by_its_name(tiny, tmp_path):
    student = Student.load(ModelConfig(tiny, dtype="float32"), adapter=Lora(rank=4, head=True))
    live = logits(stirred(student.model))
    student.save(tmp_path / "adapter")
    assert not list(tmp_path.glob("adapter/model*.safetensors"))
    loaded = logits(load_model(ModelConfig(str(tmp_path / "adapter"), dtype="float32")))
    assert_close(loaded, live, rtol=1e-4, atol=1e-4)  # the student's attention is another one
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "/not/here"}')
    with pytest.raises(UserError, match="/not/here, which is not there"):
        load_model(ModelConfig(str(tmp_path / "adapter")))


@pytest.mark.parametrize("setting", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize(("name", "right"), [(r".*\.q_proj", True), (r"(a+)+", False), (r".*\.a*b", False)])
def test_patterns_of_an_adapter_take_no_endless_time(setting, name, right, tiny, tmp_path):
    """What peft writes itself is read, with the parents of a name; no other repetition is."""
    folder = tmp_path / "adapter"
    Student.load(ModelConfig(tiny), adapter=Lora(rank=4)).save(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: {name: 4}}))
    if right:
        load_model(ModelConfig(str(folder)))
    else:
        with pytest.raises(UserError, match=f"{setting} must be"):
            load_model(ModelConfig(str(folder)))


def test_an_adapter_answers_but_is_not_trained_on(tiny, rows, context, tmp_path, opcd):
    folder = tmp_path / "adapter"
    Student.load(ModelConfig(tiny), adapter=Lora(rank=4)).save(folder)
    words = ("--model.student.name", folder, "--trainer.default_root_dir", tmp_path)
    words += ("--model.eval_sampling.max_new_tokens", 2)
    code, output = opcd("fit", *words, "--data.train", rows, "--data.context", context, "--trainer.max_steps", 1)
    assert code == 2 and "is an adapter" in output
    code, output = opcd("predict", *words, "--data.predict", rows, "--data.context", context)
    assert code == 0, output
    assert len((tmp_path / "version_0/predictions.jsonl").read_text().splitlines()) == 8


def distiller(tiny, teacher, **options):
    return Distiller(
        ModelConfig(tiny, **options),
        teacher,
        rollout=StudentRollout(Sampling(4), dtype="float32" if "dtype" in options else "auto"),
        adapter=Lora(rank=4),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
    )


def steps(tmp_path, data, module, count=2, **options):
    torch.manual_seed(0)
    trainer(tmp_path, count, **options).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_a_run_changes_the_adapter_alone(quantization, tiny, data, tmp_path):
    options = {"quantization": quantization, **({"dtype": "float32"} if quantization == "none" else {})}
    module = steps(tmp_path, data, distiller(tiny, BaseTeacher(), **options))
    plain = load_model(ModelConfig(tiny, **options), module.student.model.dtype)  # auto is this machine's
    use_cpu_attention(plain)  # as the student has it
    base, student = logits(module.teacher.model), logits(module.student.model)
    scale = 0.03 if quantization == "4bit" else 0
    assert (base - logits(plain)).abs().max() <= scale * base.abs().max()
    assert (student - base).abs().max() > 1e-3


def test_the_base_teaches_as_a_frozen_copy_does(tiny, data, tmp_path):
    base, frozen = (
        steps(tmp_path, data, distiller(tiny, teacher, dtype="float32"), **FLOAT64)
        for teacher in (BaseTeacher(), FrozenTeacher(ModelConfig(tiny, dtype="float32")))
    )
    for name, weight in trainable(base.student).items():
        assert_close(weight, trainable(frozen.student)[name], rtol=0, atol=1e-3)


def test_a_moving_average_is_of_the_adapter_alone(tiny, data, tmp_path):
    module = steps(tmp_path, data, distiller(tiny, MovingAverageTeacher(0.5), dtype="float32"), count=1)
    learnt, average = trainable(module.student.model), trainable(module.teacher.model)
    name = next(name for name in learnt if "lora_B" in name)
    assert_close(average[name], 0.5 * learnt[name])  # B starts at zero
    frozen = {p.data_ptr() for p in module.student.model.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in module.teacher.model.parameters() if not p.requires_grad} == frozen
    assert module.teacher.state_dict()["model"].keys() == learnt.keys()


def test_a_checkpoint_holds_the_adapter_and_goes_on(tiny, data, tmp_path):
    module = steps(tmp_path, data, distiller(tiny, BaseTeacher(), dtype="float32"))
    state = module.state_dict()
    assert {name.removeprefix("student.model.") for name in state if name.startswith("student.")} == {
        *trainable(module.student.model)
    }
    other = distiller(tiny, BaseTeacher(), dtype="float32")
    other.student = Student.load(ModelConfig(tiny, dtype="float32"), adapter=Lora(rank=4))
    other.load_state_dict(state)
    assert_close(logits(other.student.model), logits(module.student.model))
    state.pop(next(name for name in state if "lora_A" in name))
    with pytest.raises(RuntimeError, match="lora_A"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (Lora(targets=["q_proj", "k_porj"]), "no linear layer 'k_porj'.*did you mean k_proj"),
        (Lora(targets=["lm_head"]), "head: true"),
    ],
)
def test_a_target_that_is_not_there(lora, says, tiny):
    with pytest.raises(UserError, match=says):
        add_lora(load_model(ModelConfig(tiny)), lora)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": []}, {"targets": "q_proj"}]
)
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Lora(**wrong)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.teacher", "BaseTeacher"], "set model.adapter"),
        (["--model.student.quantization", "4bit"], "set model.adapter as well"),
        (["--model.adapter", "{targets: [q_porj]}"], "did you mean q_proj"),
        (["--trainer.callbacks+", "{class_path: opcd.callbacks.ExportStudent, init_args: {merge: true}}"], "merge"),
    ],
)
def test_what_cannot_be_is_refused(words, says, opcd, tiny, rows, context, tmp_path):
    code, output = opcd(
        *("fit", "--model.student.name", tiny, "--data.train", rows, "--data.context", context),
        *("--trainer.max_steps", 1, "--trainer.default_root_dir", tmp_path, *words),
    )
    assert code == 2 and says in output, output


@pytest.mark.case("D2")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_over_an_adapter_is_refused(targets, tiny, rows, context, tmp_path, opcd):
    """Only the second one would be written, over a base without the first."""
    folder = tmp_path / "first"
    Student.load(ModelConfig(tiny), adapter=Lora(rank=4, targets=["q_proj", "v_proj"])).save(folder)
    adapter = Lora(rank=4, targets=targets)
    code, output = opcd(
        *("fit", "--model.student.name", folder, "--data.train", rows, "--data.context", context),
        *("--model.adapter.rank", 4, "--model.adapter.targets", str(targets)),
        *("--trainer.max_steps", 1, "--trainer.default_root_dir", tmp_path),
    )
    assert code == 2 and f"opcd export {folder} --to merged --out FOLDER" in output, output
    with pytest.raises(UserError, match="is an adapter itself"):
        Student.load(ModelConfig(str(folder)), adapter=adapter)


@pytest.mark.case("D3", "D4")
@pytest.mark.parametrize("family", [*MIXTURES, "Jamba", "Bamba"])
def test_an_adapter_on_experts(family, tmp_path):
    """Merged, without it, and both written and read again: what computes is what is written."""
    torch.manual_seed(0)
    made = make(family)
    made.save_pretrained(tmp_path / "base")
    config = ModelConfig(str(tmp_path / "base"), dtype="float32", attention=attention_of(made))
    base = logits(load_model(config))
    model = load_model(config)
    add_lora(model, Lora(rank=4))
    stirred(model)
    live = logits(model)
    model(input_ids=IDS).logits.sum().backward()
    assert [name for name, weight in trainable(model).items() if weight.grad is None] == []
    assert (live - base).abs().max() > 0.1
    assert_close(logits(without_adapter(model)), base, rtol=0, atol=1e-5)
    assert_close(logits(merged(model, torch.float32)), live, rtol=1e-4, atol=1e-4)
    assert_close(logits(model), live, rtol=0, atol=0)  # and is as it was
    student = Student(model, load_tokenizer(ModelConfig()))
    for name, merge in (("adapter", False), ("merged", True)):
        student.save(tmp_path / name, merge=merge)
        again = load_model(ModelConfig(str(tmp_path / name), dtype="float32", attention=config.attention))
        assert_close(logits(again), live, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> str:
    """A folder with fused experts and the packaged tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("experts")
    make("Qwen3Next", vocab_size=49152, max_position_embeddings=512).save_pretrained(folder)
    load_tokenizer(ModelConfig()).save_pretrained(folder)
    return str(folder)


MERGE = "{class_path: opcd.callbacks.ExportStudent, init_args: {merge: true}}"


@pytest.fixture
def lora_run(experts, rows, context, tmp_path, opcd):
    """Run configs/lora.yaml on it, merged at the end."""

    def run():
        return opcd(
            *("fit", "--config", "configs/lora.yaml", "--model.student.name", experts, "--data.train", rows),
            *("--data.context", context, "--data.batch_size", 2, "--model.eval_sampling.max_new_tokens", 4),
            *("--model.rollout", "{class_path: StudentRollout, init_args: {sampling: {max_new_tokens: 4}}}"),
            *("--trainer.max_steps", 1, "--trainer.precision", "32-true", "--model.student.dtype", "float32"),
            *("--model.shared_prefix", "never"),  # recurrent layers share none, and auto warns
            *("--trainer.default_root_dir", tmp_path, "--trainer.callbacks+", MERGE),
        )

    return run


@pytest.mark.case("D3", "D4")
def test_experts_under_lora_yaml_are_merged(lora_run, experts, tmp_path):
    code, output = lora_run()
    assert code == 0, output
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "version_0/student", dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(experts).state_dict()
    assert trained.keys() == base.keys()
    moved = {name for name in base if not torch.equal(base[name], trained[name])}
    assert all(float((trained[name] - base[name]).norm() / base[name].norm()) < 0.5 for name in moved)
    assert {"gate_up_proj", "down_proj", "q_proj"} <= {part for name in moved for part in name.split(".")}


@pytest.mark.case("D3")
@pytest.mark.parametrize("what", ["logits", "names"])
def test_a_merge_that_goes_wrong_leaves_the_adapter(what, lora_run, tmp_path, monkeypatch):
    def wrong(model, dtype):
        found = merged(model, dtype)
        if what == "logits":
            found.model.layers[0].mlp.experts.gate_up_proj.data.zero_()
        else:
            found.model.layers[0].register_parameter("odd", torch.nn.Parameter(torch.zeros(3)))
        return found

    monkeypatch.setattr("opcd.export.merge.merged", wrong)
    code, output = lora_run()
    says = {"logits": "has other logits than the student", "names": "has weights of other names"}
    assert code == 2 and says[what] in output and "holds the adapter instead" in output, output
    assert (tmp_path / "version_0/student/adapter_model.safetensors").is_file()
    assert not (tmp_path / "version_0/student/model.safetensors").exists()


@pytest.mark.case("D3")
@pytest.mark.parametrize(
    ("family", "lora", "says"),
    [
        ("Jamba", Lora(targets=["dt_proj"]), "does not call this layer"),
        ("GPT2", Lora(), "no linear layers to adapt"),
        ("Mamba", Lora(), "peft cannot adapt MambaForCausalLM like this: .*out_proj"),
        ("Qwen3Next", Lora(targets=["gate_proj"]), "peft cannot adapt Qwen3NextForCausalLM like this"),
        ("Qwen3Next", Lora(dropout=0.1), "peft cannot adapt Qwen3NextForCausalLM like this: .*dropout"),
    ],
)
def test_what_peft_cannot_adapt(family, lora, says):
    with pytest.raises(UserError, match=says):
        add_lora(make(family), lora)


def test_merging_into_weights_of_another_quantization_is_refused(tiny):
    model = load_model(ModelConfig(tiny, dtype="float32"))
    add_lora(model, Lora(rank=4))
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UserError, match="that fp8 has quantized"):
        merged(model, torch.float32)
