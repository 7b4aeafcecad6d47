"""Models: the packaged one, GGUF conversion into the cache, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.tiny import make_tiny
from opcd import gguf
from opcd.errors import UserError
from opcd.models import PACKAGED, ModelConfig, context_window, load_model, load_tokenizer, resolve


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


@pytest.mark.case("C24")
def test_a_conversion_is_one_line_and_no_bar(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path))
    folder = gguf.converted(gguf.packaged_file(), "packaged")
    said = capfd.readouterr()
    lines = [line for line in re.split(r"[\r\n]", said.out + said.err) if line and not line.startswith("Writing model")]
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
    assert load_model(ModelConfig(name=str(copied), pickled_weights=True)).dtype == torch.bfloat16


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
