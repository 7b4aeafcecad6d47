"""A drill of foreign folders and files with planted faults: runs, models, adapters, checkpoints, GGUF.

A command opens each, with "y" on standard input for possible questions. It must succeed or fail as the case says (exit
code 0 or 2, with the words of the case), in seconds and without a traceback. No planted code may run, and no file may
appear or change.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.drills.fits import Outcome
from opcd.checkpoints.checkpoint_files import write_checkpoint
from opcd.cli.main import main

SECONDS = 40
"""Time limit of a command, in CPU seconds."""
LARGE = 10**12
ODD: tuple[Any, ...] = ([], None, "x", -1, 0, LARGE, 1e308, True, {}, {"a": [[[]]]}, [1, "a"], "../..", "\0", 2**70)
"""Values that are wrong for every field of a model's files."""


class Planted(NamedTuple):
    """A fault in a copy of a good folder, and the correct reaction."""

    kind: str
    what: str
    plant: Callable[[Path], Path]
    """Changes the copy, and returns the path to open."""
    codes: tuple[int, ...] = (2,)
    words: str = ""
    """Words of the message."""
    command: str = "chat"


class Payload:
    """A pickle that writes a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({os.environ['OPCD_DRILL_CANARY']!r}, 'w').write('a pickle')",))


def hostile(runs: int, folder: Path) -> Outcome:
    """Check that no folder runs code, writes to other places, or causes a traceback."""
    folder.mkdir(parents=True, exist_ok=True)
    canary = (folder / "canary").resolve()
    good = _good(folder / "good")
    with mock.patch.dict(os.environ, OPCD_DRILL_CANARY=str(canary), OPCD_CACHE=str(folder / "cache")):
        outcome, table = Outcome(), Table("in", "planted", "code", "what was said")
        for number, case in enumerate([*planted(good), *at_random(good, runs)]):
            copy = folder / str(number)
            shutil.copytree(good[case.kind], copy, symlinks=True)
            problem, code, said = _judge(case, copy, canary)
            outcome.add(problem and f"{case.kind}: {case.what}: {problem}")
            table.add_row(case.kind, Text(case.what), str(code), Text(said[-150:]))
            shutil.rmtree(copy)
        Console(width=160, file=sys.stderr).print(table)
    return outcome


def _good(folder: Path) -> dict[str, Path]:
    """Create a good folder of each kind."""
    model = _model(folder / "model")
    kinds = {name: folder / name for name in ("model", "adapter", "run", "checkpoint", "gguf")}
    with warnings.catch_warnings():  # peft reads an attribute that transformers renames
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=["q_proj"])
        )
    adapted.save_pretrained(str(kinds["adapter"]))
    for file in [*model.glob("tokenizer*"), *model.glob("chat_template*")]:
        shutil.copy(file, kinds["adapter"])
    shutil.copytree(model, kinds["run"] / "student")
    config = {"model": {"student": {"name": str(model)}, "adapter": None}, "data": {"placement": "system"}}
    (kinds["run"] / "config.yaml").write_text(json.dumps(config))
    kinds["checkpoint"].mkdir()
    (kinds["checkpoint"] / "config.yaml").write_text(json.dumps(config))
    weights = {f"student.model.{name}": value for name, value in load_file(model / "model.safetensors").items()}
    weights["student.model.lm_head.weight"] = weights["student.model.model.embed_tokens.weight"]
    state = {"global_step": 1, "config": config, "state_dict": weights, "facts": {"base": str(model)}}
    write_checkpoint(state, kinds["checkpoint"] / "checkpoints" / "step=1.ckpt")
    kinds["gguf"].mkdir()
    code, said = _run(["export", str(model), "--to", "gguf", "--out", str(kinds["gguf"] / "model.gguf")])
    assert code == 0, said
    return kinds


def _model(folder: Path) -> Path:
    """Create a Llama with random weights and a byte-level BPE of 300 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([str(__doc__)] * 9, trainer)
    ends = dict.fromkeys(("eos_token", "pad_token"), "<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", **ends)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def planted(good: dict[str, Path]) -> Iterator[Planted]:
    """All cases that were written by hand."""
    yield from _nothing(good)
    yield from _runs(good)
    yield from _models()
    yield from _adapters(good)
    yield from _checkpoints()
    yield from _ggufs()


