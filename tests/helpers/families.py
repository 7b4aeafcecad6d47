"""A random tiny model of each of many families that transformers can build from a config."""

from typing import Any

import transformers
from transformers import PreTrainedModel

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
ROUTED: dict[str, Any] = {"head_dim": 8, "n_shared_experts": 1, "n_routed_experts": 4, "first_k_dense_replace": 1}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
WINDOW: dict[str, Any] = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

DENSE: dict[str, dict[str, Any]] = {
    "Apertus": {},
    "Arcee": {"head_dim": 8},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {**WINDOW, "logit_scale": 0.25},
    "Ernie4_5": {"head_dim": 8},
    "Exaone4": WINDOW,
    "Falcon": {},
    "GPT2": GPT2,
    "GPTJ": {**GPT2, "rotary_dim": 4},
    "GPTNeoX": {},
    "Gemma": {"head_dim": 8},
    "Gemma2": {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Gemma3": {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Glm": {"head_dim": 8},
    "Glm4": {"head_dim": 8},
    "Granite": {"logits_scaling": 4.0},
    "Helium": {"head_dim": 8},
    "Llama": {},
    "Ministral": {**WINDOW, "head_dim": 8},
    "Mistral": {"sliding_window": 12},
    "Nemotron": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": WINDOW,
    "Phi": {},
    "Phi3": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "SeedOss": {"head_dim": 8},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "StableLm": {},
    "Starcoder2": {},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "DeepseekV2": {**LATENT, **EXPERTS, "head_dim": 8},
    "DeepseekV3": {**LATENT, **EXPERTS, "n_group": 2, "topk_group": 1},
    "Dots1": {**ROUTED, **EXPERTS, "n_group": 1, "topk_group": 1},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "Glm4Moe": {**ROUTED, **EXPERTS, "n_group": 1, "topk_group": 1},
    "GptOss": {**WINDOW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 4},
    "Qwen2Moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8, "num_experts": 4},
    "Qwen3Next": {
        **EXPERTS,
        **DELTA,
        "head_dim": 8,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
    },
}
RECURRENT: dict[str, dict[str, Any]] = {
    "Bamba": {**MAMBA, "attn_layer_indices": [1], "mamba_expand": 2},
    "FalconH1": {**MAMBA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "FalconMamba": {"state_size": 8},
    "Jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "Mamba": {"state_size": 8},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
}
FAMILIES = {**DENSE, **MIXTURES, **RECURRENT}

OTHER_NAMES = {"GPT2": ("GPT2Config", "GPT2LMHeadModel"), "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}


def make(family: str, **others: Any) -> PreTrainedModel:
    """The model, in eval mode."""
    config, model = OTHER_NAMES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    built: PreTrainedModel = getattr(transformers, model)(
        getattr(transformers, config)(**{**SMALL, **FAMILIES[family], **others})
    )
    return built.eval()


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention to load it with."""
    return "sdpa" if model._supports_sdpa else "eager"
