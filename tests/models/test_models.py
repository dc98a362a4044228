"""The models against Hugging Face's logits and generations (tests/golden), and config.json."""

import functools
import json
import pathlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import errors
from lora_jax.checkpoints import loader
from lora_jax.models import cache
from lora_jax.models import config as model_config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MODELS = sorted(path.name for path in (GOLDEN / "models").iterdir())
PADDED = ["gemma2", "gemma3", "llama_bias", "llama_dynamic", "qwen2_window", "stories260K"]
CACHED = ["gemma2", "llama_dynamic", "ministral3", "olmo3", "qwen2_window"]
# Of what others have; test_config.py has what is read of them.
FAMILIAR = ["cwm", "gemma", "llama_yarn_factors", "llama_yarn_mscale", "seed_oss"]
TINY = [name for name in MODELS if name != "stories260K"]
TOLERANCE = 2e-4  # float32 logits of std 1.5 to 6; float32 itself is within 1e-4 of float64


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


@functools.cache
def split_model(name):
    return nnx.split(loader.load(GOLDEN / "models" / name, dtype="float32"))


def prompts(name):
    """[(ids [T], logits [T, V])], the shortest first."""
    arrays = golden(name)
    count = sum(key.endswith("_logits") and key.startswith("prompt") for key in arrays)
    return [(arrays[f"prompt{i}_ids"], arrays[f"prompt{i}_logits"]) for i in range(count)]


def logits_of(name, ids, mask=None):
    graphdef, state = split_model(name)
    forward = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask))
    return np.asarray(forward(state, jnp.asarray(ids), None if mask is None else jnp.asarray(mask)))


def read_config(name, form="config.json"):
    return json.loads((GOLDEN / "models" / name / form).read_text())


def with_rope(form, **rope):
    """The config of `llama` in one of its two forms with other rope settings."""
    raw = read_config("llama", form)
    return raw | {"rope_parameters" if form == "config.json" else "rope_scaling": rope}


@pytest.mark.parametrize(
    "name",
    # those of PADDED have the same logits in their padded batch
    [*(name for name in MODELS if name not in (*FAMILIAR, *PADDED)),
     *cases.long(*FAMILIAR, *PADDED)],
)  # fmt: skip
def test_logits_equal_hugging_face(name):
    ids, expected = prompts(name)[-1]  # the longest; the others are in the padded batch
    np.testing.assert_allclose(logits_of(name, ids[None])[0], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [*PADDED, *cases.long(*sorted({*MODELS} - {*PADDED}))])
