"""`opcd export`: what is written is what was trained, also in GGUF; what cannot be is refused before weights load."""

import base64
import errno
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
import torch
import yaml
from huggingface_hub import constants
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from opcd.cli import export as command
from opcd.cli import main as cli
from opcd.export import gguf_writer as gguf_file
from opcd.export.export_check import prompt_ids
from opcd.export.gguf_writer import splitting_rule
from opcd.export.source import Trust, find_source
from opcd.models import PACKAGED, ModelConfig, load_model
from opcd.models.model_card import FACTS
from opcd.modules.lm.adapters import Lora, trainable
from opcd.modules.student import Student
from opcd.runtime.errors import UserError
from tests.helpers.rows import CONTEXT, ROWS, write_rows

IDS = torch.tensor([[5, 17, 33, 8, 90, 300, 120, 7]])
TOKENS, ROWS_OF_EMBEDDING = 320, 336
SHAPE = {
    "vocab_size": ROWS_OF_EMBEDDING,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "bfloat16",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
QWEN2 = WORDS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split by a pattern, then spell bytes."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


GPT2, LLAMA = pre_tokenizers.ByteLevel(False), split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"))


def make_tokenizer(rule=GPT2, ignore_merges=False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens with ChatML, and one added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = rule, decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(vocab_size=TOKENS - 1, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([CONTEXT, Path(__file__).read_text()], trainer)
    backend.model.ignore_merges = ignore_merges
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(folder: Path, config, tokenizer=None) -> Path:
    """A model of random weights, its norms and biases too, for their places count."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(config.dtype)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The folder that both runs began with."""
    return str(make_model(tmp_path_factory.mktemp("models") / "base", LlamaConfig(**SHAPE, tie_word_embeddings=True)))


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> Path:
    """Two runs of two steps: version_0 trained all weights, version_1 an adapter."""
    folder = tmp_path_factory.mktemp("runs")
    context = folder / "context.txt"
    context.write_text(CONTEXT)
    words = [
        *("fit", "--model.student.name", base, "--data.train", str(write_rows(folder / "rows.jsonl", ROWS))),
        *("--data.context", str(context), "--trainer.default_root_dir", str(folder), "--trainer.max_steps", "2"),
        *("--model.rollout.init_args.sampling.max_new_tokens", "4", "--model.eval_sampling.max_new_tokens", "2"),
        *("--model.optimizer.class_path", "torch.optim.SGD", "--model.optimizer.init_args.lr", "1.0"),
        *("--model.gradient_clip_val", "null", "--seed_everything", "0"),  # else that of the test before
    ]
    assert cli.main(words) == 0
    adapter = ("--model.adapter", "{rank: 4, head: true}", "--model.teacher", "BaseTeacher")
    assert cli.main([*words, *adapter]) == 0
    return folder


@pytest.fixture
def from_checkpoint(runs, tmp_path) -> Path:
    """A copy of the runs that have left checkpoints alone."""
    copy = Path(shutil.copytree(runs, tmp_path / "runs"))
    for version in ("version_0", "version_1"):
        shutil.rmtree(copy / version / "student")
    return copy


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights is a failure."""
    monkeypatch.setattr(command.Source, "load", lambda _: pytest.fail("weights were loaded"))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def from_gguf(file: Path):
    """As plain transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def test_a_folder_for_transformers(opcd, runs, tmp_path):
    code, text = opcd("export", runs / "version_0", "--to", "hf", "--out", tmp_path / "deep" / "copy")
    assert code == 0 and "loaded again: logits at most 0 from" in text and "the same greedy answer" in text, text
    source, copy = runs / "version_0/student", tmp_path / "deep/copy"
    exported = load_file(copy / "model.safetensors")
    assert {name: weight.dtype for name, weight in exported.items()} == dict.fromkeys(exported, torch.bfloat16)
    for name, weight in load_file(source / "model.safetensors").items():
        assert torch.equal(exported[name], weight)
    assert AutoTokenizer.from_pretrained(copy).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert json.loads((copy / FACTS).read_text()) == json.loads((source / FACTS).read_text())
    card = (copy / "README.md").read_text()
    assert "| loss | ReverseKL() |" in card and "| steps | 2 |" in card and "context.txt |" in card
    assert re.search(r"\| context \(sha256\) \| [0-9a-f]{64} \|", card) and CONTEXT not in card
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_run_that_has_left_a_checkpoint_alone(opcd, runs, from_checkpoint, tmp_path):
    for version in ("version_0", "version_1"):
        code, text = opcd("export", from_checkpoint / version, "--to", "hf", "--out", tmp_path / version)
        assert code == 0, text
        for file in runs.glob(f"{version}/student/*.safetensors"):
            written = load_file(tmp_path / version / file.name)
            for name, weight in load_file(file).items():
                assert torch.equal(written[name], weight)
        assert json.loads((tmp_path / version / FACTS).read_text()) == json.loads(
            (runs / version / "student" / FACTS).read_text()
        )


@pytest.mark.parametrize("dtype", ["float32", None])
def test_an_adapter_in_the_weights(dtype, opcd, runs, tmp_path):
    options = ("--dtype", dtype) if dtype else ()
    code, text = opcd("export", runs / "version_1", "--to", "merged", "--out", tmp_path / "merged", *options)
    assert code == 0 and "merged: logits" in text, text
    live = logits(load_model(ModelConfig(str(runs / "version_1/student"), "float32")))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert exported.dtype == (torch.float32 if dtype else torch.bfloat16)
    assert (logits(exported.float()) - live).norm() < (1e-4 if dtype else 0.05) * live.norm()
    assert not (tmp_path / "merged/adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(json.loads((tmp_path / "merged" / FACTS).read_text())["base"])
    assert (logits(base.float()) - live).abs().max() > 0.1 * live.abs().max()  # the adapter does something


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_an_adapter_is_merged_into_the_weights_that_it_was_trained_over(quantization, opcd, tmp_path):
    base = make_model(tmp_path / "base", LlamaConfig(**SHAPE | {"hidden_size": 64}))
    config = ModelConfig(str(base), quantization=quantization)
    student = Student.load(replace(config, dtype="float32"), adapter=Lora(rank=4))
    for weight in trainable(student.model).values():
        torch.nn.init.normal_(weight, std=0.1)
    student.save(tmp_path / "run" / "student")
    plain = {"model": {"student": asdict(config), "adapter": asdict(Lora(rank=4))}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(plain))
    code, text = opcd("export", tmp_path / "run", "--to", "merged", "--out", tmp_path / "merged", "--dtype", "float32")
    assert code == 0, text
    layer = student.model.model.layers[0].mlp.up_proj
    weight = dequantize_module_weight(layer.base_layer).float() + layer.get_delta_weight("default")
    assert_close(load_file(tmp_path / "merged/model.safetensors")["model.layers.0.mlp.up_proj.weight"], weight)
    if quantization == "4bit":
        live = logits(student.model)
        exported = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        assert (exported - live).abs().max() < 1e-4 * live.abs().max()
    code, text = opcd("export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "copy")
    assert code == 0 and "loaded again: logits at most 0 from" in text, text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gguf_file_of_an_adapter_run(dtype, opcd, runs, from_checkpoint, tmp_path):
    out = tmp_path / "student.gguf"
    code, text = opcd("export", from_checkpoint / "version_1", "--to", "gguf", "--out", out, "--dtype", dtype)
    assert code == 0, text
    live = logits(load_model(ModelConfig(str(runs / "version_1/student"), "float32")))
    within = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}[dtype]
    assert (logits(from_gguf(out)) - live).norm() < within * live.norm()
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert kinds == {"F32", {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]}
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(out).tensors}  # the adapted head is untied


@pytest.mark.parametrize(
    ("config", "rule", "ignore_merges", "pre"),
    [
        (LlamaConfig(**SHAPE, tie_word_embeddings=False), GPT2, False, "gpt-2"),
        (LlamaConfig(**SHAPE, rope_parameters=LLAMA3), LLAMA, True, "llama-bpe"),
        (Qwen2Config(**SHAPE, tie_word_embeddings=True), split(QWEN2), False, "qwen2"),
        (Qwen3Config(**SHAPE, head_dim=128), split(QWEN2), False, "qwen2"),
    ],
    ids=["llama", "llama3", "qwen2", "qwen3"],
)
def test_architectures_that_gguf_has(config, rule, ignore_merges, pre, opcd, tmp_path):
    folder = make_model(tmp_path / "model", config, make_tokenizer(rule, ignore_merges))
    code, text = opcd("export", folder, "--to", "gguf", "--out", tmp_path / "student.gguf")
    assert code == 0, text
    source, tokenizer = AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)
    read, reader = from_gguf(tmp_path / "student.gguf"), gguf.GGUFReader(tmp_path / "student.gguf")
    if pre == "llama-bpe":
        factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
        assert factors.max() == pytest.approx(8) and factors.min() == 1
        assert (logits(read) - logits(source)).abs().max() > 0.01  # transformers leaves them out
        read.model.rotary_emb.inv_freq /= torch.tensor(factors)
    assert_close(logits(read), logits(source), rtol=1e-4, atol=1e-4)
    ids = prompt_ids(tokenizer)[None]
    assert torch.equal(*(model.generate(ids, max_new_tokens=8, do_sample=False) for model in (read, source)))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.pre"] == pre and fields["tokenizer.chat_template"] == TEMPLATE
    assert fields["tokenizer.ggml.eos_token_id"] == 1 and fields["tokenizer.ggml.add_bos_token"] is False
    kinds, types = gguf.TokenType, fields["tokenizer.ggml.token_type"]
    assert types[:3] == [kinds.CONTROL, kinds.CONTROL, kinds.NORMAL] and types[TOKENS - 1] == kinds.USER_DEFINED
    assert types[len(tokenizer) :] == [kinds.UNUSED] * (ROWS_OF_EMBEDDING - len(tokenizer))
    assert len(fields["tokenizer.ggml.tokens"]) == ROWS_OF_EMBEDDING
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


@pytest.mark.parametrize(
    ("rule", "ignore_merges", "name"),
    [
        (GPT2, False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2]), False, "smollm"),
        (split(QWEN2), False, "qwen2"),
        (LLAMA, True, "llama-bpe"),
        (LLAMA, False, None),
        (split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,2}|")), False, None),
        (split(QWEN2.replace(r"?\p{L}+|", r"?[\p{L}\p{M}]+|")), False, None),
        (pre_tokenizers.ByteLevel(True), False, None),
        (pre_tokenizers.Metaspace(), False, None),
    ],
)
def test_how_text_is_split_has_a_name(rule, ignore_merges, name):
    tokenizer = make_tokenizer(rule, ignore_merges)
    if name is not None:
        assert splitting_rule(tokenizer) == name
        return
    with pytest.raises(UserError, match="a rule that has no name here"):
        splitting_rule(tokenizer)


