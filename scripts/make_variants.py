"""Writes tests/data/variants: logits that transformers computes for checkpoints of each family in unusual shapes.

    pip install torch transformers==5.23.0
    python scripts/make_variants.py [NAME ...]

A variant is one small file: the configuration, the names and shapes of the tensors, some token ids, and the logits. The
values of the tensors are derived from their names, here and in `tests/models/variants.rs`, and are not stored.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

OUT = Path(__file__).parents[1] / "tests" / "data" / "variants"
TOKENS = 40

Config = dict[str, Any]

# An odd number of heads with an explicit width, one KV head, no size a multiple of 16.
ODD: Config = {
    "vocab_size": 67, "hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10,
    "num_hidden_layers": 5, "intermediate_size": 52, "max_position_embeddings": 128, "pad_token_id": None,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# Three query heads per KV head.
GROUPS: Config = ODD | {
    "vocab_size": 83, "hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14,
    "num_hidden_layers": 2, "intermediate_size": 72,
}  # fmt: skip
# For families whose head width is the hidden size divided by the number of heads.
PLAIN: Config = {key: value for key, value in ODD.items() if key != "head_dim"}
PLAIN_GROUPS: Config = {key: value for key, value in GROUPS.items() if key != "head_dim"} | {"hidden_size": 60}
NEOX: Config = {key: value for key, value in PLAIN.items() if key != "num_key_value_heads"}
GPT: Config = {
    "vocab_size": 67, "n_embd": 36, "n_head": 3, "n_layer": 5, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
OPT: Config = {
    "vocab_size": 67, "hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 5, "ffn_dim": 52,
    "max_position_embeddings": 64, "word_embed_proj_dim": 36, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
MPT: Config = {"vocab_size": 67, "d_model": 36, "n_heads": 3, "n_layers": 5, "max_seq_len": 128}
BLOOM: Config = {"vocab_size": 67, "hidden_size": 36, "n_head": 3, "n_layer": 5}
FALCON: Config = {
    "vocab_size": 67, "hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 5, "bos_token_id": 0,
    "eos_token_id": 1, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS: Config = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SHARED: Config = EXPERTS | {"num_experts_per_tok": 3, "shared_expert_intermediate_size": 28}
WINDOW: Config = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
RW: Config = {
    "new_decoder_architecture": False,
    "multi_query": False,
    "parallel_attn": False,
    "alibi": True,
    "bias": True,
}


def rope(kind: str = "default", **more: Any) -> Config:
    """Returns the key `rope_parameters`."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | more}


def merged(config: Config, **more: Any) -> Config:
    """Returns the configuration with more keys in `rope_parameters`."""
    return config | {"rope_parameters": config["rope_parameters"] | more}


def yarn(**more: Any) -> Config:
    """Returns YaRN parameters, with a factor of 4 by default."""
    return rope("yarn", **({"factor": 4.0, "original_max_position_embeddings": 32} | more))


def long(original: int) -> Config:
    """Returns LongRoPE parameters for heads of width 14, long from `original` tokens."""
    factors = {"long_factor": [1 + 0.3 * i for i in range(7)], "short_factor": [1 + 0.1 * i for i in range(7)]}
    scaling = rope("longrope", original_max_position_embeddings=original, **factors)
    return scaling | {"original_max_position_embeddings": original}


GEMMA3_ROPE: Config = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}

# The language model of a vision model.
IMAGES: Config = {
    "text_config": ODD | {"sliding_window": 12, "num_hidden_layers": 2, "query_pre_attn_scalar": 30},
    "vision_config": {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
        "patch_size": 4,
    },
    "mm_tokens_per_image": 1, "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5,
}  # fmt: skip

