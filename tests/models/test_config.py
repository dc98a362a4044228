"""config.json: what transformers takes is taken with the same meaning, the rest is one error."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax import errors
from lora_jax.models import config as model_config
from lora_jax.models import config_keys, model_types, rope, rope_config

SMALL = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=96,
    hidden_size=256,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    dtype="float32",
)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + i / 64 for i in range(32)],
    "long_factor": [1 + i / 4 for i in range(32)],
}


def read(model_type="llama", /, **changes):
    return model_config.from_dict(SMALL | {"model_type": model_type} | changes)


def notes(**changes):
    return model_config.notes(SMALL | changes)


def without(key, **changes):
    return {name: value for name, value in (SMALL | changes).items() if name != key}


# The published config.json of models that are supported, without what all of them have.
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "initializer_range": 0.02}
PUBLISHED = {
    "Llama-2-7b-hf": dict(
        _TOKENS, _name_or_path="meta-llama/Llama-2-7b-hf", architectures=["LlamaForCausalLM"],
        hidden_act="silu", hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
        model_type="llama", num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False,
        torch_dtype="float16", transformers_version="4.31.0.dev0", vocab_size=32000,
    ),
    "TinyLlama-1.1B-Chat-v1.0": dict(
        _TOKENS, attention_bias=False, hidden_act="silu", hidden_size=2048, intermediate_size=5632,
        max_position_embeddings=2048, model_type="llama", num_attention_heads=32,
        num_hidden_layers=22, num_key_value_heads=4, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="bfloat16",
        transformers_version="4.35.0", vocab_size=32000,
    ),
    "Llama-3.2-1B": dict(
        attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009], head_dim=64, hidden_act="silu", hidden_size=2048,
        initializer_range=0.02, intermediate_size=8192, max_position_embeddings=131072,
        mlp_bias=False, model_type="llama", num_attention_heads=32, num_hidden_layers=16,
        num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                          original_max_position_embeddings=8192, rope_type="llama3"),
        rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
        transformers_version="4.45.0.dev0", vocab_size=128256,
    ),
    "Qwen2.5-0.5B-Instruct": dict(
        architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=151645, hidden_act="silu", hidden_size=896, initializer_range=0.02,
        intermediate_size=4864, max_position_embeddings=32768, max_window_layers=21,
        model_type="qwen2", num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2,
        rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True,
        torch_dtype="bfloat16", transformers_version="4.43.1", use_cache=True,
        use_sliding_window=False, vocab_size=151936,
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": dict(
        attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643, hidden_act="silu",
        hidden_size=1536, initializer_range=0.02, intermediate_size=8960,
        max_position_embeddings=131072, max_window_layers=21, model_type="qwen2",
        num_attention_heads=12, num_hidden_layers=28, num_key_value_heads=2, rms_norm_eps=1e-06,
        rope_theta=10000, sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16",
        use_cache=True, use_mrope=False, use_sliding_window=False, vocab_size=151936,
    ),
    "Qwen3-0.6B": dict(
        attention_bias=False, attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
        head_dim=128, hidden_act="silu", hidden_size=1024, initializer_range=0.02,
        intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
        model_type="qwen3", num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8,
        rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
        use_sliding_window=False, vocab_size=151936,
    ),
    "Mistral-7B-v0.3": dict(
        _TOKENS, attention_dropout=0.0, hidden_act="silu", hidden_size=4096,
        intermediate_size=14336, max_position_embeddings=32768, model_type="mistral",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05,
        rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
        torch_dtype="bfloat16", vocab_size=32768,
    ),
    "Yi-6B": dict(
        _TOKENS, hidden_act="silu", hidden_size=4096, intermediate_size=11008,
        max_position_embeddings=4096, model_type="llama", num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=4, pad_token_id=0, rms_norm_eps=1e-05,
        rope_theta=5000000.0, tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=64000,
    ),
    "SmolLM2-135M-Instruct": dict(
        _TOKENS, attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=576,
        intermediate_size=1536, is_llama_config=True, max_position_embeddings=8192, mlp_bias=False,
        model_type="llama", num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3,
        pad_token_id=2, pretraining_tp=1, rms_norm_eps=1e-05, rope_interleaved=False,
        rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, torch_dtype="bfloat16",
        vocab_size=49152, **{"transformers.js_config": {"dtype": "q4"}},
    ),
}  # fmt: skip
RELATIVES = {  # of LLaMA, whose layers differ from each other or from it
    "gemma-3-1b-it": dict(
        attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=None, bos_token_id=2,
        cache_implementation="hybrid", eos_token_id=[1, 106], final_logit_softcapping=None,
        head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
        initializer_range=0.02, intermediate_size=6912, max_position_embeddings=32768,
        model_type="gemma3_text", num_attention_heads=4, num_hidden_layers=26,
        num_key_value_heads=1, pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06,
        rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
        sliding_window_pattern=6, torch_dtype="bfloat16", transformers_version="4.50.0.dev0",
        use_cache=True, vocab_size=262144,
    ),
    "SmolLM3-3B": dict(
        attention_bias=False, attention_dropout=0.0, bos_token_id=None, eos_token_id=128012,
        hidden_act="silu", hidden_size=2048, initializer_range=0.02, intermediate_size=11008,
        layer_types=36 * ["full_attention"], max_position_embeddings=65536, max_window_layers=28,
        mlp_bias=False, model_type="smollm3", no_rope_layer_interval=4,
        no_rope_layers=9 * [1, 1, 1, 0], num_attention_heads=16, num_hidden_layers=36,
        num_key_value_heads=4, pad_token_id=128004, pretraining_tp=2, rms_norm_eps=1e-06,
        rope_scaling=None, rope_theta=5000000.0, sliding_window=None, torch_dtype="bfloat16",
        use_cache=False, use_sliding_window=False, vocab_size=128256,
    ),
    "granite-3.3-2b-instruct": dict(
        _TOKENS, attention_bias=False, attention_dropout=0.0, attention_multiplier=0.015625,
        embedding_multiplier=12.0, hidden_act="silu", hidden_size=2048, initializer_range=0.02,
        intermediate_size=8192, logits_scaling=8.0, max_position_embeddings=131072, mlp_bias=False,
        model_type="granite", num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=8,
        residual_multiplier=0.22, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000000.0,
        tie_word_embeddings=True, torch_dtype="bfloat16", vocab_size=49159,
    ),
}  # fmt: skip
_PHI = dict(
    architectures=["Phi3ForCausalLM"], attention_bias=False, attention_dropout=0.0, auto_map={},
    embd_pdrop=0.0, hidden_act="silu", hidden_size=3072, initializer_range=0.02,
    intermediate_size=8192, model_type="phi3", num_hidden_layers=32,
    original_max_position_embeddings=4096, resid_pdrop=0.0, rms_norm_eps=1e-05, rope_theta=10000.0,
    torch_dtype="bfloat16", transformers_version="4.45.0", use_cache=True,
)  # fmt: skip
PHI = {
    "Phi-3-mini-4k-instruct": dict(
        _PHI, bos_token_id=1, eos_token_id=32000, max_position_embeddings=4096,
        num_attention_heads=32, num_key_value_heads=32, pad_token_id=32000, rope_scaling=None,
        sliding_window=2047, tie_word_embeddings=False, vocab_size=32064,
    ),
    "Phi-4-mini-instruct": dict(
        _PHI, bos_token_id=199999, eos_token_id=199999, full_attn_mod=1, interpolate_factor=1,
        lm_head_bias=False, max_position_embeddings=131072, mlp_bias=False,
        num_attention_heads=24, num_key_value_heads=8, pad_token_id=199999,
        partial_rotary_factor=0.75, sliding_window=262144, tie_word_embeddings=True,
        vocab_size=200064, rope_scaling=dict(
            type="longrope", short_factor=48 * [1.0], long_factor=[1 + i for i in range(48)]),
    ),
}  # fmt: skip
GEMMA2 = {
    "gemma-2-2b-it": dict(
        attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=50.0, bos_token_id=2,
        cache_implementation="hybrid", eos_token_id=[1, 107], final_logit_softcapping=30.0,
        head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        hidden_size=2304, initializer_range=0.02, intermediate_size=9216,
        max_position_embeddings=8192, model_type="gemma2", num_attention_heads=8,
        num_hidden_layers=26, num_key_value_heads=4, pad_token_id=0, query_pre_attn_scalar=256,
        rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096, torch_dtype="bfloat16",
        use_cache=True, vocab_size=256000,
    ),
    "gemma-2-27b-it": dict(
        attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=50.0, bos_token_id=2,
        cache_implementation="hybrid", eos_token_id=1, final_logit_softcapping=30.0, head_dim=128,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=4608,
        initializer_range=0.02, intermediate_size=36864, max_position_embeddings=8192,
        model_type="gemma2", num_attention_heads=32, num_hidden_layers=46, num_key_value_heads=16,
        pad_token_id=0, query_pre_attn_scalar=144, rms_norm_eps=1e-06, rope_theta=10000.0,
        sliding_window=4096, sliding_window_size=4096, torch_dtype="bfloat16", use_cache=True,
        vocab_size=256000, _attn_implementation="eager",
    ),
}  # fmt: skip
_OLMO = dict(
    attention_bias=False, attention_dropout=0.0, eos_token_id=100257, hidden_act="silu",
    hidden_size=4096, initializer_range=0.02, intermediate_size=11008, num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=32, pad_token_id=100277, rms_norm_eps=1e-06,
    rope_theta=500000, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
OLMO = {
    "OLMo-2-1124-7B": dict(
        _OLMO, max_position_embeddings=4096, model_type="olmo2", rope_scaling=None,
        vocab_size=100352,
    ),
    "Olmo-3-7B-Instruct": dict(
        _OLMO, layer_types=8 * [*3 * ["sliding_attention"], "full_attention"],
        max_position_embeddings=65536, model_type="olmo3", rope_scaling=dict(
            attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0,
            original_max_position_embeddings=8192, rope_type="yarn"),
        sliding_window=4096, vocab_size=100278,
    ),
}  # fmt: skip
HEADS = {  # (num_attention_heads, num_key_value_heads, head_dim)
    "Llama-2-7b-hf": (32, 32, 128),
    "TinyLlama-1.1B-Chat-v1.0": (32, 4, 64),
    "Llama-3.2-1B": (32, 8, 64),
    "Qwen2.5-0.5B-Instruct": (14, 2, 64),
    "DeepSeek-R1-Distill-Qwen-1.5B": (12, 2, 128),
    "Qwen3-0.6B": (16, 8, 128),
    "Mistral-7B-v0.3": (32, 8, 128),
    "Yi-6B": (32, 4, 128),
    "SmolLM2-135M-Instruct": (9, 3, 64),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_taken(name):
    raw = PUBLISHED[name]
    config = model_config.from_dict(raw)
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert heads == HEADS[name]
    assert config.rope.rope_theta == raw.get("rope_theta", 10000)
    assert config.rope.rope_type == ("llama3" if name == "Llama-3.2-1B" else "default")
    assert set(config.sliding_windows) == {None}
    assert config.context == config.max_position_embeddings == raw["max_position_embeddings"]
    assert config.dtype == "bfloat16" and config.quantization is None
    listed = ["config.json has keys that llama does not read: is_llama_config"]
    assert model_config.notes(raw) == (listed if "Smol" in name else [])


def test_published_configs_of_relatives():
    gemma, smollm, granite = (model_config.from_dict(RELATIVES[name]) for name in RELATIVES)
    assert all(config.tie_word_embeddings for config in (gemma, smollm, granite))
    assert [*map(model_config.notes, RELATIVES.values())] == [
        [], ["config.json has keys that smollm3 does not read: max_window_layers"], []
    ]  # fmt: skip

    assert gemma.sliding_windows == (4 * (5 * (512,) + (None,)) + (512, 512))
    kinds = [rope.rope_theta for rope in gemma.ropes]
    assert kinds == [1e4 if window else 1e6 for window in gemma.sliding_windows]
    assert gemma.embedding_multiplier == 1152**0.5 and gemma.attention_multiplier is None
    assert gemma.hidden_act == "gelu_pytorch_tanh" and gemma.norms == "both" and gemma.norm_offset

    assert smollm.ropes == 9 * (3 * (smollm.rope,) + (None,))
    assert smollm.rope.rope_theta == 5e6 and set(smollm.sliding_windows) == {None}

    names = ("embedding", "attention", "residual")
    factors = [getattr(granite, f"{name}_multiplier") for name in names]
    assert factors == [12, 0.015625, 0.22] and granite.logits_scaling == 8
    assert not granite.ropes and granite.norms == "pre"


def test_published_configs_of_phi():
    first, mini = map(model_config.from_dict, PHI.values())
    assert first.fused_projections and not first.tie_word_embeddings and not first.qkv_bias
    assert first.sliding_windows == 32 * (2047,) and first.rope == rope_config.RopeConfig()
    assert mini.tie_word_embeddings and mini.head_dim == 128 and mini.context == 131072
    assert mini.rope == rope_config.RopeConfig(
        "longrope", factor=32.0, original_max_position_embeddings=4096,
        short_factor=48 * (1.0,), long_factor=tuple(map(float, range(1, 49))),
        partial_rotary_factor=0.75,
    )  # fmt: skip
    (dropout,) = model_config.notes(PHI["Phi-3-mini-4k-instruct"] | {"resid_pdrop": 0.1})
    assert dropout == "resid_pdrop 0.1 of config.json is not applied in training"
    (unread,) = model_config.notes(PHI["Phi-4-mini-instruct"])
    assert unread.endswith("phi3 does not read: full_attn_mod, interpolate_factor")


def test_published_configs_of_gemma2():
    small, large = map(model_config.from_dict, GEMMA2.values())
    unread = "config.json has keys that gemma2 does not read: sliding_window_size"
    assert [*map(model_config.notes, GEMMA2.values())] == [[], [unread]]
    assert small.sliding_windows == 13 * (4096, None) and not small.ropes and not small.qk_norm
    assert (small.norms, small.norm_offset, small.embedding_multiplier) == ("both", 1, 2304**0.5)
    assert small.tie_word_embeddings and small.hidden_act == "gelu_pytorch_tanh"
    assert (small.attn_logit_softcapping, small.final_logit_softcapping) == (50, 30)
    assert small.attention_multiplier is None and large.attention_multiplier == 144**-0.5
    stretched = GEMMA2["gemma-2-2b-it"] | dict(rope_scaling=dict(rope_type="linear", factor=2.0))
    assert model_config.from_dict(stretched).context == 16384


@pytest.mark.parametrize(
    "model_type, changes, caps",
    [
        ("gemma2", {}, (50, 30)),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 0}, (None, None)),
        ("gemma2", {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 5}, (None, 5)),
        ("gemma3_text", {}, (None, None)),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, (None, 30)),
        ("qwen2", {"attn_logit_softcapping": 0, "final_logit_softcapping": None}, (None, None)),
    ],
)
def test_a_soft_cap_that_is_null_or_zero_is_none(model_type, changes, caps):
    found = read(model_type, **changes)
    assert (found.attn_logit_softcapping, found.final_logit_softcapping) == caps


def test_published_configs_of_olmo():
    second, third = map(model_config.from_dict, OLMO.values())
    assert [*map(model_config.notes, OLMO.values())] == [[], []]
    for each in (second, third):
        assert (each.norms, each.norm_offset, each.qk_norm) == ("post", 0, "projection")
    assert not second.ropes and second.rope == rope_config.RopeConfig(rope_theta=5e5)
    assert third.sliding_windows == 8 * (4096, 4096, 4096, None)
    assert third.ropes == 8 * (3 * (second.rope,) + (third.rope,))
    assert third.rope.rope_type == "yarn" and third.context == 65536
    without = {key: value for key, value in OLMO["Olmo-3-7B-Instruct"].items()
               if key not in ("layer_types", "sliding_window")}  # fmt: skip
    assert model_config.from_dict(without) == third


def test_olmo3_gives_its_rope_theta_to_the_layers_without_a_window_alone():
    """As transformers, which reads settings for the others in rope_parameters only."""
    found = read("olmo3", rope_theta=100.0, num_hidden_layers=4)
    assert [rope.rope_theta for rope in found.ropes] == [5e5, 5e5, 5e5, 100.0]
    nested = {"sliding_attention": {"rope_theta": 7.0}, "full_attention": None}
    found = read("olmo3", rope_parameters=nested, num_hidden_layers=4)
    assert [rope.rope_theta for rope in found.ropes] == [7.0, 7.0, 7.0, 5e5]


@pytest.mark.parametrize(
    "model_type, changes, expected",
    [
        ("gemma3_text", {"query_pre_attn_scalar": 64}, {"attention_multiplier": 0.125}),
        ("gemma3_text", {"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ("gemma", {}, {"embedding_multiplier": 16.0, "norm_offset": 1.0}),
        ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_act": None, "head_dim": None, "tie_word_embeddings": None},
         {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "tie_word_embeddings": True}),
        ("seed_oss", {}, {"qkv_bias": True, "o_bias": False, "mlp_bias": False}),
        ("seed_oss", {"attention_bias": False, "attention_out_bias": True},
         {"qkv_bias": False, "o_bias": True}),
        ("granite", {}, {"attention_multiplier": 1.0}),
        ("granite", {"logits_scaling": 4}, {"logits_scaling": 4.0}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, {"ropes": ()}),
        ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
         {"sliding_windows": (None, 8, None)}),
        # transformers goes by layer_types here, and not by use_sliding_window.
        ("smollm3", {"sliding_window": 8, "layer_types": ["sliding_attention", *2 * ["attention"]]},
         {"sliding_windows": (8, None, None)}),
        ("gemma3_text", {"head_dim": None, "query_pre_attn_scalar": None}, {"head_dim": 256}),
        ("phi3", {"rms_norm_eps": None, "max_position_embeddings": None},
         {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
        ("olmo2", {"attention_bias": True},
         {"rms_norm_eps": 1e-5, "qkv_bias": True, "o_bias": True}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ("exaone4", {"sliding_window": None, "sliding_window_pattern": None},
         {"sliding_windows": 3 * (None,), "ropes": ()}),
        ("exaone4", {"sliding_window": 8, "sliding_window_pattern": "LG", "num_hidden_layers": 5},
         {"sliding_windows": (8, None, 8, None, None)}),
        # transformers goes by sliding_window here, and not by layer_types.
        ("exaone4", {"sliding_window": 8, "layer_types": 3 * ["full_attention"]},
         {"ropes": 3 * (None,)}),
        ("cwm", {"num_hidden_layers": 5}, {"sliding_windows": (None, 8192, 8192, 8192, None)}),
        ("internlm3", {"qkv_bias": False, "bias": False}, {"head_dim": 128, "qkv_bias": False}),
        ("iquestcoder", {"clip_qkv": None}, {"head_dim": 128, "rms_norm_eps": 1e-5}),
    ],
)  # fmt: skip
def test_relatives_have_defaults_of_their_own(model_type, changes, expected):
    found = read(model_type, **changes)
    assert found == dataclasses.replace(found, **expected)


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 100, "rope_scaling": {
            "type": "linear", "factor": 8.0}},
        {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100}}},
    ],
    ids=["transformers 4", "transformers 5"],
)  # fmt: skip
def test_gemma_has_two_rotary_embeddings(rotary):
    found = read("gemma3_text", **rotary, sliding_window_pattern=3)
    local, _, whole = found.ropes
    assert local == rope_config.RopeConfig(rope_theta=100.0) and whole == found.rope
    assert (whole.rope_type, whole.factor, whole.rope_theta) == ("linear", 8.0, 5e5)
    assert found.context == found.max_position_embeddings


def test_gemma_reads_both_forms_of_the_rotary_embedding_together():
    """As transformers: rope_scaling is added to full_attention, and keys beside it are not read."""
    whole = {"full_attention": {"rope_theta": 5e5}, "rope_theta": 7.0}
    scaling = {"rope_type": "linear", "factor": 4.0}
    raw = SMALL | dict(model_type="gemma3_text", rope_parameters=whole, rope_scaling=scaling)
    rope = model_config.from_dict(raw).rope
    assert (rope.rope_type, rope.factor, rope.rope_theta) == ("linear", 4.0, 5e5)
    assert "rope_parameters.rope_theta" in model_config.notes(raw)[0]
    flat = model_config.from_dict(raw | dict(rope_parameters=scaling, rope_scaling=None)).rope
    assert flat == rope_config.RopeConfig(rope_theta=1e6)


@pytest.mark.parametrize(
    "key, value",
    [
        *(("neftune_noise_alpha", 5.0), ("gradient_checkpointing", True), ("foo", {"a": [1]})),
        *(("cache_implementation", "static"), ("_attn_implementation", "sdpa"), ("pruned", "x")),
        *(("attention_dropout", 0.1), ("attention_dropout", None), ("classifier_dropout", 0.1)),
        *(("sep_token_id", 5), ("model_max_length", 4096), ("partial_rotary_factor", 1.0)),
        *(("is_llama_config", True), ("rope_interleaved", False), ("pretraining_tp", 2)),
        *(("eos_token_id", [1, 2]), ("eos_token_id", "</s>"), ("pad_token_id", -1)),
        *(("use_sliding_window", True), ("sliding_window", 8), ("layer_types", ["x"])),
        *(("logits_scaling", 1.0), ("num_experts", 1), ("is_causal", True)),
        *(("position_embedding_type", "rope"), ("hidden_act", "swish"), ("hidden_act", None)),
    ],
)
def test_keys_that_change_nothing_are_taken(key, value):
    assert read(**{key: value}) == read()


def test_keys_that_a_model_does_not_read_are_listed_in_one_line():
    found = notes(foo=1, use_cache=False, _x=2, off=None, do_sample=True, tokenizer_class="T")
    assert found == ["config.json has keys that llama does not read: foo"]
    many, dropout = notes(**{f"key{i}": 1 for i in range(20)}, attention_dropout=0.1)
    assert "key7 and 12 more" in many and "key8" not in many
    assert "attention_dropout 0.1" in dropout and "not applied" in dropout
    assert notes() == []


def test_a_key_of_another_model_type_is_not_read():
    assert read("mistral", attention_bias=True, mlp_bias=True) == read("mistral")
    assert not read("qwen2", attention_bias=True).o_bias
    raw = SMALL | {"model_type": "mistral", "attention_bias": True}
    assert "mistral does not read: attention_bias" in model_config.notes(raw)[0]


@pytest.mark.parametrize("key", config_keys.NOT_IMPLEMENTED)
def test_keys_that_change_the_computation_are_refused_by_name(key):
    with pytest.raises(errors.UserError, match=rf"{key} = (0\.5|False) is not implemented"):
        read(**{key: False if key == "is_causal" else 0.5})


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(num_hidden_layers=3.0, vocab_size=96.0), {}),
        (dict(num_key_value_heads=None), {"num_key_value_heads": 4}),
        (dict(head_dim=None), {"head_dim": 64}),
        (dict(head_dim=32), {"head_dim": 32}),
        (dict(rms_norm_eps=None), {"rms_norm_eps": 1e-6}),
        (dict(rms_norm_eps=1), {"rms_norm_eps": 1.0}),
        (dict(max_position_embeddings=None), {"max_position_embeddings": 2048}),
        (dict(attention_bias=1, mlp_bias=None), {"qkv_bias": True, "o_bias": True}),
        (dict(tie_word_embeddings=None), {}),
        (dict(dtype="half"), {"dtype": "bfloat16"}),
        (dict(dtype="float"), {}),
        (dict(dtype="double"), {}),
        (dict(dtype="bf16"), {"dtype": "bfloat16"}),
        (dict(dtype="torch.bfloat16"), {"dtype": "bfloat16"}),
        (dict(dtype="auto"), {}),
        (dict(dtype=None, torch_dtype="bfloat16"), {"dtype": "bfloat16"}),
        (dict(torch_dtype="bfloat16"), {}),
    ],
)
def test_values_are_taken_as_transformers_takes_them(changes, expected):
    assert read(**changes) == dataclasses.replace(read(), **expected)


@pytest.mark.parametrize(
    "model_type, changes, windows",
    [
        ("mistral", {}, (4096,) * 3),
        ("mistral", {"sliding_window": None}, (None,) * 3),
        ("mistral", {"sliding_window": 8, "use_sliding_window": False}, (8,) * 3),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, (4096,) * 3),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
         (None, None, 8)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, (None,) * 3),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8,
                   "layer_types": ["attention", "sliding_attention", "full_attention"]},
         (None, 8, None)),
        ("qwen3", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, (None,) * 3),
        ("llama", {"sliding_window": 8}, (None,) * 3),
        ("ministral3", {"rope_parameters": None}, (None,) * 3),
        ("ministral3", {"rope_parameters": None, "sliding_window": 8}, (8,) * 3),
        ("phi3", {}, (None,) * 3),
        ("phi3", {"sliding_window": 8}, (8,) * 3),
    ],
)  # fmt: skip
def test_sliding_windows(model_type, changes, windows):
    assert read(model_type, **changes).sliding_windows == windows


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(num_attention_heads="four", vocab_size="96", hidden_size=None),
         ["num_attention_heads = 'four'", "vocab_size = '96'", "hidden_size is missing"]),
        (dict(hidden_size=258), ["258 is no multiple of num_attention_heads 4"]),
        (dict(head_dim=7), ["head_dim 7 is odd"]),
        (dict(num_hidden_layers=2.5), ["num_hidden_layers = 2.5"]),
        (dict(num_hidden_layers=10**9), ["num_hidden_layers = 1000000000"]),
        (dict(vocab_size=10**400), ["vocab_size = 1"]),
        (dict(rms_norm_eps=float("nan"), attention_bias="true"), ["rms_norm_eps", "'true'"]),
        (dict(rope_scaling=[1]), ["rope_scaling = [1] is not an object"]),
        (dict(rope_scaling={"type": "linear", "factor": "2"}), ["factor = '2'"]),
        (dict(rope_scaling={"type": "linear", "factor": 0}), ["factor = 0 is not a number above"]),
        (dict(rope_scaling={"type": ["yarn"]}), ["rope type ['yarn'] is not implemented"]),
        (dict(rope_scaling={"type": "yarn"}), ["rope parameter factor is missing"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor = 0.5"]),
        (dict(model_type="qwen2", layer_types=["full_attention"]), ["layer_types"]),
        (dict(model_type="smollm3", no_rope_layers=[1, 0]), ["no_rope_layers"]),
        (dict(model_type="smollm3", no_rope_layer_interval=0), ["no_rope_layer_interval"]),
        (dict(model_type="gemma3_text", hidden_activation="gelu"), ["hidden_activation = 'gelu'"]),
        (dict(model_type="gemma3_text", sliding_window_pattern="6"), ["sliding_window_pattern"]),
        (dict(model_type="gemma2", attn_logit_softcapping="50", final_logit_softcapping=-1),
         ["attn_logit_softcapping = '50'", "final_logit_softcapping = -1"]),
        (dict(model_type="qwen3", final_logit_softcapping=30.0), ["final_logit_softcapping"]),
        (dict(model_type="gemma3_text", rope_parameters={"sliding_attention": {
            "rope_type": "longrope"}}), ["short_factor is missing"]),
        (dict(model_type="gemma3_text", rope_parameters={"full_attention": "x",
              "sliding_attention": 3}), ["full_attention = 'x'", "sliding_attention = 3"]),
        (dict(model_type="granite", residual_multiplier="x"), ["residual_multiplier"]),
        (dict(model_type="phi3", rope_scaling={"type": "linear", "factor": 2.0}),
         ["'linear' is not implemented (default, longrope, su, yarn are)"]),
        (dict(model_type="phi3", rope_scaling={"type": "yarn", "factor": 2.0}),
         ["short_factor is missing", "long_factor is missing"]),
        (dict(model_type="phi3", partial_rotary_factor=2), ["rotates 128 of the 64 dimensions"]),
        (dict(model_type="phi3", partial_rotary_factor=0.01), ["rotates 0 of the 64 dimensions"]),
        (dict(model_type="paligemma", text_config={"model_type": "gemma3_text"}),
         ["found:    'paligemma'", "inside, in text_config", "inside, gemma3, mistral3"]),
        (dict(model_type="gemma3"), ["text_config, the language model inside of gemma3", "None"]),
        (dict(model_type="gemma3", text_config={"sliding_window_pattern": "6"}),
         ["config.json: text_config", "sliding_window_pattern"]),
        (dict(model_type="qwen2", layer_types=["linear_attention"] * 3), ["'linear_attention'"]),
        (dict(model_type="mistral3", text_config={"model_type": "mistral4"}),
         ["config.json: text_config", "found:    'mistral4'"]),
        (dict(model_type="ministral3", rope_scaling={"type": "yarn", "factor": 2.0}),
         ["llama_4_scaling_beta is missing"]),
        (dict(model_type="ministral3", rope_parameters={"llama_4_scaling_beta": 0.1}),
         ["llama_4_scaling_beta = 0.1 with the type default"]),
        (dict(model_type=["llama"]), ["['llama']"]),
        (dict(dtype=["float32"], quantization_config=5), ["['float32']"]),
        (dict(quantization_config={"quant_method": ["gptq"]}), ["quant_method ['gptq']"]),
        (dict(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": "128",
                                   "modules_in_block_to_quantize": 5}),
         ["group_size '128'", "modules_in_block_to_quantize 5"]),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_one_error(changes, named):
    with pytest.raises(errors.UserError) as raised:
        model_config.from_dict(SMALL | changes)
    assert all(text in str(raised.value) for text in named), raised.value


# Rotary embedding. Expected: inv_freq[[0, 5, 10, 15, 20, 31]] and attention_scaling of
# transformers' LlamaRotaryEmbedding for SMALL.
PLAIN = [1.0, 0.23713736236095428, 0.05623412877321243, 0.01333521492779255,
         0.003162277862429619, 0.0001333521504420787]  # fmt: skip
LONGER = [1.0, 0.23713736236095428, 0.04001274332404137, 0.005641821771860123,
          0.0007905694656074047, 3.333803761051968e-05]  # fmt: skip
SCALE = 1.138629436111989


@pytest.mark.parametrize(
    "parameters, above, inv_freq, scale",
    [
        (YARN, {}, [1.0, 0.23713736236095428, 0.05623412877321243, 0.009488517418503761,
                    0.0013378867879509926, 3.333803761051968e-05], SCALE),
        (YARN | {"original_max_position_embeddings": 1024}, {}, LONGER, SCALE),
        (YARN, {"original_max_position_embeddings": 1024}, LONGER, SCALE),
        (YARN | {"original_max_position_embeddings": 2048},
         {"original_max_position_embeddings": 1024}, LONGER, SCALE),
        (YARN | {"original_max_position_embeddings": 1024, "factor": None}, {}, LONGER, SCALE),
        (YARN | {"original_max_position_embeddings": 1024, "factor": 1}, {}, PLAIN, 1.0),
        (YARN | {"original_max_position_embeddings": 1024, "truncate": None}, {},
         [1.0, 0.23713736236095428, 0.041017964482307434, 0.005573897156864405,
          0.0007905694656074047, 3.333803761051968e-05], SCALE),
        (YARN | {"original_max_position_embeddings": 1024, "truncate": False, "beta_fast": 0,
                 "beta_slow": 2}, {},
         [1.0, 0.23713736236095428, 0.037213925272226334, 0.003633568063378334,
          0.0007905694656074047, 3.333803761051968e-05], SCALE),
        (YARN | {"original_max_position_embeddings": 1024, "attention_factor": 0.5, "mscale": 0.7},
         {}, LONGER, 0.5),
        (YARN | {"original_max_position_embeddings": 1024, "mscale": 0.7, "mscale_all_dim": 1.3},
         {}, LONGER, 0.9295234923939468),
        (YARN | {"original_max_position_embeddings": 1024, "mscale": 0.7, "mscale_all_dim": 0}, {},
         LONGER, SCALE),
        ({"rope_type": "linear", "factor": 0.5}, {},
         [2.0, 0.47427472472190857, 0.11246825754642487, 0.0266704298555851,
          0.006324555724859238, 0.0002667043008841574], 1.0),
        ({"rope_type": "default", "factor": 8, "extra": 1}, {}, PLAIN, 1.0),
    ],
)  # fmt: skip
def test_rotary_frequencies_equal_those_of_transformers(parameters, above, inv_freq, scale):
    config = read(rope_parameters=parameters, **above)
    found, factor = rope._inv_freq(jnp.zeros((1, 1), int), 64, config.rope, 4096)
    np.testing.assert_allclose(np.asarray(found)[[0, 5, 10, 15, 20, 31]], inv_freq, rtol=1e-5)
    assert factor == pytest.approx(scale)


@pytest.mark.parametrize(
    "length, parameters, above, is_long, scale",
    [
        (1024, {}, {"original_max_position_embeddings": 1024}, False, 1.0954451150103321),
        (1025, {}, {"original_max_position_embeddings": 1024}, True, 1.0954451150103321),
        (1024, {"factor": 8}, {"original_max_position_embeddings": 1024}, False, 1.140175425099138),
        (1024, {"attention_factor": 1.5, "factor": 8}, {}, False, 1.5),
        (1024, {"original_max_position_embeddings": 512}, {}, True, 1.1547005383792515),
        (4096, {}, {}, False, 1.0),
    ],
)
def test_longrope_has_factors_for_short_and_for_long_sequences(
    length, parameters, above, is_long, scale
):
    """Values of transformers, as above."""
    config = read(rope_parameters=LONGROPE | parameters, **above)
    found, factor = rope._inv_freq(jnp.int32(length), 64, config.rope, 4096)
    expected = (
        [1.0, 0.1053943857550621, 0.016066893935203552, 0.0028074136935174465,
         0.0005270463298074901, 1.5240245375025552e-05]
        if is_long
        else [1.0, 0.2199534922838211, 0.04863492026925087, 0.01080321241170168,
              0.0024093545507639647, 8.983723091660067e-05]
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(found)[[0, 5, 10, 15, 20, 31]], expected, rtol=1e-6)
    assert factor == pytest.approx(scale)


def test_names_of_longrope_in_older_files_of_phi():
    longrope = read("phi3", rope_parameters=LONGROPE, max_position_embeddings=8192)
    assert longrope.rope.original_max_position_embeddings == 4096  # transformers' default
    for name in ("su", "yarn"):
        scaling = LONGROPE | {"rope_type": None, "type": name}
        assert read("phi3", rope_scaling=scaling, max_position_embeddings=8192) == longrope
    raw = SMALL | dict(model_type="phi3", rope_parameters=LONGROPE)
    assert "without original_max_position_embeddings: 4096, is" in model_config.notes(raw)[0]
    with pytest.raises(errors.UserError, match="'su' is not implemented"):
        read(rope_scaling=LONGROPE | {"rope_type": "su"})


@pytest.mark.parametrize(
    "changes, theta",
    [
        (dict(rope_parameters={}, rope_theta=5e5), 5e5),
        (dict(rope_parameters=None), 1e4),
        (dict(rope_theta=5e5), 1e4),  # the one inside precedes the one beside
        (dict(rope_scaling={"type": "default"}, rope_theta=3), 3.0),  # rope_scaling precedes
        (dict(rope_scaling={"type": "default", "rope_theta": None}, rope_theta=3), 3.0),
    ],
)
def test_rope_theta_in_all_its_places(changes, theta):
    assert read(**changes).rope == rope_config.RopeConfig(rope_theta=theta)


def test_an_unknown_rope_parameter_is_taken_and_listed():
    parameters = {"rope_type": "default", "rope_theta": 1e4, "extra": 1}
    assert read(rope_parameters=parameters) == read()
    assert "rope_parameters.extra" in notes(rope_parameters=parameters)[0]


def test_yarn_says_which_length_it_scales():
    """Qwen: max_position_embeddings may be the length before scaling or after it."""
    length = {"original_max_position_embeddings": 1024}
    assert notes(rope_parameters=YARN | length) == []  # 4 · 1024 = 4096
    (assumed,) = notes(rope_parameters=YARN)
    assert "4096, is taken as the length before scaling" in assumed
    (other,) = notes(rope_parameters=YARN | length, max_position_embeddings=8192)
    assert "scales by factor, 4," in other and "is 8" in other
    assert read(rope_parameters=YARN | length).context == 4096
    assert read(rope_parameters=YARN | length, max_position_embeddings=1024).context == 4096
    assert read(rope_parameters=YARN).context == 16384
    llama3 = PUBLISHED["Llama-3.2-1B"]["rope_scaling"]
    assert read(rope_parameters=llama3, max_position_embeddings=131072).context == 131072


# The file


def write(folder: pathlib.Path, data: bytes):
    (folder / "config.json").write_bytes(data)
    return folder


def test_a_file_is_read_as_python_reads_json(tmp_path):
    text = json.dumps(SMALL | {"foo": float("nan"), "bar": -float("inf")})
    assert model_config.load(write(tmp_path, text.encode())) == read()
    assert model_config.load(write(tmp_path, b"\xef\xbb\xbf" + text.encode())) == read()


@pytest.mark.parametrize(
    "data", [b"", b"// x\n{}", b"[]", b"\xff\xfe{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, data):
    with pytest.raises(errors.UserError, match=r"config\.json"):
        model_config.load(write(tmp_path, data))


# Random changes

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 4, 8, 2**31, 10**30])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["yarn", "linear", "llama3", "default", "full_attention", "gptq"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=3,
)
rope_settings = st.dictionaries(
    st.sampled_from([field.name for field in dataclasses.fields(rope_config.RopeConfig)]), values
)
known = st.sampled_from(sorted({*SMALL, *_TOKENS, *config_keys.NOT_IMPLEMENTED} | {
    "head_dim", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "rope_scaling", "rope_theta", "attention_bias", "mlp_bias", "torch_dtype",
    "partial_rotary_factor", "original_max_position_embeddings", "quantization_config",
}))  # fmt: skip


@given(
    st.sampled_from([*model_types.MODEL_TYPES]),
    st.dictionaries(known, values | rope_settings, max_size=3),
)
def test_random_values_are_taken_or_one_error(model_type, changes):
    raw = {"model_type": model_type} | (SMALL | changes)
    try:
        config = model_config.from_dict(raw)
    except errors.UserError as error:
        assert error.found and error.where.startswith("config.json")
        return
    assert model_config.from_dict(json.loads(json.dumps(raw))) == config
    assert len(config.sliding_windows) == config.num_hidden_layers
    assert config.num_attention_heads % config.num_key_value_heads == 0
    for key in SMALL.keys() - changes.keys() - {"architectures", "rope_parameters", "hidden_act"}:
        if key not in ("model_type", "dtype"):
            assert getattr(config, key) == SMALL[key]


@given(
    st.sampled_from([*model_types.MODEL_TYPES]),
    st.dictionaries(st.text(max_size=8), values, max_size=2),
)
def test_random_keys_change_nothing(model_type, extra):
    extra = {f"x{key}": value for key, value in extra.items()}
    # Not those of a LLaMA, with which Ministral 3 is not complete.
    rotary = {"rope_parameters": None, "max_position_embeddings": None}
    raw = SMALL | {"model_type": model_type} | rotary
    assert model_config.from_dict(extra | raw) == model_config.from_dict(raw)
    assert len(model_config.notes(extra | raw)) <= 1
