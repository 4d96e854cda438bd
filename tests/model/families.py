"""A tiny random model of each family, and of the kinds within a family, whose parts are wired differently."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from microtome.model import HookedModel
from microtome.model.families import family_of

VOCABULARY = 320
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
HEAD_DIM = {"head_dim": 8}
GPT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
WINDOW = {"sliding_window": 4}
MHA = {"num_key_value_heads": 4}
FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

# name → (model_type, settings)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT_LIKE),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "gptj": ("gptj", GPT_LIKE | {"rotary_dim": 4}),
    "gpt_neox": (
        "gpt_neox",
        {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"} | {"rotary_pct": 0.25},
    ),
    "gpt_neox-serial": (
        "gpt_neox",
        {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"} | {"use_parallel_residual": False},
    ),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "falcon-7b": ("falcon", FALCON),
    "falcon-40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": ("falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "llama": ("llama", LLAMA_LIKE),
    "llama-3": (
        "llama",
        LLAMA_LIKE
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("mistral", LLAMA_LIKE | WINDOW),
    "mixtral": ("mixtral", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "qwen3": ("qwen3", LLAMA_LIKE | HEAD_DIM),
    "gemma": ("gemma", LLAMA_LIKE | {"head_dim": 16}),
    "gemma2": ("gemma2", LLAMA_LIKE | {"head_dim": 16, "query_pre_attn_scalar": 16} | WINDOW),
    "gemma3": ("gemma3_text", LLAMA_LIKE | {"head_dim": 16, "query_pre_attn_scalar": 16} | WINDOW),
    "phi": ("phi", LLAMA_LIKE | MHA | PARTIAL),
    "phi3": ("phi3", LLAMA_LIKE),
    "stablelm": ("stablelm", LLAMA_LIKE | PARTIAL),
    "stablelm-parallel": ("stablelm", LLAMA_LIKE | PARTIAL | {"use_parallel_residual": True, "qk_layernorm": True}),
    "olmo2": ("olmo2", LLAMA_LIKE),
}


def make(
    kind: str,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    seed: int = 0,
    activation: str | None = None,
) -> HookedModel:
    """A random three-layer model; the same for the same kind and seed. All weights and biases are away from zero."""
    model_type, settings = KINDS[kind]
    if activation and model_type == "opt":
        settings = settings | {"activation_function": activation}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + noise * 0.1 if parameter.ndim == 1 else noise * 0.3)
    spec = family_of(config)
    assert spec is not None
    return HookedModel(hf.to(dtype), tokenizer, name=kind, spec=spec)
