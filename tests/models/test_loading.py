"""Models: the packaged one, GGUF conversion into the cache, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MambaConfig, MambaForCausalLM

from benchmarks.tiny import make_tiny
from opcd.accel.precision import fast_dtype
from opcd.models import PACKAGED, ModelConfig, context_window, load_model, load_tokenizer, resolve
from opcd.models import gguf_folder as gguf
from opcd.modules.student import Student
from opcd.runtime.errors import UserError


def test_the_packaged_model_answers():
    model, tokenizer = load_model(ModelConfig(), torch.float32), load_tokenizer(ModelConfig())
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=10, do_sample=False)[0])
    assert "Paris" in answer
    assert context_window(ModelConfig()) == 8192
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize(("asked", "found"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(tiny, asked, found):
    assert load_model(ModelConfig(name=tiny, dtype=asked), torch.float32).dtype == found


@pytest.mark.slow
def test_two_processes_convert_once_and_a_damaged_copy_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path))
    code = "from opcd.models import ModelConfig, resolve; print(resolve(ModelConfig()))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=200)[0].splitlines()[-1] for process in both}
    assert len(folders) == 1 and [process.returncode for process in both] == [0, 0]
    folder = gguf.converted(gguf.packaged_file(), "packaged")
    assert str(folder) in folders and gguf._intact(folder)
    weights = folder / "model.safetensors"
    written = weights.read_bytes()
    weights.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    assert not gguf._intact(folder)
    assert resolve(ModelConfig()) == str(folder)
    assert weights.read_bytes() == written
    assert [file.name for file in (tmp_path / "models").iterdir() if file.name.startswith(".conv")] == []


def test_a_file_is_hashed_again_only_when_it_has_changed(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"a")
    first, times = gguf._sha256(file), file.stat()
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert gguf._sha256(file) == first
    time.sleep(0.05)  # longer than the steps of a file system's clock
    file.write_bytes(b"b")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as somebody would who hides the change
    assert gguf._sha256(file) != first


@pytest.mark.case("C24")
def test_a_conversion_is_one_line_and_no_bar(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path))
    folder = gguf.converted(gguf.packaged_file(), "packaged")
    said = capfd.readouterr()
    bars = ("Writing model", "Loading weights")  # transformers' own, which the command switches off
    lines = [line for line in re.split(r"[\r\n]", said.out + said.err) if line and not line.startswith(bars)]
    assert lines == [f"converting {gguf.packaged_file().name} into {folder} (once)"]


def test_scaled_rotary_frequencies_of_a_gguf_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    writer = GGUFWriter(tmp_path / "llama3.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"llama3\.gguf .*rotary frequencies are scaled .*Hugging Face folder"):
        gguf.converted(tmp_path / "llama3.gguf", "model.student")


@pytest.fixture
def small_gguf(tmp_path, monkeypatch):
    """A file with one tensor, and the folder that it is converted into."""
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "small.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_tensor("output.weight", np.ones(2**20, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, tmp_path / "cache" / "models" / f"small-{gguf._sha256(file)[:16]}-{gguf.FORMAT}"


@pytest.mark.case("E6")
def test_no_room_for_a_converted_gguf(small_gguf, monkeypatch):
    file, target = small_gguf

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(gguf, "_read", full)
    needed = r"model\.student: cannot convert .*small\.gguf: no room for .*: it takes 2\.0 MiB, and .* MiB are free"
    with pytest.raises(UserError, match=needed):
        gguf.converted(file, "model.student")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 2**20))
    monkeypatch.setattr(gguf, "_read", None)
    with pytest.raises(UserError, match=needed):
        gguf.converted(file, "model.student")
    assert [entry.name for entry in target.parent.iterdir()] == [f"{target.name}.lock"]


@pytest.mark.case("E1")
def test_files_of_others_in_the_cache_are_kept(small_gguf, monkeypatch):
    file, target = small_gguf
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("years")
    monkeypatch.setattr(gguf, "_read", None)
    with pytest.raises(UserError, match=r"cannot convert .*did not write there \(thesis\.txt\)"):
        gguf.converted(file, "model.student")
    assert (target / "thesis.txt").read_text() == "years"


@pytest.mark.case("A6")
def test_a_planted_lock_of_the_cache_is_not_written_through(small_gguf, tmp_path, monkeypatch):
    file, target = small_gguf
    target.parent.mkdir(parents=True)
    target.with_name(f"{target.name}.lock").symlink_to(tmp_path / "victim")
    monkeypatch.setattr(gguf, "_read", None)
    with pytest.raises(UserError, match="a link, a pipe or a device has its name"):
        gguf.converted(file, "model.student")
    assert not (tmp_path / "victim").exists()


def test_a_file_that_is_no_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"model\.student: cannot convert .*broken\.gguf"):
        resolve(ModelConfig(name=str(file)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/model", "the hub cannot be reached"),
        ("smollm2", f"did you mean {PACKAGED}"),
        ("a/b/c", "no model 'a/b/c'"),
    ],
)
def test_names_that_are_no_model(name, message):
    with pytest.raises(UserError, match=message):
        resolve(ModelConfig(name=name))


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match=r"has neither config\.json"):
        resolve(ModelConfig(name=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        resolve(ModelConfig(name=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"model\.student\.name: cannot load"):
        load_model(ModelConfig(name=str(tmp_path)))


@pytest.fixture
def copied(tiny, tmp_path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "copied"))


def test_weights_that_are_cut_or_missing(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.student\.name: cannot load .*copied"):
        load_model(ModelConfig(name=str(copied)))
    weights.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"cannot load .*copied.*model-00001-of-00002|cannot load"):
        load_model(ModelConfig(name=str(copied)))


def test_pickled_weights_are_taken_only_where_asked(copied):
    weights = load_file(copied / "model.safetensors")
    torch.save(weights, copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.student\.name: cannot load .*safetensors"):
        load_model(ModelConfig(name=str(copied)))
    assert load_model(ModelConfig(name=str(copied), pickled_weights=True)).dtype == fast_dtype()


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_code_from_the_hub_needs_a_commit(revision):
    with pytest.raises(UserError, match=r"set model\.student\.revision to the commit"):
        resolve(ModelConfig(name="org/model", trust_remote_code=True, revision=revision))
    with pytest.raises(UserError, match="the hub cannot be reached"):
        resolve(ModelConfig(name="org/model", trust_remote_code=True, revision="0123456789" * 4))


def mapped() -> int:
    """Bytes of files that lie in this process's memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 2**10


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is mapped")
def test_quantized_weights_do_not_keep_their_file_in_memory(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = make_tiny(tmp_path / "wide", hidden=512)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    config = ModelConfig(name=str(folder), quantization="8bit", dtype="bfloat16")
    load_model(config)  # the libraries
    before = mapped()
    model = load_model(config)
    assert mapped() - before < 3 * 2**20  # its linear layers are 9 MiB there; the embedding has not been read yet
    assert model.get_input_embeddings().weight.abs().sum() > 0  # what is left comes from the file again


def changed(folder: Path, file: str, **fields: object) -> Path:
    """Replace fields of a JSON file."""
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
    return folder


def refused(folder: Path, **fields: object) -> str:
    """What loading a model says."""
    with pytest.raises(UserError) as error:
        load_tokenizer(ModelConfig(name=str(folder), **fields))
        load_model(ModelConfig(name=str(folder), **fields))
    return str(error.value)


@pytest.mark.case("A4")
@pytest.mark.parametrize("kind", ["AutoTokenizer", "AutoModelForCausalLM"])
def test_code_of_a_folder_is_never_asked_for_on_standard_input(copied, kind, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (copied / "evil.py").write_text("raise SystemExit('ran')")
    reference = {kind: ["evil.Evil", None] if kind == "AutoTokenizer" else "evil.Evil", "AutoConfig": "evil.Evil"}
    if kind == "AutoTokenizer":
        changed(copied, "tokenizer_config.json", auto_map=reference, tokenizer_class="Evil")
        with suppress(UserError):  # tokenizer.json may be enough
            load_tokenizer(ModelConfig(name=str(copied)))
    else:
        changed(copied, "config.json", auto_map=reference, model_type="evil")
        said = refused(copied)
        assert "model.student.trust_remote_code: true" in said and "not run" in said


@pytest.mark.case("A4")
def test_of_a_gguf_nothing_beside_it_is_read(tiny, tmp_path, monkeypatch, opcd):
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert opcd("export", tiny, "--to", "gguf", "--out", tmp_path / "model.gguf")[0] == 0
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    reference = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": reference}))
    (tmp_path / "config.json").write_text("[]")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/other"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    config = ModelConfig(name=str(tmp_path / "model.gguf"))
    assert load_tokenizer(config).chat_template and load_model(config).config.hidden_size == 32


@pytest.mark.case("A9")
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 99_999, '{"a":' * 900 + "1" + "}" * 900, '{"a"', ""])
def test_a_file_of_a_model_that_is_no_object(copied, file, text):
    (copied / file).write_text(text)
    said = refused(copied)
    assert said.startswith(f"model.student.name: {copied / file}") and "\n" not in said