def test_left_padding_equals_hugging_face(name):
    arrays = golden(name)
    logits = logits_of(name, arrays["pad_ids"], arrays["pad_mask"])
    real = arrays["pad_mask"] == 1
    np.testing.assert_allclose(logits[real], arrays["pad_logits"][real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_right_padding_leaves_the_prompt_alone(name):
    ids, expected = prompts(name)[1]
    padded = np.pad(ids, (0, 7), constant_values=5)[None]
    mask = (np.arange(padded.shape[1]) < len(ids))[None].astype(np.int32)
    logits = logits_of(name, padded, mask)[0, : len(ids)]
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def generate(name, rows, num_new, *, size=None):
    """Greedy tokens after prompts `rows` of different lengths: together, then one at a time.

    size: places of the cache.
    """
    graphdef, state = split_model(name)
    lengths = np.array([len(ids) for ids in rows], np.int32)
    ids = np.zeros((len(rows), max(lengths)), np.int32)
    for own, prompt in zip(ids, rows, strict=True):
        own[: len(prompt)] = prompt

    @jax.jit
    def extend(state, ids, kv, start, num_real, length):
        model = nnx.merge(graphdef, state)
        hidden, kv = model.extend(ids, kv, cache.Place(start, num_real, length))
        last = hidden[jnp.arange(len(rows)), num_real - 1]
        return model.logits(last).argmax(-1).astype(jnp.int32), kv

    size = int(size or max(lengths) + num_new)
    kv = nnx.merge(graphdef, state).empty_cache(len(rows), size)
    token, kv = extend(state, ids, kv, np.zeros_like(lengths), lengths, lengths)
    tokens = [token]
    for _ in range(num_new - 1):
        lengths = lengths + 1
        token, kv = extend(state, token[:, None], kv, lengths - 1, np.ones_like(lengths), lengths)
        tokens.append(token)
    return np.stack(tokens, axis=1)


def golden_generations(name, num_new):
    """(prompts, the tokens that follow each)"""
    arrays = golden(name)
    rows = [arrays[f"prompt{i}_ids"] for i in range(2) if f"gen{i}_ids" in arrays]
    return rows, [arrays[f"gen{i}_ids"][len(ids) :][:num_new] for i, ids in enumerate(rows)]


@pytest.mark.parametrize(
    "name",
    [*CACHED, *cases.long("gemma3", "granite", "llama", "ministral", "mistral", "olmo2", "phi3",
                          "qwen3", "smollm3", "stories260K")],
)  # fmt: skip
def test_cache_reproduces_greedy_generation(name):
    """Prompts of different lengths, padded on the right, then one token at a time."""
    rows, expected = golden_generations(name, 16)
    np.testing.assert_array_equal(generate(name, rows, 16), expected)


def test_a_cache_of_sliding_windows_overwrites_what_no_token_sees():
    rows, expected = golden_generations("mistral", 16)
    window = model_config.load(GOLDEN / "models" / "mistral").sliding_windows[0]
    longest = max(map(len, rows))
    size = window + longest - 1
    assert size < longest + 15
    np.testing.assert_array_equal(generate("mistral", rows, 16, size=size), expected)


@pytest.mark.parametrize(("num_tokens", "row"), [(1, False), (5, False), (12, True), (20, True)])
def test_the_cache_is_written_alike_on_a_tpu(num_tokens, row):
    """Also past the end of the cache, from where the tokens go on at place 0."""
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(2, 6, 3, 20, 4)).astype(np.float32)
    groups = 3 if row else 6
    new = rng.normal(size=(groups, num_tokens, 3, 4)).astype(np.float32)
    start = np.array([0, 3, 17, 8, 19, 41][:groups])
    num_real = np.array([num_tokens, 0, num_tokens, 1, num_tokens // 2, num_tokens][:groups])
    row = np.array([0, 1, 1]) if row else None
    place = cache.Place(start, num_real, start, row)
    new_places = start[:, None] + np.arange(num_tokens)
    places = np.where(np.arange(num_tokens) < num_real[:, None], new_places % 20, 20)
    expected = stored.copy()
    for group, token in np.argwhere(places < 20):
        index = group if row is None else 2 * group + row[group]
        expected[1, index, :, places[group, token]] = new[group, token]
    for write in (cache._write, cache._write_tiles):
        arguments = (places, place) if write is cache._write else (place,)
        np.testing.assert_array_equal(jax.jit(write)(stored, new, 1, *arguments), expected)


def test_dynamic_rope_depends_on_the_length_of_the_input():
    """Beyond max_position_embeddings even the first tokens are rotated more slowly."""
    ids, _ = prompts("llama_dynamic")[-1]
    short = logits_of("llama_dynamic", ids[None, :32])[0]
    longer = logits_of("llama_dynamic", ids[None])[0, :32]
    assert np.abs(short - longer).max() > 0.1


@pytest.mark.parametrize("name", TINY)
def test_both_forms_of_config_json_mean_the_same(name):
    new, old = (model_config.from_dict(read_config(name, f"config{v}.json")) for v in ("", ".v4"))
    assert new == old
    assert new.num_attention_heads == 4 and new.vocab_size == 96


def test_config_has_what_the_model_types_differ_in():
    configs = {name: model_config.from_dict(read_config(name)) for name in TINY}
    assert configs["qwen2_window"].sliding_windows == (None, 8, 8)
    assert configs["mistral"].sliding_windows == (8, 8)
    assert not any(configs["qwen2"].sliding_windows)
    assert configs["qwen3"].qk_norm and not configs["qwen2"].qk_norm
    assert configs["qwen2"].qkv_bias and not configs["qwen2"].o_bias
    assert configs["llama_bias"].o_bias and configs["llama_bias"].mlp_bias
    assert configs["llama_tied_hd16"].tie_word_embeddings
    assert configs["llama_tied_hd16"].head_dim == 16 and configs["llama"].head_dim == 8


def test_unknown_config_keys_are_all_named():
    raw = read_config("llama") | {"logit_softcapping": 30.0, "attention_sinks": 4}
    with pytest.raises(errors.UserError, match=r"(?s)logit_softcapping.*attention_sinks"):
        model_config.from_dict(raw)


def test_unknown_config_keys_that_are_off_are_ignored():
    raw = read_config("llama")
    off = {"logit_softcapping": None, "use_attention_sinks": False}
    assert model_config.from_dict(raw | off) == model_config.from_dict(raw)


@pytest.mark.parametrize("form", ["config.json", "config.v4.json"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_unknown_rope_type_is_named(form, key):
    with pytest.raises(errors.UserError, match="proportional"):
        model_config.from_dict(with_rope(form, **{key: "proportional"}, factor=2.0))


@pytest.mark.parametrize("form", ["config.json", "config.v4.json"])
@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "default", "mrope_section": [2, 1, 1]}, "mrope_section"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1, 2, 3, 4]}, "long_factor is missing"),
        ({"rope_type": "longrope", "short_factor": [1, 2, 3, 4], "long_factor": [1]},
         "long_factor has 1 numbers for 4 pairs"),
        ({"rope_type": "longrope", "short_factor": [1, "2"], "long_factor": 3}, "short_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
    ],
)  # fmt: skip
def test_wrong_rope_parameters_are_named(form, rope, named):
    with pytest.raises(errors.UserError, match=named):
        model_config.from_dict(with_rope(form, **rope))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_wrong_config_settings_are_named(change, named):
    with pytest.raises(errors.UserError, match=named):
        model_config.from_dict(read_config("llama") | change)


def test_folder_without_config_is_named(tmp_path):
    with pytest.raises(errors.UserError, match=r"config\.json") as raised:
        model_config.load(tmp_path)
    assert str(tmp_path) in str(raised.value)