def _nothing(good: dict[str, Path]) -> Iterator[Planted]:
    for kind in good:
        opened = "model.gguf" if kind == "gguf" else "."
        command = "export" if kind in ("run", "checkpoint") else "chat"
        yield Planted(kind, "nothing", lambda copy, name=opened: copy / name, (0,), command=command)  # type: ignore[misc]


def _runs(good: dict[str, Path]) -> Iterator[Planted]:
    def config(code: bool = True, **student: Any) -> Callable[[Path], Path]:
        def plant(copy: Path) -> Path:
            values = {"model": {"student": {"name": str(copy / "student")} | student}, "data": {"placement": "system"}}
            (copy / "config.yaml").write_text(json.dumps(values))
            return needs_code(copy / "student") and copy if code else copy

        return plant

    def text(value: str) -> Callable[[Path], Path]:
        return lambda copy: _write(copy / "config.yaml", value, copy)

    for command in ("chat", "export"):
        yield Planted("run", "code, asked for", config(trust_remote_code=True), (2,), "--trust_remote_code", command)
        yield Planted("run", "code, not asked for", config(), (2,), "--trust_remote_code", command)
        yield Planted("run", "pickles, asked for", config(pickled_weights=True), (2,), "--pickled_weights", command)
        yield Planted("run", "a kernel of the hub", config(attention="org/kernel"), (2,), "attention", command)
        yield Planted("run", "a type that is none", config(dtype="load"), (2,), "dtype", command)
        yield Planted("run", "a switch that is a text", config(trust_remote_code="yes"), (2,), "config", command)
        for name, value in (
            ("a list", "[]"),
            ("null", "null"),
            ("a student that is a file", '{model: {student: "x"}}'),
        ):
            yield Planted("run", f"a config that is {name}", text(value), (2,), "config", command)
        yield Planted("run", "a context's place that is none", text(_placed(good, [1])), (0, 2), "", command)
        endless = config(False, chat_template="/dev/zero")
        yield Planted("run", "a template without end", endless, (0, 2), "/dev/zero", command)


def _placed(good: dict[str, Path], placement: object) -> str:
    return json.dumps({"model": {"student": {"name": str(good["model"])}}, "data": {"placement": placement}})


def _models() -> Iterator[Planted]:
    yield Planted("model", "code that it needs", needs_code, (2,), "--trust_remote_code")
    yield Planted("model", "code of a tokenizer", _tokenizer_code, (0, 2))
    yield Planted("model", "code for generation", _generation_code, (0,))
    yield Planted("model", "pickled weights", _pickled, (2,), "--pickled_weights")
    norm = "model.norm.weight"
    yield Planted("model", "NaN in a norm", _weights(lambda weights: weights[norm][3].fill_(torch.nan)), (2,), norm)
    yield Planted("model", "a weight left out", _weights(lambda weights: weights.pop(norm)), (2,), norm)
    yield Planted("model", "a pipe", _pipe, (2,), "config.json")
    yield Planted("model", "a file without end", _endless, (2,), "tokenizer.json")
    yield Planted("model", "weights elsewhere", _elsewhere, (2,), "weight_map")
    files = ("config.json", "generation_config.json", "tokenizer_config.json")
    texts = {"a list": "[]", "null": "null", "deep": "[" * 99_999, "cut": '{"a"', "no UTF-8": "\udcff", "empty": ""}
    texts["objects, deep"] = '{"a":' * 900 + "1" + "}" * 900
    for file in files:
        for name, value in texts.items():
            yield Planted("model", f"{file}: {name}", _text(file, value), (2,), file)
    for name, value in (("a list", "[]"), ("null", "null"), ("an object", "{}"), ("deep", "[" * 99_999)):
        yield Planted("model", f"tokenizer.json: {name}", _text("tokenizer.json", value), (0, 2))
    for field in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads"):
        for value in (LARGE, 5000, 0, -1, "2", [], 2.5):
            yield Planted("model", f"config.json: {field}: {value}", _field("config.json", field, value))
    for field, value in (
        ("eos_token_id", "x"),
        ("eos_token_id", [[1]]),
        ("pad_token_id", {"a": 1}),
        ("eos_token_id", 1.5),
    ):
        for file in ("config.json", "generation_config.json"):
            yield Planted("model", f"{file}: {field}: {value}", _field(file, field, value), (2,), field)
    yield Planted("model", "a template that is a number", _field("tokenizer_config.json", "chat_template", 5), (2,))
    yield Planted("model", "a length that is an object", _field("tokenizer_config.json", "model_max_length", {}), (2,))


