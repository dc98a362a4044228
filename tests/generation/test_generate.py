"""Generation: Hugging Face's greedy tokens, the sampling filters, stopping and seeds."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import errors, lora
from lora_jax.checkpoints import loader
from lora_jax.generation import config as generation_config
from lora_jax.generation import continuation
from lora_jax.generation import sampling as samplers
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import model_state
from lora_jax.parallel import mesh as sharding

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NUM_NEW = 12


@functools.cache
def parts(name, quantization="none"):
    one = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    folder = GOLDEN / "models" / name
    model = loader.load(folder, dtype="float32", quantization=quantization, mesh=one)
    return model_state.split(model)


@functools.cache
def continue_(name, sampling, eos_ids=(), quantization="none", form="dense"):
    """(prompts, seed) → new tokens; compiled once for each setting."""
    graphdef, trained, frozen = parts(name, quantization)
    function = continuation.make(graphdef, sampling, eos_ids, form=form)

    def call(prompts, seed=0):
        ids, mask = continuation.pad_left(prompts)
        return np.asarray(function(trained, frozen, ids, mask, jax.random.key(seed)))

    return call


def golden(name):
    """[(prompt, the tokens that follow)] of every stored generation."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        count = sum(key.startswith("gen") and key.endswith("_ids") for key in arrays)
        prompts = [arrays[f"prompt{i}_ids"].tolist() for i in range(count)]
        return [
            (prompt, arrays[f"gen{i}_ids"][len(prompt) :].tolist())
            for i, prompt in enumerate(prompts)
        ]


GREEDY = generation_config.Sampling(max_new_tokens=NUM_NEW)


@pytest.mark.parametrize("form", [None, "dense"])
@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen2_window", "qwen3"])
def test_greedy_tokens_equal_hugging_faces(name, form):
    """Prompts of unequal length in one batch, padded on the left."""
    prompts, following = zip(*golden(name), strict=True)
    assert len({len(prompt) for prompt in prompts}) > 1
    found = continue_(name, GREEDY, form=form)(prompts)
    np.testing.assert_array_equal(found, [tokens[:NUM_NEW] for tokens in following])


def test_a_hundred_greedy_tokens_of_a_real_model():
    prompts, following = zip(*golden("stories260K"), strict=True)
    found = continue_("stories260K", generation_config.Sampling(max_new_tokens=100))(prompts)
    np.testing.assert_array_equal(found, following)


def test_padding_does_not_matter():
    prompt, following = golden("llama")[0]
    graphdef, trained, frozen = parts("llama")
    function = continuation.make(graphdef, GREEDY, ())
    for multiple in (1, 32):
        ids, mask = continuation.pad_left([prompt], multiple)
        found = function(trained, frozen, ids, mask, jax.random.key(0))
        np.testing.assert_array_equal(found[0], following[:NUM_NEW])


def test_a_continuation_ends_before_its_eos():
    prompts, following = zip(*golden("llama"), strict=True)
    eos = following[0][4]
    ends = [list(tokens[:NUM_NEW]).index(eos) if eos in tokens[:NUM_NEW] else NUM_NEW
            for tokens in following]  # fmt: skip
    assert len(set(ends)) > 1
    found = continue_("llama", GREEDY, (eos, 9999))(prompts)
    for row, tokens, end in zip(found, following, ends, strict=True):
        assert row.tolist() == [*tokens[:end], *[-1] * (NUM_NEW - end)]


def test_any_of_several_eos_tokens_ends_a_continuation_even_as_the_first_token():
    prompt, following = golden("llama")[0]
    found = continue_("llama", GREEDY, (following[0], following[3]))([prompt])
    assert (found == -1).all()


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
def test_a_quantized_base_generates(quantization):
    """Its tokens are nearly those of the float model."""
    prompts, following = zip(*golden("stories260K"), strict=True)
    call = continue_("stories260K", GREEDY, (), quantization)
    found = call(prompts)
    np.testing.assert_array_equal(call(prompts), found)
    assert found.shape == (len(prompts), NUM_NEW) and (found >= 0).all() and (found < 512).all()
    agreement = np.mean(found == np.array([tokens[:NUM_NEW] for tokens in following]))
    assert agreement > (0.9 if quantization == "int8" else 0.3)


def test_adapters_change_what_is_generated_and_dropout_does_not():
    graphdef, trained, frozen = parts("llama")
    model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
    config = lora_config.LoRAConfig(targets=("q_proj", "down_proj"), dropout=0.5)
    lora.inject(model, config, rngs=nnx.Rngs(0))
    model.train()
    graphdef, trained, frozen = model_state.split(model)
    function = continuation.make(graphdef, GREEDY, ())
    prompts, following = zip(*golden("llama"), strict=True)
    arguments = (frozen, *continuation.pad_left(prompts), jax.random.key(0))
    expected = np.array([tokens[:NUM_NEW] for tokens in following])
    np.testing.assert_array_equal(function(trained, *arguments), expected)
    other = jax.tree.map(lambda x: x + 0.3, trained)
    assert (np.asarray(function(other, *arguments)) != expected).any()