def test_a_wrong_copy_is_refused_and_leaves_nothing(opcd, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "_neighbours", lambda weight, heads: weight)
    code, text = opcd("export", runs / "version_0", "--to", "gguf", "--out", tmp_path / "out" / "student.gguf")
    assert code == 2 and "what was written has other logits than the student" in text
    save = Student.save

    def damaged(self, *args, **kwargs):
        self.model.model.norm.weight.data[0] *= 1.1
        save(self, *args, **kwargs)

    monkeypatch.setattr(Student, "save", damaged)
    code, text = opcd("export", runs / "version_0", "--to", "hf", "--out", tmp_path / "out" / "copy")
    assert code == 2 and "what was written has other logits than the student" in text
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_that_float16_cannot_hold(opcd, tmp_path):
    folder = make_model(tmp_path / "model", LlamaConfig(**SHAPE))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(folder)
    code, text = opcd("export", folder, "--to", "gguf", "--out", tmp_path / "a.gguf", "--dtype", "float16")
    assert code == 2 and "choose --dtype bfloat16" in text and not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("RUNS/version_2 --to hf --out OUT", "did you mean .*version_"),
        ("RUNS --to hf --out OUT", "is no run of `opcd fit`"),
        ("RUNS/version_0 --to hf", "wants --out"),
        ("RUNS/version_0 --to hf --out OUT --dtype float32", "--dtype has no effect"),
        ("RUNS/version_0 --to merged --out OUT", "no adapter to merge; --to hf"),
        ("RUNS/version_0 --to gguf --out OUT", r"must end in \.gguf"),
        ("RUNS/version_0 --to hf --out RUNS", "is there already"),
        ("RUNS/version_0 --to gguf --out OUT.gguf --repo a/b", "are for --to hub"),
        ("RUNS/version_0 --to hf --out OUT --private", "are for --to hub"),
        ("RUNS/version_0 --to hub", "wants --repo"),
        ("RUNS/version_0 --to hub --repo a/b --out OUT", "--out has no effect"),
        ("RUNS/version_0 --to hub --repo b", "wants ORG/NAME, got 'b'"),
        ("RUNS/version_0 --to hub --repo a/b", "set HF_TOKEN in the environment"),
        ("RUNS/version_1 --to hub --repo a/b", "which nobody else has; export --to merged"),
    ],
)
def test_what_is_refused_before_weights_load(words, says, opcd, runs, tmp_path, monkeypatch, no_weights):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    full = words.replace("RUNS", str(runs)).replace("OUT", str(tmp_path / "out")).split()
    code, text = opcd("export", *full)
    assert code == 2 and re.search(says, text) and text.count("\n") == 1, text
    assert list(tmp_path.iterdir()) == []


