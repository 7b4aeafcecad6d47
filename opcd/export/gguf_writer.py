"""Writing GGUF, the file format of llama.cpp and Ollama: Llama, Qwen2 and Qwen3 with a byte-level BPE tokenizer.

Beside the weights, the file has the shape of the model, the vocabulary with the kind of each token, merges, special
tokens, the name of the rule that splits text before merging (`tokenizer.ggml.pre`), and the chat template. For Llama,
llama.cpp rotates neighbouring pairs of a head's dimensions, where transformers rotates halves: the rows of the query
and key projections are reordered. Scaled rotary frequencies (Llama 3.1) are a tensor, `rope_freqs`.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opcd.models.gguf_folder import read
from opcd.modules.student import Student
from opcd.runtime.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
ROUNDED = 2
"""Tensors with fewer dimensions, such as norms and biases, stay in float32."""
ROPE_FREQS = "rope_freqs.weight"
ELSEWHERE = "; export --to hf or merged, and convert that with llama.cpp's own convert_hf_to_gguf.py"

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROBE = (
    "I'm we'LL don't  THEY'VE 3 12 345 6789 a1b22 ½ ²³ ١٢٣  naïve Straße 東京都 здравствуй! ...?!\n\n \t x\r\n  y  \n"
    "#include <a.h>; foo_bar(x[0], 'y') -> {z: 1e-5}\u00a0🙂🙂 'sound `tis\u2019s \u0301e\u0301 ok \n \n\n  end   "
)
"""Text that the splitting rules split differently."""


def check_architecture(config: PreTrainedConfig) -> None:
    """Check that llama.cpp would compute the same model.

    Raises:
        UserError: names what is not supported.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(f"--to gguf writes {', '.join(ARCHITECTURES)}, not the architecture {kind}{ELSEWHERE}")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in (("default", "llama3") if kind == "llama" else ("default",)):
        raise UserError(f"--to gguf: rotary positions of type {rope} are not written for {kind}{ELSEWHERE}")
    other = [name for name in ("attention_bias", "mlp_bias", "use_sliding_window") if getattr(config, name, False)]
    other += ["hidden_act"] * (config.hidden_act != "silu")
    # transformers, which reads the file for the check, assumes 128, as all Qwen3 models have.
    other += ["head_dim"] * (kind == "qwen3" and config.head_dim != 128)
    if other:
        raise UserError(f"--to gguf: a {kind} with {other[0]}: {getattr(config, other[0])} is not written{ELSEWHERE}")


def splitting_rule(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of the rule by which a tokenizer splits text before merging, found on an example text.

    Raises:
        UserError: the tokenizer is not a byte-level BPE, or uses a rule that is not known here.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = {"model": {"type": "none"}, "normalizer": None}
    if backend is not None:
        parts = json.loads(backend.to_str())
    bpe, normalizer = parts["model"], parts["normalizer"]
    plain = normalizer is None or normalizer["type"] == "NFC"  # llama.cpp takes text as it is
    if backend is None or bpe["type"] != "BPE" or bpe.get("byte_fallback") or not plain or not backend.pre_tokenizer:
        raise UserError(f"--to gguf needs a byte-level BPE tokenizer, not {type(tokenizer).__name__}{ELSEWHERE}")
    found = backend.pre_tokenizer.pre_tokenize_str(PROBE)
    for name, (rule, ignore_merges) in _rules().items():
        if rule.pre_tokenize_str(PROBE) == found and bpe.get("ignore_merges", False) == ignore_merges:
            return name
    raise UserError(f"--to gguf: the tokenizer splits text by a rule that is not known here{ELSEWHERE}")


def _rules() -> dict[str, tuple[pre_tokenizers.PreTokenizer, bool]]:
    """The rules by name, each with `ignore_merges`: whether a word in the vocabulary is one token without merges."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [pre_tokenizers.Split(Regex(WORDS % digits), "isolated") for digits in ("", "{1,3}")]
    return {
        "gpt-2": (gpt2, False),
        "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]), False),
        "qwen2": (pre_tokenizers.Sequence([words[0], spell]), False),
        "llama-bpe": (pre_tokenizers.Sequence([words[1], spell]), True),
    }


def write_gguf(student: Student, file: Path, dtype: torch.dtype, name: str) -> None:
    """Write a student without adapter. Weights that `dtype` cannot hold exactly are rounded (see `round_weights`)."""
    kind, file_type = TYPES[dtype]
    config = student.model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, config)
        _add_tokenizer(writer, student.tokenizer, config.vocab_size)
        for tensor_name, weight in _tensors(student.model):
            data = weight.detach().float().numpy()
            written = kind if data.ndim >= ROUNDED else gguf.GGMLQuantizationType.F32
            writer.add_tensor(tensor_name, gguf.quantize(data, written), raw_dtype=written)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add the vocabulary and its options. Embedding rows without a token are named [PADn], as in llama.cpp."""
    known = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting_rule(tokenizer))
    writer.add_token_list([known.get(n, f"[PAD{n}]") for n in range(rows)])
    types = [kinds.NORMAL if n in known else kinds.UNUSED for n in range(rows)]
    for n, token in added.items():
        types[n] = kinds.CONTROL if token.special else kinds.USER_DEFINED
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        if (n := getattr(tokenizer, name)) is not None:
            getattr(writer, f"add_{name}")(n)
    ids = tokenizer("x")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """The file's tensors by name, without a tied head."""
    config = model.config
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors: list[tuple[str, torch.Tensor]] = []
    for name, parameter in model.named_parameters():  # a tied head is not listed
        layer = name.split(".")[-2]
        moved = config.model_type == "llama" and layer in heads
        weight = _neighbours(parameter, heads[layer]) if moved else parameter
        tensors.append((str(names.get_name(name, try_suffixes=(".weight", ".bias"))), weight))
    factors = rope_factors(model)
    return [*tensors, (ROPE_FREQS, factors)] if (factors != 1).any() else tensors


def rope_factors(model: PreTrainedModel) -> torch.Tensor:
    """The divisors of the plain rotary frequencies: [D / 2]."""
    scaled: torch.Tensor = model.model.rotary_emb.inv_freq
    positions = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    factors: torch.Tensor = 1.0 / (model.config.rope_parameters["rope_theta"] ** positions * scaled)
    return factors.where((factors - 1).abs() > 1e-5, 1)


def _neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from 0, 1, ..., D - 1 to 0, D/2, 1, D/2 + 1, ...: [heads * D, ...]."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def read_gguf(file: Path) -> Student:
    """The student of a GGUF file, in float32."""
    model, tokenizer = read(file, torch.float32)
    factors = next((tensor.data for tensor in gguf.GGUFReader(file).tensors if tensor.name == ROPE_FREQS), None)
    if factors is not None:  # transformers does not read them
        model.model.rotary_emb.inv_freq /= torch.from_numpy(np.array(factors))
    return Student(model.eval(), tokenizer)