def _adapters(good: dict[str, Path]) -> Iterator[Planted]:
    def setting(name: str, value: Any) -> Callable[[Path], Path]:
        return _field("adapter_config.json", name, value)

    def pickled(copy: Path) -> Path:
        torch.save({"a": Payload()}, copy / "adapter_model.bin")
        (copy / "adapter_model.safetensors").unlink()
        return copy

    def over_code(copy: Path) -> Path:
        base = shutil.copytree(good["model"], copy / "base")
        return setting("base_model_name_or_path", str(needs_code(base)))(copy)

    def imports(copy: Path) -> Path:
        _code(copy.parent / "evil_megatron.py")
        setting("megatron_config", {"a": 1})(copy)
        return setting("megatron_core", "evil_megatron")(copy)

    yield Planted("adapter", "pickled weights", pickled, (2,), "--pickled_weights")
    yield Planted("adapter", "a base with code", over_code, (2,), "--trust_remote_code")
    yield Planted("adapter", "a module to import", imports, (2,), "megatron_config")
    slow = "(" + "(model|layers|[a-z0-9_.])+" * 3 + ")+!"
    yield Planted("adapter", "a slow pattern of layers", setting("target_modules", slow), (0,))
    yield Planted("adapter", "a slow pattern of ranks", setting("rank_pattern", {slow: 4}), (2,), "rank_pattern")
    yield Planted("adapter", "a slow pattern left out", setting("exclude_modules", slow), (2,), "exclude_modules")
    yield Planted("adapter", "a base that is itself", lambda c: setting("base_model_name_or_path", str(c))(c), (2,))
    for name, value in (
        *(("r", 10**7), ("r", 0), ("r", "4"), ("r", None), ("lora_alpha", "x"), ("peft_type", "XLORA")),
        *(("peft_type", "NONE"), ("peft_type", []), ("peft_type", "PROMPT_TUNING"), ("target_modules", 5)),
        *(("target_modules", [5]), ("target_modules", ["nothing"]), ("layer_replication", [[0, 10**9]])),
        *(("modules_to_save", ["(a+)+$"]), ("init_lora_weights", "corda"), ("task_type", "x"), ("bias", 3)),
        *(("base_model_name_or_path", value) for value in (None, 5, [], "", "/nowhere", "a\0b", "no/where")),
    ):
        codes = (0, 2) if (name, value) in (("r", None), ("lora_alpha", None)) else (2,)
        yield Planted("adapter", f"{name}: {value}", setting(name, value), codes)
    for name, text in (("a list", "[]"), ("null", "null"), ("deep", "[" * 99_999), ("an object", "{}")):
        yield Planted(
            "adapter", f"settings that are {name}", _text("adapter_config.json", text), (2,), "adapter_config"
        )