def test_seeds_repeat_and_differ():
    sampling = generation_config.Sampling(max_new_tokens=NUM_NEW, temperature=1.0)
    call = continue_("llama", sampling)
    prompt = golden("llama")[0][0]
    one = call([prompt, prompt], seed=1)
    np.testing.assert_array_equal(call([prompt, prompt], seed=1), one)
    assert (call([prompt, prompt], seed=2) != one).any()
    assert (one[0] != one[1]).any()  # each sequence has its own draws


def test_a_low_temperature_or_one_choice_is_greedy():
    prompts, following = zip(*golden("llama"), strict=True)
    expected = [tokens[:NUM_NEW] for tokens in following]
    for settings in (dict(temperature=1e-4), dict(temperature=5.0, top_k=1)):
        sampling = generation_config.Sampling(max_new_tokens=NUM_NEW, **settings)
        np.testing.assert_array_equal(continue_("llama", sampling)(prompts), expected)


def random_logits(rows=6, vocab=50):
    return np.random.default_rng(0).normal(0, 2, (rows, vocab)).astype(np.float32)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("k", [1, 7, 50, 80])
def test_top_k_keeps_the_k_most_likely(k):
    logits = random_logits()
    found = np.asarray(samplers.top_k(jnp.asarray(logits), k))
    for row, kept in zip(logits, found, strict=True):
        assert set(np.flatnonzero(kept)) == set(np.argsort(row)[::-1][:k])


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    logits = random_logits()
    found = np.asarray(samplers.top_p(jnp.asarray(logits), p))
    for row, kept in zip(logits, found, strict=True):
        probability, expected, total = softmax(row), set(), 0.0
        for token in np.argsort(row)[::-1]:
            if total >= p:
                break
            expected.add(token)
            total += probability[token]
        assert set(np.flatnonzero(kept)) == expected


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_likely_relative_to_the_most_likely(p):
    logits = random_logits()
    found = np.asarray(samplers.min_p(jnp.asarray(logits), p))
    for row, kept in zip(logits, found, strict=True):
        probability = softmax(row)
        np.testing.assert_array_equal(kept, probability >= p * probability.max() * (1 - 1e-6))


def reference_distribution(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution to draw from: temperature, then each filter on what the last one kept."""
    logits = np.asarray(row, np.float64) / temperature
    keep = np.ones(len(logits), bool)
    order = np.argsort(logits)[::-1]
    if top_k:
        keep[order[top_k:]] = False
    probability = np.where(keep, np.exp(logits - logits.max()), 0)
    probability /= probability.sum()
    before = np.cumsum(probability[order]) - probability[order]
    keep[order] &= before < top_p
    probability = np.where(keep, probability, 0)
    keep &= probability >= min_p * probability.max()
    probability = np.where(keep, probability, 0)
    return probability / probability.sum()


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(temperature=0.6),
        dict(temperature=2.0, top_k=5),
        dict(top_p=0.8),
        dict(min_p=0.2),
        dict(temperature=1.5, top_k=8, top_p=0.85, min_p=0.1),
    ],
)
def test_draws_follow_the_filtered_distribution(settings):
    row, count = random_logits(1, 20)[0], 20_000
    sampling = generation_config.Sampling(**{"temperature": 1.0} | settings)
    draw = jax.jit(functools.partial(samplers.sample, sampling=sampling))
    tokens = np.asarray(draw(jnp.tile(row, (count, 1)), jax.random.key(0)))
    expected = reference_distribution(row, **settings)
    frequency = np.bincount(tokens, minlength=20) / count
    assert not frequency[expected == 0].any()
    assert np.abs(frequency - expected).max() < 5 * 0.5 / np.sqrt(count)


def test_temperature_zero_is_argmax():
    logits = random_logits()
    found = samplers.sample(
        jnp.asarray(logits), jax.random.key(0), generation_config.Sampling(top_k=3)
    )
    np.testing.assert_array_equal(found, logits.argmax(axis=1))


def test_pad_left():
    ids, mask = continuation.pad_left([[5, 6, 7], [], [8]], multiple=4)
    np.testing.assert_array_equal(ids, [[0, 5, 6, 7], [0, 0, 0, 0], [0, 0, 0, 8]])
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert continuation.pad_left([[1] * 17])[0].shape == (1, 32)


def test_all_invalid_settings_are_named():
    with pytest.raises(errors.UserError) as raised:
        generation_config.Sampling(
            max_new_tokens=0, temperature=-1.0, top_k=-2, top_p=0.0, min_p=1.5
        )
    for problem in ("max_new_tokens 0", "temperature -1.0", "top_k -2", "top_p 0.0", "min_p 1.5"):
        assert problem in str(raised.value)


def test_a_prompt_that_leaves_no_room_is_an_error():
    sampling = generation_config.Sampling(max_new_tokens=10)
    continuation.check_length(54, sampling, 64)
    with pytest.raises(errors.UserError, match=r"(?s)64 tokens.*55 tokens.*--max-new-tokens 9"):
        continuation.check_length(55, sampling, 64)
    with pytest.raises(errors.UserError, match="shorten the prompt") as raised:
        continuation.check_length(64, sampling, 64)
    assert "--max-new-tokens 0" not in str(raised.value)