def test_runs_and_models_that_cannot_be_exported(opcd, from_checkpoint, tmp_path, no_weights):
    run = from_checkpoint / "version_0"
    checkpoint = next(run.glob("checkpoints/*.ckpt"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    code, text = opcd("export", run, "--to", "hf", "--out", tmp_path / "out")
    assert code == 2 and "no checkpoint under" in text and "is complete" in text
    shutil.rmtree(run / "checkpoints")
    code, text = opcd("export", run, "--to", "hf", "--out", tmp_path / "out")
    assert code == 2 and "has neither student/ nor a checkpoint" in text
    for config, says in (
        (MistralConfig(**SHAPE), "not the architecture mistral"),
        (LlamaConfig(**SHAPE, attention_bias=True), "attention_bias"),
        (Qwen2Config(**SHAPE, rope_parameters={**LLAMA3, "rope_type": "yarn"}), "type yarn"),
    ):
        code, text = opcd(
            "export", make_model(tmp_path / config.model_type, config), "--to", "gguf", "--out", tmp_path / "a.gguf"
        )
        assert code == 2 and says in text and "convert_hf_to_gguf.py" in text, text


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push asks for."""

    files: dict[str, bytes]
    there: dict[str, object] | None = None

    def do_GET(self) -> None:
        """Who asks, and what there is."""
        if self.headers["Authorization"] != "Bearer right":
            return self.answer(401, {"error": "Invalid token"})
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user"})
        return self.answer(200, self.there) if self.there else self.answer(404, {}, code="RepoNotFound")

    def do_POST(self) -> None:
        """Make a repository, say how files come, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        url = f"http://{self.headers['Host']}/me/student"
        if self.path.endswith("/repos/create"):
            type(self).created = json.loads(body)
            self.answer(200, {"url": url})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer(200, {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": f"{url}/commit/0", "commitOid": "0" * 40, "success": True})
        else:
            self.answer(200, {})

    def answer(self, status: int, value: object, code: str = "") -> None:
        """One JSON answer."""
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.mark.case("E6")
@pytest.mark.parametrize(("to", "version"), [("gguf", 0), ("merged", 1), ("hf", 0)])
def test_no_room_is_told_before_it_is_written(to, version, opcd, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 2**10))
    out = tmp_path / "new" / ("student.gguf" if to == "gguf" else "student")
    code, text = opcd("export", runs / f"version_{version}", "--to", to, "--out", out)
    assert code == 2 and "no room for" in text, text
    assert re.search(r"it takes 0\.\d MiB, and 0\.0 MiB are free", text)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.case("E6")
@pytest.mark.parametrize(("to", "writer"), [("gguf", "write_gguf"), ("hf", "Student.save")])
def test_a_disk_that_fills_while_it_is_written(to, writer, opcd, runs, tmp_path, monkeypatch):
    def full(*args, **_):
        if to == "hf":
            Path(args[1]).mkdir()
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"opcd.cli.export.{writer}", full)
    code, text = opcd("export", runs / "version_0", "--to", to, "--out", tmp_path / "student.gguf")
    assert code == 2 and re.search(r"no room for .*: it takes .* MiB, and .* MiB are free; free some room", text), text
    assert not list(tmp_path.iterdir())


@pytest.mark.case("E7")
def test_a_place_that_cannot_be_written_is_told_before_weights_load(opcd, runs, tmp_path, no_weights):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "student.gguf", "/proc/student.gguf"):
        code, text = opcd("export", runs / "version_0", "--to", "gguf", "--out", out)
        assert code == 2 and "--out: cannot write" in text, text
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    """A hub of this machine's, empty."""
    handler = type("EmptyHub", (Hub,), {"files": {}, "there": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "right")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_push_to_the_hub(opcd, runs, base, hub, tmp_path):
    code, text = opcd("export", runs / "version_0", "--to", "hub", "--repo", "me/student", "--private")
    assert code == 0 and "pushed: " in text, text
    assert hub.created == {"name": "student", "organization": "me", "visibility": "private"}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
        assert str(runs).encode() not in content and base.encode() not in content, name
    source = AutoModelForCausalLM.from_pretrained(runs / "version_0/student")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(source))
    card = (tmp_path / "README.md").read_text()
    assert "| context | context.txt |" in card and "| base | base |" in card and "base_model:" not in card


@pytest.mark.parametrize(
    ("there", "token", "says"),
    [
        ({"private": True, "siblings": [{"rfilename": "model.safetensors"}]}, "right", "holds files already"),
        ({"private": False, "siblings": [{"rfilename": ".gitattributes"}]}, "right", "is there and public"),
        (None, "wrong", "refuses me/student"),
    ],
)
def test_a_hub_that_does_not_take_it(there, token, says, opcd, runs, hub, monkeypatch, no_weights):
    hub.there = there and {"id": "me/student", "tags": [], **there}
    monkeypatch.setenv("HF_TOKEN", token)
    code, text = opcd("export", runs / "version_0", "--to", "hub", "--repo", "me/student", "--private")
    assert code == 2 and says in text and text.count("\n") == 1, text
    assert hub.files == {} and token not in text.replace("wrong", "", 0 if token == "right" else 1).split()


def test_a_hub_that_is_not_there(opcd, runs, monkeypatch, no_weights):
    monkeypatch.setenv("HF_TOKEN", "right")
    code, text = opcd("export", runs / "version_0", "--to", "hub", "--repo", "me/student")
    assert code == 2 and "cannot be reached" in text and text.count("\n") == 1


def test_the_packaged_model_goes_by_its_name():
    source = find_source(Path(PACKAGED), Trust())
    assert not source.adapted and (Path(source.base) / "config.json").is_file()