def _checkpoints() -> Iterator[Planted]:
    def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
        def plant(copy: Path) -> Path:
            path = copy / "checkpoints" / "step=1.ckpt"
            state = torch.load(path, weights_only=True)
            change(state)
            path.with_name("step=1.ckpt.json").unlink()
            path.unlink()
            write_checkpoint(state, path)
            return copy

        return plant

    def pickled(copy: Path) -> Path:
        path = copy / "checkpoints" / "step=1.ckpt"
        torch.save({"state_dict": Payload()}, path)
        path.with_name("step=1.ckpt.json").unlink()
        return copy

    def student(**values: Any) -> Callable[[Path], Path]:
        return manifest(lambda state: state["config"]["model"]["student"].update(values))

    cases = {
        "code, asked for": (student(trust_remote_code=True), "--trust_remote_code"),
        "pickles, asked for": (student(pickled_weights=True), "--pickled_weights"),
        "a kernel of the hub": (student(attention="org/kernel"), "attention"),
        "an adapter of no kind": (manifest(lambda s: s["config"]["model"].update(adapter={"rnk": 1})), "adapter"),
        "an adapter that is a text": (manifest(lambda s: s["config"]["model"].update(adapter="x")), "adapter"),
        "a config without a model": (manifest(lambda s: s["config"].clear()), "model.student"),
        "no weights": (manifest(lambda s: s.pop("state_dict")), "checkpoint"),
        "weights that are a list": (manifest(lambda s: s.update(state_dict=[])), "checkpoint"),
        "weights of another model": (
            manifest(lambda s: s.update(state_dict={"student.x": torch.ones(1)})),
            "checkpoint",
        ),
        "facts of no kind": (manifest(lambda s: s.update(facts={"x": 1})), "checkpoint"),
        "NaN": (manifest(lambda s: s["state_dict"]["student.model.model.norm.weight"].fill_(torch.nan)), "norm"),
        "a pickle": (pickled, "checkpoint"),
    }
    for what, (plant, words) in cases.items():
        yield Planted("checkpoint", what, plant, (2,), words, "export")


def _ggufs() -> Iterator[Planted]:
    def beside(copy: Path) -> Path:
        _code(copy / "tokenization_evil.py")
        auto = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None], "AutoConfig": "tokenization_evil.Evil"}}
        (copy / "tokenizer_config.json").write_text(json.dumps(auto | {"tokenizer_class": "Evil"}))
        (copy / "config.json").write_text(json.dumps(auto | {"model_type": "evil"}))
        return copy / "model.gguf"

    def adapter(copy: Path) -> Path:
        values = {"peft_type": "LORA", "base_model_name_or_path": "org/other", "r": 4}
        return _write(copy / "adapter_config.json", json.dumps(values), copy / "model.gguf")

    def number(name: bytes, value: int) -> Callable[[Path], Path]:
        def change(data: bytearray) -> None:
            at = data.index(name) + len(name) + 4
            data[at : at + 4] = value.to_bytes(4, "little")

        return _gguf(change)

    def counted(at: int) -> Callable[[Path], Path]:
        def change(data: bytearray) -> None:
            data[at : at + 8] = (2**60).to_bytes(8, "little")

        return _gguf(change)

    def cut(size: int) -> Callable[[Path], Path]:
        def change(data: bytearray) -> None:
            del data[size:]

        return _gguf(change)

    yield Planted("gguf", "code beside it", beside, (0,))
    yield Planted("gguf", "an adapter beside it", adapter, (0,))
    yield Planted("gguf", "2^60 tensors", counted(8), (2,), "the file ends")
    yield Planted("gguf", "2^60 settings", counted(16), (2,), "the file ends")
    for name in (b"block_count", b"embedding_length", b"feed_forward_length"):
        yield Planted("gguf", f"{name.decode()}: 2^31", number(name, 2**31), (2,), "model.gguf")
    for size in (0, 3, 20, 500, 60_000):
        yield Planted("gguf", f"cut after {size} bytes", cut(size), (2,), "the file ends" if size else "empty file")


def at_random(good: dict[str, Path], runs: int) -> Iterator[Planted]:
    """Random cases: replaced fields of JSON files, and changed bytes of a GGUF header."""
    files = ("config.json", "generation_config.json", "tokenizer_config.json")
    places = [("model", file) for file in files] + [("adapter", "adapter_config.json")]
    for number in range(runs):
        draw = random.Random(number)
        kind, file = draw.choice(places)
        field = draw.choice(sorted(json.loads((good[kind] / file).read_text())))
        value = draw.choice(ODD)
        yield Planted(kind, f"{file}: {field}: {value}"[:80], _field(file, field, value), (0, 2))
        yield Planted("gguf", f"bytes changed, {number}", _edited(number), (0, 2))


def _edited(number: int) -> Callable[[Path], Path]:
    def change(data: bytearray) -> None:
        draw = random.Random(number)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(draw.choice([32, 1000, 50_000]))] = draw.randrange(256)

    return _gguf(change)


def _gguf(change: Callable[[bytearray], None]) -> Callable[[Path], Path]:
    """Change the bytes of model.gguf."""

    def plant(copy: Path) -> Path:
        file = copy / "model.gguf"
        data = bytearray(file.read_bytes())
        change(data)
        file.write_bytes(data)
        return file

    return plant