FULL, SLIDING = ["full_attention"], ["sliding_attention"]
# Layers with windows.
WINDOWED: Config = PLAIN_GROUPS | {"sliding_window": 12}
LLAMA3: Config = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DEFAULT: Config = {"rope_type": "default", "rope_theta": 10000.0}
LAGUNA: Config = GROUPS | EXPERTS | {
    "sliding_window": 12, "shared_expert_intermediate_size": 20, "mlp_layer_types": ["sparse", "dense"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    },
}  # fmt: skip
LATENT: Config = PLAIN | EXPERTS | {
    "num_key_value_heads": 3, "num_hidden_layers": 3, "q_lora_rank": 14, "kv_lora_rank": 18, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "head_dim": 6, "v_head_dim": 12, "first_k_dense_replace": 1, "n_routed_experts": 5,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
GEMMA3N: Config = GROUPS | {
    "hidden_size": 36, "sliding_window": 12, "num_hidden_layers": 3, "num_kv_shared_layers": 1, "laurel_rank": 5,
    "layer_types": SLIDING + FULL + SLIDING, "hidden_size_per_layer_input": 8, "altup_num_inputs": 3,
    "vocab_size_per_layer_input": 83, "activation_sparsity_pattern": [0.5, 0.0, 0.9], "intermediate_size": 52,
}  # fmt: skip

LIMITS: Config = {"time_step_limit": [1.0, 1.5]}
MAMBA: Config = {
    "vocab_size": 67, "hidden_size": 36, "num_hidden_layers": 3, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
# Three groups of two heads.
MAMBA2: Config = {
    "mamba_n_heads": 6, "mamba_d_head": 20, "mamba_n_groups": 3, "mamba_d_state": 10, "mamba_d_conv": 3,
    "mamba_expand": 2, "mamba_chunk_size": 16, "mamba_proj_bias": True,
}  # fmt: skip
HYBRID: Config = PLAIN_GROUPS | MAMBA2 | LIMITS | {"num_hidden_layers": 3, "attention_bias": True}
MIXED: Config = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
# Three heads of values for each head of keys.
DELTA: Config = GROUPS | {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 10, "linear_value_head_dim": 14,
    "linear_conv_kernel_dim": 3, "num_hidden_layers": 3, "attention_bias": True,
} | MIXED  # fmt: skip
PLAIN_DELTA: Config = {key: value for key, value in DELTA.items() if key != "head_dim"}
TWO: Config = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
FALCON_H1: Config = GROUPS | MAMBA2 | LIMITS | {
    "mamba_d_ssm": 90, "mamba_d_head": 15, "mamba_rms_norm": True, "projectors_bias": True, "mlp_bias": True,
    "attention_bias": True, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.7, "mlp_multipliers": [0.9, 0.8],
    "key_multiplier": 0.6, "attention_in_multiplier": 0.9, "attention_out_multiplier": 0.7, "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.8, "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2],
}  # fmt: skip

VARIANTS: dict[str, tuple[str, Config]] = {
    "llama": ("llama", ODD),
    "llama-biases": ("llama", GROUPS | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", GROUPS | {"tie_word_embeddings": True}),
    "llama-dynamic": ("llama", ODD | rope("dynamic", factor=4.0)),
    "llama-linear": ("llama", ODD | rope("linear", factor=3.0)),
    "llama-llama3": (
        "llama",
        GROUPS
        | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-longrope": ("llama", GROUPS | long(32)),
    "llama-yarn": ("llama", ODD | yarn(attention_factor=0.9, beta_fast=24.0, beta_slow=2.0)),
    "llama-yarn-mscale": ("llama", GROUPS | yarn(mscale=0.8, mscale_all_dim=0.4)),
    "llama-yarn-untruncated": ("llama", GROUPS | yarn(truncate=False)),
    "mistral": ("mistral", ODD | {"sliding_window": 12}),
    "mistral-everywhere": ("mistral", GROUPS | {"sliding_window": None}),
    "mixtral": ("mixtral", ODD | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("mixtral", GROUPS | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 12}),
    "gpt_neox": ("gpt_neox", NEOX | rope(partial_rotary_factor=0.5)),
    "gpt_neox-stablelm-alpha": (
        "gpt_neox",
        NEOX
        | {"num_attention_heads": 2, "attention_bias": False, "hidden_act": "gelu_fast"}
        | rope(partial_rotary_factor=0.25),
    ),
    "gpt_neox-serial": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True} | rope(partial_rotary_factor=0.34),
    ),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "gptj-wide": ("gptj", GPT | {"n_embd": 40, "n_head": 5, "rotary_dim": 8, "n_inner": 72, "n_layer": 2}),
    "mpt": ("mpt", MPT),
    "mpt-clip": (
        "mpt",
        MPT | {"d_model": 42, "n_heads": 6, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}},
    ),
    "falcon": ("falcon", FALCON | {"new_decoder_architecture": False, "multi_query": True}),
    "falcon-biases": (
        "falcon",
        FALCON | {"multi_query": True, "bias": True, "tie_word_embeddings": False, "ffn_hidden_size": 52},
    ),
    "falcon-heads": ("falcon", FALCON | {"multi_query": False, "activation": "relu"}),
    "falcon-groups": (
        "falcon",
        FALCON | {"hidden_size": 60, "num_attention_heads": 6, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-one-norm": (
        "falcon",
        FALCON | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 1},
    ),
    "falcon-rw": ("falcon", FALCON | RW),
    "falcon-rw-parallel": ("falcon", FALCON | RW | {"num_attention_heads": 6, "parallel_attn": True}),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_bigcode-heads": ("gpt_bigcode", GPT | {"multi_query": False, "n_inner": 52}),
    "starcoder2": ("starcoder2", PLAIN | {"sliding_window": 12}),
    "starcoder2-plain": ("starcoder2", PLAIN_GROUPS | {"use_bias": False, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", GPT),
    "gpt2-relu": ("gpt2", GPT | {"activation_function": "relu", "n_inner": 52, "tie_word_embeddings": False}),
    "opt": ("opt", OPT),
    "opt-plain": ("opt", OPT | {"enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False}),
    "opt-unnormed": ("opt", OPT | {"_remove_final_layer_norm": True}),
    "opt-350m": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-post-norm": ("opt", OPT | {"do_layer_norm_before": False}),
    "opt-projected": ("opt", OPT | {"word_embed_proj_dim": 52, "tie_word_embeddings": False}),
    "bloom": ("bloom", BLOOM),
    "bloom-untied": ("bloom", BLOOM | {"hidden_size": 42, "n_head": 6, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", PLAIN),
    "qwen2-window": ("qwen2", PLAIN_GROUPS | WINDOW | {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", PLAIN | SHARED | {"norm_topk_prob": True, "qkv_bias": False}),
    "qwen2_moe-steps": ("qwen2_moe", PLAIN_GROUPS | SHARED | {"num_hidden_layers": 3, "decoder_sparse_step": 2}),
    "qwen2_moe-window": ("qwen2_moe", PLAIN_GROUPS | SHARED | WINDOW | {"num_hidden_layers": 3}),
    "qwen3": ("qwen3", ODD),
    "qwen3-biases": ("qwen3", GROUPS | {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": ("qwen3", GROUPS | WINDOW | {"num_hidden_layers": 3}),
    "qwen3_moe": ("qwen3_moe", ODD | EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe-mixed": ("qwen3_moe", GROUPS | EXPERTS | {"num_hidden_layers": 4, "mlp_only_layers": [1]}),
    "qwen3_moe-steps": (
        "qwen3_moe",
        GROUPS | EXPERTS | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "num_experts_per_tok": 1},
    ),
    "gemma": ("gemma", ODD),
    "gemma-biases": ("gemma", GROUPS | {"attention_bias": True}),
    "gemma2": ("gemma2", ODD | {"sliding_window": 12, "query_pre_attn_scalar": 30}),
    "gemma2-uncapped": (
        "gemma2",
        GROUPS | {"sliding_window": 12, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", ODD | {"sliding_window": 12, "num_hidden_layers": 7, "query_pre_attn_scalar": 30}),
    "gemma3-linear": (
        "gemma3_text",
        GROUPS | GEMMA3_ROPE | {"sliding_window": 12, "num_hidden_layers": 7, "final_logit_softcapping": 10.0},
    ),
    "gemma3-images": ("gemma3", IMAGES),
    "phi": ("phi", PLAIN | rope(partial_rotary_factor=0.5)),
    "phi-qk-norm": ("phi", PLAIN_GROUPS | {"qk_layernorm": True} | rope(partial_rotary_factor=0.4)),
    "phi3": ("phi3", PLAIN | {"sliding_window": 12}),
    "phi3-partial": ("phi3", PLAIN_GROUPS | rope(partial_rotary_factor=0.67)),
    "phi3-long": ("phi3", PLAIN_GROUPS | {"hidden_size": 84} | long(64)),
    "phi3-longer": ("phi3", PLAIN_GROUPS | {"hidden_size": 84} | long(32)),
    "stablelm": ("stablelm", PLAIN | {"use_qkv_bias": True} | rope(partial_rotary_factor=0.5)),
    "stablelm-parallel": (
        "stablelm",
        PLAIN_GROUPS | {"use_parallel_residual": True, "qk_layernorm": True} | rope(partial_rotary_factor=0.25),
    ),
    "olmo2": ("olmo2", PLAIN),
    "olmo2-biases": ("olmo2", PLAIN_GROUPS | {"attention_bias": True}),
    "granite": (
        "granite",
        PLAIN
        | {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 3.0},
    ),
    "granite-biases": ("granite", PLAIN_GROUPS | {"attention_bias": True, "mlp_bias": True}),
    "smollm3": ("smollm3", PLAIN),
    "smollm3-window": (
        "smollm3",
        PLAIN_GROUPS | {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "attention_bias": True} | WINDOW,
    ),
    "cohere-norms": ("cohere", PLAIN_GROUPS | {"use_qk_norm": True, "tie_word_embeddings": False}),
    "cohere2-share": ("cohere2", WINDOWED | {"num_hidden_layers": 5} | rope(partial_rotary_factor=0.5)),
    "exaone4-everywhere": ("exaone4", WINDOWED | {"layer_types": ["full_attention"] * 2, "sliding_window_pattern": 4}),
    "olmoe-clamped": ("olmoe", PLAIN_GROUPS | EXPERTS | {"clip_qkv": 0.8}),
    "olmo3-llama3": (
        "olmo3",
        PLAIN_GROUPS
        | {"sliding_window": 12, "num_hidden_layers": 4}
        | {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": DEFAULT}},
    ),
    "minimax_m2-share": (
        "minimax_m2",
        GROUPS
        | {"num_local_experts": 5, "num_experts_per_tok": 2, "rotary_dim": 8, "intermediate_size": 20}
        | rope(partial_rotary_factor=0.3),
    ),
    "laguna-last": ("laguna", LAGUNA | {"layer_types": SLIDING + FULL, "num_attention_heads_per_layer": [6, 2]}),
    "laguna-gates": ("laguna", LAGUNA | {"layer_types": FULL + SLIDING, "gating": False}),
    "phimoe-three": (
        "phimoe",
        PLAIN_GROUPS
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "router_jitter_noise": 0.0, "intermediate_size": 20}
        | {"lm_head_bias": True, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "phimoe-longrope": (
        "phimoe",
        PLAIN_GROUPS
        | {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 20, "hidden_size": 84}
        | merged(long(64), short_mscale=1.3, long_mscale=1.3),
    ),
    "phimoe-longrope-beyond": (
        "phimoe",
        PLAIN_GROUPS
        | {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 20, "hidden_size": 84}
        | merged(long(16), short_mscale=1.3, long_mscale=1.3),
    ),
    "ernie4_5_moe-biases": (
        "ernie4_5_moe",
        PLAIN_GROUPS
        | {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 20, "moe_num_shared_experts": 1}
        | {"use_bias": True, "moe_layer_start_index": 1},
    ),
    "hy_v3-biases": ("hy_v3", GROUPS | EXPERTS | {"mlp_bias": True, "num_shared_experts": 1}),
    "hy_v3-unshared": ("hy_v3", GROUPS | EXPERTS | {"num_shared_experts": 0}),
    "granitemoeshared-unshared": (
        "granitemoeshared",
        PLAIN_GROUPS | {"num_local_experts": 3, "num_experts_per_tok": 2, "shared_intermediate_size": 0},
    ),
    "deepseek_v3-untruncated": ("deepseek_v3", LATENT | yarn(truncate=False, mscale=1.0, mscale_all_dim=0.7)),
    "deepseek_v2-biases": (
        "deepseek_v2",
        LATENT | {"mlp_bias": True, "attention_bias": True, "topk_method": "greedy", "q_lora_rank": None},
    ),
    "glm4_moe_lite-heads": (
        "glm4_moe_lite", LATENT | {"hidden_size": 40, "mlp_layer_types": ["sparse", "dense"], "num_hidden_layers": 2}
    ),
    "gemma3n-widths": (
        "gemma3n_text",
        GEMMA3N | {"intermediate_size": [36, 52, 44], "vocab_size_per_layer_input": 50, "altup_correct_scale": False},
    ),
    "gemma3n-untied": ("gemma3n_text", GEMMA3N | {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma4-untied": (
        "gemma4_text",
        GROUPS
        | {"hidden_size": 60, "sliding_window": 12, "hidden_size_per_layer_input": 8, "tie_word_embeddings": False}
        | {"num_hidden_layers": 3, "layer_types": SLIDING + FULL + SLIDING, "num_kv_shared_layers": 1}
        | {"attention_bias": True, "vocab_size_per_layer_input": 83, "use_bidirectional_attention": "vision"},
    ),
    "mamba-biases": (
        "mamba",
        MAMBA
        | {"state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7, "use_bias": True}
        | {"use_conv_bias": False, "tie_word_embeddings": False},
    ),
    "falcon_mamba-norms": ("falcon_mamba", MAMBA | {"state_size": 5, "mixer_rms_eps": 0.1, "layer_norm_epsilon": 0.01}),
    "mamba2-limits": (
        "mamba2",
        MAMBA
        | LIMITS
        | {"num_heads": 6, "head_dim": 12, "n_groups": 3, "state_size": 10, "conv_kernel": 3, "chunk_size": 16}
        | {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True},
    ),
    "jamba-biases": (
        "jamba",
        PLAIN_GROUPS
        | {"num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_offset": 0}
        | {"num_experts": 5, "num_experts_per_tok": 2, "mamba_proj_bias": True, "mamba_conv_bias": False}
        | {"mamba_d_state": 5, "mamba_d_conv": 3, "intermediate_size": 20},
    ),
    "bamba-biases": (
        "bamba",
        HYBRID | {"attn_layer_indices": [1], "mlp_bias": True, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "granitemoehybrid-rotated": (
        "granitemoehybrid",
        HYBRID
        | MIXED
        | {"position_embedding_type": "rope", "num_local_experts": 5, "num_experts_per_tok": 2}
        | {"mamba_conv_bias": False}
        | {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "shared_intermediate_size": 28},
    ),
    "granitemoehybrid-experts": (
        "granitemoehybrid",
        HYBRID
        | {"layer_types": ["full_attention"] * 3, "num_local_experts": 3, "num_experts_per_tok": 2}
        | {"shared_intermediate_size": 28, "logits_scaling": 3.0},
    ),
    "nemotron_h-mixed": (
        "nemotron_h",
        GROUPS
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"], "mlp_bias": True}
        | {"mamba_num_heads": 6, "mamba_head_dim": 12, "n_groups": 3, "ssm_state_size": 10, "chunk_size": 16}
        | {"use_bias": True, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2}
        | {"moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 28, "moe_latent_size": 18}
        | {"routed_scaling_factor": 1.7, "norm_topk_prob": False, "time_step_min": 1e-6, "conv_kernel": 3},
    ),
    "falcon_h1-normed": ("falcon_h1", FALCON_H1 | {"tie_word_embeddings": True}),
    "falcon_h1-gated": ("falcon_h1", FALCON_H1 | {"mamba_norm_before_gate": False, "mamba_conv_bias": False}),
    "lfm2-biases": (
        "lfm2",
        PLAIN_GROUPS
        | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True}
        | {"conv_L_cache": 5, "tie_word_embeddings": False, "block_auto_adjust_ff_dim": False},
    ),
    "lfm2_moe-plain": (
        "lfm2_moe",
        PLAIN_GROUPS
        | EXPERTS
        | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "use_expert_bias": False}
        | {"norm_topk_prob": False, "routed_scaling_factor": 1.7, "num_dense_layers": 1},
    ),
    "qwen3_next-dense": (
        "qwen3_next",
        DELTA
        | TWO
        | SHARED
        | {"mlp_only_layers": [1], "norm_topk_prob": False, "rms_norm_eps": 0.1}
        | rope(partial_rotary_factor=0.6),
    ),
    "qwen3_5-heads": ("qwen3_5_text", DELTA | {"tie_word_embeddings": True} | rope(partial_rotary_factor=0.6)),
    "qwen3_5_moe-heads": ("qwen3_5_moe_text", DELTA | TWO | SHARED | rope(partial_rotary_factor=0.6)),
    "olmo_hybrid-unrotated": (
        "olmo_hybrid",
        PLAIN_DELTA
        | {"hidden_size": 60, "linear_allow_neg_eigval": False, "rope_parameters": {"rope_theta": None}},
    ),
    "olmo_hybrid-groups": ("olmo_hybrid", PLAIN_DELTA | rope() | {"hidden_size": 60}),
    "kimi_linear-groups": (
        "kimi_linear",
        LATENT
        | MIXED
        | {"linear_num_heads": 3, "linear_head_dim": 10, "linear_conv_kernel_dim": 3, "num_experts": 6}
        | {"num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "norm_topk_prob": False, "n_shared_experts": 2}
        | {"attention_bias": True, "routed_scaling_factor": 1.7},
    ),
    "rwkv-rescaled": ("rwkv", MAMBA | {"num_hidden_layers": 5, "rescale_every": 2, "layer_norm_epsilon": 0.01}),
}  # fmt: skip


def values(name: str, shape: list[int]) -> npt.NDArray[np.float32]:
    """Derives a tensor from its name with SplitMix64: norms near 1, biases near 0, matrices of both signs."""
    seed = 0xCBF29CE484222325  # FNV-1a
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    counts = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + counts * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    even = (z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)  # -1 to 1
    if len(shape) > 1:
        made = even / np.float32(2)
    elif name.endswith(".bias"):
        made = even / np.float32(4)
    else:
        made = np.float32(1) + even / np.float32(4)
    reshaped: npt.NDArray[np.float32] = made.reshape(shape)
    return reshaped


def make(name: str) -> None:
    """Computes the logits of a variant and writes its file."""
    model_type, settings = VARIANTS[name]
    # Falcon's eager attention adds ALiBi twice.
    attention = "sdpa" if settings.get("alibi") else "eager"
    config = CONFIG_MAPPING[model_type](**settings)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "np") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
        save_file(
            {key: values(key, shape) for key, shape in shapes.items()}, f"{folder}/model.safetensors", {"format": "pt"}
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention, experts_implementation="eager", dtype=torch.float32
        )
        written = json.loads(Path(folder, "config.json").read_text())
    vocabulary = config.get_text_config().vocab_size
    ids = np.random.default_rng(1).integers(6, vocabulary, TOKENS, dtype=np.int32)
    with torch.inference_mode():
        logits = model.eval()(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    OUT.mkdir(exist_ok=True)
    # A safetensors file with config and shapes as metadata.
    metadata = {"config": json.dumps(written), "tensors": json.dumps(list(shapes.items()))}
    save_file({"input_ids": ids, "logits": logits}, OUT / f"{name}.safetensors", metadata)
    print(f"{name}: logits to {np.abs(logits).max():.1f}")


for variant in sys.argv[1:] or VARIANTS:
    make(variant)
