"""config.json and names of models with a language model inside."""

import re

import pytest
import transformers

from lora_jax import errors
from lora_jax.models import composite, config_keys, names
from lora_jax.models import config as model_config

# What published files have in text_config; all else is the default of its model type.
GEMMA = dict(
    hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34,
    rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=1024,
)  # fmt: skip
VICUNA = dict(
    _name_or_path="lmsys/vicuna-7b-v1.5", architectures=["LlamaForCausalLM"], model_type="llama",
    max_position_embeddings=4096, rms_norm_eps=1e-5, torch_dtype="float16", vocab_size=32064,
)  # fmt: skip
NEMO = dict(
    hidden_size=5120, head_dim=128, intermediate_size=14336, is_composition=True,
    max_position_embeddings=1024000, model_type="mistral", num_hidden_layers=40,
    num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e9, sliding_window=None,
    vocab_size=131072,
)  # fmt: skip
MINISTRAL = dict(
    attention_dropout=0.0, head_dim=128, hidden_act="silu", hidden_size=3072,
    initializer_range=0.02, intermediate_size=9216, max_position_embeddings=262144,
    model_type="ministral3", num_attention_heads=32, num_hidden_layers=26, num_key_value_heads=8,
    rms_norm_eps=1e-5, rope_parameters=dict(
        beta_fast=32.0, beta_slow=1.0, factor=16.0, llama_4_scaling_beta=0.1, mscale=1.0,
        mscale_all_dim=1.0, original_max_position_embeddings=16384, rope_theta=1e6,
        rope_type="yarn", type="yarn"),
    sliding_window=None, tie_word_embeddings=True, use_cache=True, vocab_size=131072,
)  # fmt: skip
QWEN_VL = dict(  # all keys are beside those of the whole model
    attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645, vision_start_token_id=151652,
    vision_end_token_id=151653, vision_token_id=151654, image_token_id=151655,
    video_token_id=151656, hidden_act="silu", hidden_size=2048, initializer_range=0.02,
    intermediate_size=11008, max_position_embeddings=128000, max_window_layers=70,
    num_attention_heads=16, num_hidden_layers=36, num_key_value_heads=2, rms_norm_eps=1e-6,
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), rope_theta=1e6,
    sliding_window=32768, tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
    use_sliding_window=False, vision_config=dict(depth=32, hidden_act="silu"), vocab_size=151936,
)  # fmt: skip
QWEN3_VL = dict(
    attention_bias=False, head_dim=128, hidden_size=2560, intermediate_size=9728,
    max_position_embeddings=262144, model_type="qwen3_vl_text", num_attention_heads=32,
    num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=dict(
        mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
    rope_theta=5e6, tie_word_embeddings=True, vocab_size=151936,
)  # fmt: skip
STATIC = dict(
    activation_scheme="static", dequantize=False, quant_method="fp8", weight_block_size=None,
    modules_to_not_convert=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
)  # fmt: skip
PUBLISHED = {
    "gemma-3-4b": dict(model_type="gemma3", text_config=GEMMA, torch_dtype="bfloat16"),
    "llava-1.5": dict(model_type="llava", text_config=VICUNA, torch_dtype="float16"),
    "pixtral": dict(model_type="llava", text_config=NEMO, torch_dtype="bfloat16"),
    "ministral-3": dict(
        model_type="mistral3", text_config=MINISTRAL, dtype="bfloat16", quantization_config=STATIC
    ),
    "ministral-3-defaults": dict(model_type="mistral3", text_config=dict(model_type="ministral3")),
    "qwen2-vl": dict(QWEN_VL, model_type="qwen2_vl", tie_word_embeddings=False),
    "qwen2.5-vl-3b": dict(QWEN_VL, model_type="qwen2_5_vl"),
    "qwen2.5-vl-nested": dict(
        model_type="qwen2_5_vl",
        text_config=dict(
            model_type="qwen2_5_vl_text",
            hidden_size=2048,
            image_token_id=151655,
            vision_end_token_id=151653,
        ),
    ),
    "qwen3-vl": dict(model_type="qwen3_vl", text_config=QWEN3_VL, tie_word_embeddings=True),
    "qwen3-vl-defaults": dict(model_type="qwen3_vl", text_config={}),
    "untyped": dict(model_type="llava_onevision", text_config=dict(hidden_size=896)),
    "tied": dict(model_type="llava", text_config=dict(tie_word_embeddings=True)),
    "tied-gemma": dict(model_type="llava", text_config=dict(model_type="gemma")),
    "voxtral": dict(model_type="voxtral", text_config=dict(num_attention_heads=24)),
    "internvl": dict(model_type="internvl", text_config=dict(num_hidden_layers=28)),
}
SAME = (
    *config_keys.REQUIRED,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_text_config_leaves_out_is_as_in_transformers(name):
    raw = PUBLISHED[name]
    whole = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    expected = whole.text_config
    found = model_config.from_dict(raw)
    for key in SAME:
        value = getattr(expected, key, None) or expected.hidden_size // expected.num_attention_heads
        assert getattr(found, key) == value, key
    rope = expected.rope_parameters
    rope = rope.get("full_attention", rope)
    assert (found.rope.rope_theta, found.rope.factor) == (rope["rope_theta"], rope.get("factor"))
    assert found.rope.llama_4_scaling_beta == rope.get("llama_4_scaling_beta", 0)
    assert found.tie_word_embeddings == getattr(whole, "tie_word_embeddings", False)
    stated = {"dtype", "torch_dtype"} & raw.keys()
    assert found.dtype == ("bfloat16" if stated else "float32") and found.quantization is None
    assert found.composite == raw["model_type"]
    assert model_config.notes(raw) == []


@pytest.mark.parametrize("name", composite.COMPOSITES)
def test_the_table_has_the_defaults_of_transformers(name):
    own, theirs = composite.COMPOSITES[name], transformers.CONFIG_MAPPING[name]
    assert theirs.sub_configs_defaults["text_config"].model_type == own.text
    assert getattr(theirs, "tie_word_embeddings", None) == own.is_tied
    said_by_text = theirs(text_config=dict(model_type=own.text, tie_word_embeddings=True))
    tied = getattr(said_by_text, "tie_word_embeddings", False)
    assert bool(own.is_tied or own.reads_tied_text) == tied


@pytest.mark.parametrize("name", composite.TEXTS)
def test_the_sizes_are_the_defaults_of_transformers(name):
    text = composite.language_model(dict(model_type="llava", text_config=dict(model_type=name)))
    expected = transformers.CONFIG_MAPPING[name]()
    for key in config_keys.REQUIRED:
        assert text[key] == getattr(expected, key), key


def test_a_flat_config_is_read_as_strictly_as_text_config():
    flat = dict(QWEN_VL, model_type="qwen2_vl")
    assert model_config.notes(flat | {"foo": 1}) == [
        "config.json has keys that qwen2_vl_text does not read: foo"
    ]
    with pytest.raises(errors.UserError, match="q_lora_rank") as raised:
        model_config.from_dict(flat | {"q_lora_rank": 8})
    assert raised.value.where == "config.json"
    text = {key: flat[key] for key in flat if key != "model_type"}
    assert model_config.from_dict(flat) == model_config.from_dict(
        dict(model_type="qwen2_vl", text_config=text, torch_dtype="bfloat16")
        | {"tie_word_embeddings": True}
    )


def test_the_keys_of_the_whole_model_count():
    """Its tie, dtype and quantization; text_config's dtype and quantization if it has none itself,
    as Qwen3-VL has its dtype."""
    text = dict(GEMMA, tie_word_embeddings=False, torch_dtype="float16", rms_norm_eps=None)
    quantization = dict(quant_method="bitsandbytes", load_in_4bit=True)
    raw = dict(model_type="gemma3", text_config=text, dtype="float32", eos_token_id=[1, 106])
    found = model_config.from_dict(raw | {"quantization_config": quantization})
    assert found.tie_word_embeddings and found.dtype == "float32"
    assert found.quantization.method == "bitsandbytes"
    own = dict(model_type="gemma3", text_config=text)
    assert model_config.from_dict(own | {"torch_dtype": None}).dtype == "bfloat16"  # for float16
    inside = dict(raw, text_config=text | {"quantization_config": quantization})
    assert model_config.from_dict(inside).quantization == found.quantization
    for whole in (inside, raw | {"quantization_config": quantization}):
        assert composite.without(whole, ("quantization_config",)) == raw
    untied = composite.changed(raw, tie_word_embeddings=False, vocab_size=7)
    assert not model_config.from_dict(untied).tie_word_embeddings
    assert untied == raw | {"tie_word_embeddings": False,
                            "text_config": text | {"vocab_size": 7}}  # fmt: skip
    for flat in ({"a": 1}, dict(QWEN_VL, model_type="qwen2_vl")):
        assert composite.changed(flat, vocab_size=7) == flat | {"vocab_size": 7}


LAYER = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("model_type", "name", "inner"),
    [
        ("gemma3", f"language_model.model.{LAYER}", f"model.{LAYER}"),
        ("gemma3", f"model.language_model.{LAYER}", f"model.{LAYER}"),
        ("gemma3", f"language_model.{LAYER}", f"model.{LAYER}"),
        ("gemma3", "language_model.lm_head.weight", "lm_head.weight"),
        ("gemma3", "lm_head.weight", "lm_head.weight"),
        ("gemma3", f"model.{LAYER}", f"model.{LAYER}"),
        ("gemma3", f"vision_tower.vision_model.encoder.{LAYER}", None),
        ("gemma3", f"model.vision_tower.encoder.{LAYER}", None),
        ("llava_next", "image_newline", None),
        ("idefics3", f"model.text_model.{LAYER}", f"model.{LAYER}"),
        ("idefics3", f"model.vision_model.encoder.{LAYER}", None),
        ("qwen2_vl", f"model.{LAYER}", f"model.{LAYER}"),
        ("qwen2_5_vl", f"model.language_model.{LAYER}", f"model.{LAYER}"),
        ("qwen2_vl", "visual.blocks.0.attn.qkv.weight", None),
        ("qwen3_vl", "model.visual.deepstack_merger_list.0.norm.bias", None),
        ("", f"language_model.model.{LAYER}", f"language_model.model.{LAYER}"),
        ("", f"vision_tower.{LAYER}", f"vision_tower.{LAYER}"),
    ],
)
def test_names_inside_of_a_composite_model(model_type, name, inner):
    assert names.is_beside(name, model_type) == (inner is None)
    if inner is not None:
        assert names.inner(name, model_type) == inner
        outer = names.outer(inner, model_type)
        assert names.inner(outer, model_type) == inner
        assert bool(re.match(r"(model\.(language|text)_model|lm_head)\.", outer)) == bool(
            model_type
        )