@pytest.mark.case("A9")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_hidden_layers", value) for value in (10**12, 5000, 0, -1, "2", [2], 2.5)),
        *(("hidden_size", value) for value in (10**12, 10**7, "32", True)),
        *(("vocab_size", value) for value in (10**9, [])),
        *(("intermediate_size", value) for value in (10**12, "x")),
        *(("num_attention_heads", value) for value in (10**9, "x", {})),
        ("eos_token_id", "x"),
        ("pad_token_id", 1.5),
    ],
)
def test_a_field_of_a_model_that_no_model_has(copied, field, value):
    said = refused(changed(copied, "config.json", **{field: value}))
    assert field in said or ("config.json" in said and "larger model" in said), said


@pytest.mark.case("A9")
def test_a_model_is_built_no_further_than_its_weights_go(copied, monkeypatch):
    built = []
    linear = torch.nn.Linear.__init__
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda self, *a, **k: built.append(1) or linear(self, *a, **k))
    assert "config.json" in refused(changed(copied, "config.json", num_hidden_layers=9000))
    assert len(built) < 9000


@pytest.mark.case("A9")
def test_weights_that_lie_outside_of_the_folder(copied, tmp_path):
    (copied / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map" in refused(copied)


@pytest.mark.case("A9")
def test_weights_that_a_file_does_not_have_are_not_drawn_at_random(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert "lacks weights of the model that it describes: model.layers.1.mlp.up_proj.weight" in refused(copied)


@pytest.mark.case("A10")
@pytest.mark.parametrize("at", [8, 16])
def test_a_gguf_that_announces_more_than_it_holds(tmp_path, monkeypatch, at):
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    writer = GGUFWriter(tmp_path / "short.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    data = bytearray((tmp_path / "short.gguf").read_bytes())
    data[at : at + 8] = (2**60).to_bytes(8, "little")
    (tmp_path / "short.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.student: cannot convert .*short\.gguf"):
        resolve(ModelConfig(name=str(tmp_path / "short.gguf")))
    place = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8  # the array's length
    data[8:24] = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    data[place : place + 8] = (2**60).to_bytes(8, "little")
    (tmp_path / "array.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"array\.gguf .* ends within"):
        resolve(ModelConfig(name=str(tmp_path / "array.gguf")))


@pytest.mark.case("B7")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(copied, value):
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = value
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert "the weights hold NaN or infinity: model.layers.1.input_layernorm.weight" in refused(copied)


@pytest.mark.case("B10", "D17")
def test_a_model_without_sdpa_gets_the_attention_that_it_has(tmp_path, capsys):
    sizes = {"vocab_size": 49152, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
    MambaForCausalLM(MambaConfig(**sizes, state_size=8, pad_token_id=2)).save_pretrained(tmp_path)
    load_tokenizer(ModelConfig()).save_pretrained(tmp_path)
    for _ in range(2):
        load_model(ModelConfig(name=str(tmp_path)))
    said = [line for line in capsys.readouterr().err.splitlines() if "attention" in line]
    assert said == ["model.student.attention: MambaForCausalLM has no sdpa in transformers; eager is taken"]


@pytest.mark.case("D7")
def test_a_folder_that_is_quantized_already(copied, rows, context, opcd, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantized = AutoModelForCausalLM.from_pretrained(
        copied, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    quantized.save_pretrained(copied)
    config = ModelConfig(name=str(copied), dtype="float32")
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(load_model(config)(input_ids=ids).logits, quantized(input_ids=ids).logits)
    assert "quantized already (bitsandbytes)" in refused(copied, quantization="8bit")
    words = ("--model.student.name", copied, "--data.train", rows, "--data.context", context)
    code, said = opcd("fit", *words, "--trainer.default_root_dir", tmp_path / "runs", "--trainer.max_steps", 1)
    assert code == 2 and "quantized weights cannot be trained; set model.adapter" in said


@pytest.mark.case("D29")
def test_messages_name_the_remedy(copied, monkeypatch, tmp_path):
    weights = load_file(copied / "model.safetensors")
    torch.save(weights, copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    assert "model.student.pickled_weights: true" in refused(copied)
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert "model.student.tokenizer" in refused(copied)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="OPCD_CACHE"):
        resolve(ModelConfig())


@pytest.mark.case("A1")
def test_an_adapter_does_not_choose_whose_code_runs(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/model"}))
    with pytest.raises(UserError, match="whose code no commit pins"):
        load_model(ModelConfig(name=str(tmp_path), trust_remote_code=True))


TEXT = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
IMAGES = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 14}


@pytest.mark.case("D18")
def test_of_a_model_of_text_and_images_the_text_part_is_loaded_and_saved(tmp_path):
    pixtral = IMAGES | {"model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT).to_dict(), vision_config=pixtral
    )
    whole = transformers.Mistral3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    load_tokenizer(ModelConfig()).save_pretrained(tmp_path / "whole")
    loaded = Student.load(ModelConfig(name=str(tmp_path / "whole"), dtype="float32"))
    loaded.save(tmp_path / "text")
    again = load_model(ModelConfig(name=str(tmp_path / "text"), dtype="float32"))
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        assert torch.allclose(loaded.model.eval()(input_ids=ids).logits, expected, atol=1e-5)
        assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)


@pytest.mark.case("D18")
def test_a_text_part_that_transformers_has_no_model_for_is_refused(tmp_path):
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = transformers.Qwen3VLTextConfig(**TEXT, rope_parameters=rope).to_dict()
    vision = IMAGES | {"depth": 1, "num_heads": 4, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    transformers.Qwen3VLConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a qwen3_vl, .* or its text part \(qwen3_vl_text\)"):
        load_model(ModelConfig(name=str(tmp_path)))


@pytest.mark.case("D18")
def test_llama_4_names_its_text_part_otherwise(tmp_path):
    config = transformers.Llama4TextConfig(**TEXT, intermediate_size_mlp=64, num_local_experts=2)
    model = transformers.Llama4ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    load_tokenizer(ModelConfig()).save_pretrained(tmp_path)
    loaded = Student.load(ModelConfig(name=str(tmp_path), dtype="float32")).model.eval()
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
