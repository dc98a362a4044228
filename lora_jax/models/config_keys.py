"""Which keys of config.json change what a model computes. Imports no jax.

From the modeling code of transformers for each model type, and from that of models which were
later converted to one of these types. All other keys change nothing, whatever their value is.
"""

import os
from collections.abc import Mapping
from typing import Any

from lora_jax.models import config_values, model_types

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_READ = {
    *REQUIRED,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    *("original_max_position_embeddings", "tie_word_embeddings", "initializer_range"),
    *("dtype", "torch_dtype", "model_type", "attention_dropout"),
    *("quantization_config", "quantization"),  # mlx-lm writes both
}

_OFF = (None, False, 0, "", [], {})
_ONE = (None, 1)
NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {  # key → the values with which it changes nothing
    # rotary embedding: pairs of neighbours (GPT-J), of part of a head, of some layers only
    **dict.fromkeys(("rope_interleaved", "no_rope_layers", "no_rope_layer_interval"), _OFF),
    **dict.fromkeys(("rotary_pct", "rope_pct", "rotary_percent"), _ONE),
    "position_embedding_type": (*_OFF, "rope", "rotary"),
    "alibi": _OFF,
    # factors of Granite, MiniCPM, Cohere, Falcon-H1 and Gemma; Granite and Gemma read theirs
    **dict.fromkeys(("logits_scaling", "logit_scale", "embedding_multiplier", "scale_emb"), _ONE),
    **dict.fromkeys(("residual_multiplier", "lm_head_multiplier", "embedding_scale"), _ONE),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth"), _OFF),
    "dim_model_base": _OFF,
    # soft caps, clipping and norms of Gemma, Grok, OLMo, DBRX and StableLM; Gemma reads its caps
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _OFF),
    **dict.fromkeys(("logit_softcapping", "logits_soft_cap", "clip_qkv"), _OFF),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm"), _OFF),
    # attention
    "is_causal": (None, True),
    "use_bidirectional_attention": _OFF,
    **dict.fromkeys(("attention_sinks", "use_attention_sinks", "attention_chunk_size"), _OFF),
    **dict.fromkeys(("attn_temperature_tuning", "use_parallel_residual", "parallel_attn"), _OFF),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "kv_sharing_modes"), _OFF),
    # biases of InternLM, Qwen 1 and others
    **dict.fromkeys(("bias", "use_bias", "qkv_bias", "use_qkv_bias", "lm_head_bias"), _OFF),
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (*_OFF, 1)),
    # transformers' own: layers that differ from each other, and weights in another file
    **dict.fromkeys(("per_layer_config", "transformers_weights"), _OFF),
}
# What versions before 5 of transformers and other programs write beside the architecture.
_BOOKKEEPING = {
    *("tokenizer_class", "auto_map", "torchscript", "is_decoder", "task_specific_params"),
    *("tie_encoder_decoder", "add_cross_attention", "pruned_heads", "prefix", "finetuning_task"),
    *("pretraining_tp", "use_cache", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
    *("attn_implementation", "gradient_checkpointing", "cache_implementation", "model_max_length"),
    *("max_sequence_length", "transformers.js_config", "neftune_noise_alpha"),
    *("unsloth_version", "unsloth_fixed", "is_composition"),
}


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that a model of its type reads."""
    known = _READ.union(_type(raw).reads)
    return {key: value for key, value in raw.items() if key in known}


def not_implemented(raw: Mapping[str, Any]) -> list[str]:
    """What changes the computation and is not implemented, one line each."""
    implemented = {*_type(raw).reads, *_type(raw).built_in}
    return [
        f"{key} = {config_values.shown(raw[key])} is not implemented"
        for key, harmless in NOT_IMPLEMENTED.items()
        if key in raw
        and not any(raw[key] == value for value in harmless)
        and key not in implemented
    ]


def unread(raw: Mapping[str, Any]) -> list[str]:
    """The keys with a value that neither the model reads nor transformers itself writes."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    import transformers

    of_transformers = (
        transformers.CONFIG_MAPPING[raw["model_type"]],
        transformers.GenerationConfig(),
    )
    known = _READ.union(_type(raw).reads, _BOOKKEEPING)
    return [
        key
        for key, value in raw.items()
        if key not in known
        and not key.startswith("_")
        and not any(value == off for off in _OFF)
        and not any(hasattr(each, key) for each in of_transformers)
        and key not in NOT_IMPLEMENTED  # with a value that changes nothing
    ]


def _type(raw: Mapping[str, Any]) -> model_types.ModelType:
    return model_types.MODEL_TYPES[raw["model_type"]]