def _code(file: Path) -> None:
    """Write Python code that leaves a file when it runs."""
    file.write_text("import os\nopen(os.environ['OPCD_DRILL_CANARY'], 'w').write(__file__)\n")


def _write(file: Path, text: str, opened: Path) -> Path:
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    return opened


def _text(file: str, text: str) -> Callable[[Path], Path]:
    return lambda copy: _write(copy / file, text, copy)


def _field(file: str, name: str, value: Any) -> Callable[[Path], Path]:
    def plant(copy: Path) -> Path:
        values = json.loads((copy / file).read_text())
        values[name] = value
        return _write(copy / file, json.dumps(values), copy)

    return plant


def needs_code(copy: Path) -> Path:
    """Make the model one of an unknown family, with the code that would load it."""
    _code(copy / "modeling_evil.py")
    names = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    _field("config.json", "auto_map", names)(copy)
    _field("config.json", "model_type", "evil")(copy)
    return copy


def _tokenizer_code(copy: Path) -> Path:
    _code(copy / "tokenization_evil.py")
    _field("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["tokenization_evil.Evil", None]})(copy)
    return _field("tokenizer_config.json", "tokenizer_class", "Evil")(copy)


def _generation_code(copy: Path) -> Path:
    (copy / "custom_generate").mkdir()
    _code(copy / "custom_generate" / "generate.py")
    return copy


def _pickled(copy: Path) -> Path:
    torch.save({"a": Payload()}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return copy


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], Path]:
    def plant(copy: Path) -> Path:
        weights = load_file(copy / "model.safetensors")
        change(weights)
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        return copy

    return plant


def _pipe(copy: Path) -> Path:
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    return copy


def _endless(copy: Path) -> Path:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to("/dev/zero")
    return copy


def _elsewhere(copy: Path) -> Path:
    (copy / "model.safetensors").rename(copy.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    return _write(copy / "model.safetensors.index.json", json.dumps(index), copy)


def _judge(case: Planted, copy: Path, canary: Path) -> tuple[str | None, int | str, str]:
    """The problem or None, the exit code, and the last line of the output."""
    shutil.rmtree(os.environ["OPCD_CACHE"], ignore_errors=True)  # else the cache is used for a file of the same hash
    opened = case.plant(copy)
    before = _listed(copy)
    args = {
        "chat": ["chat", str(opened), "--max_new_tokens", "1", "--device", "cpu"],
        "export": ["export", str(opened), "--to", "hf", "--out", str(copy.parent / "exported")],
    }[case.command]
    code, said = _run(args)
    shutil.rmtree(copy.parent / "exported", ignore_errors=True)
    problem = None
    if code not in case.codes:
        problem = f"exit code {code}: {said[-600:]}"
    elif code == 2 and not (said.count("opcd: error: ") == 1 and case.words in said):
        problem = f"it does not say {case.words!r}: {said[-600:]}"
    elif canary.exists():
        problem = f"its code ran: {canary.read_text()}"
        canary.unlink()
    elif _listed(copy) != before:
        problem = "files in it have changed"
    lines = [line for line in said.splitlines() if line.strip()]
    return problem, code, lines[-1] if lines else ""


def _listed(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(file), file.lstat().st_mtime_ns) for file in folder.rglob("*"))


def _run(args: list[str]) -> tuple[int | str, str]:
    """Run a command in this process. Returns its exit code, or the name of its exception, and its output."""
    said = io.StringIO()

    def late(*_: object) -> None:
        raise TimeoutError(f"no end in {SECONDS} s")

    former = [signal.signal(kind, late) for kind in (signal.SIGALRM, signal.SIGPROF)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # CPU time of this process: the machine may be busy
    signal.alarm(10 * SECONDS)
    try:
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            mock.patch.object(sys, "stdin", io.StringIO("y\n")),
            mock.patch.object(sys, "argv", ["opcd"]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return main(args), said.getvalue()
    except BaseException as error:
        return type(error).__name__, said.getvalue() + "".join(traceback.format_exception(error))
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for kind, action in zip((signal.SIGALRM, signal.SIGPROF), former, strict=True):
            signal.signal(kind, action)
