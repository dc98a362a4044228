"""LoRA in the models of Tunix, Bonsai and google-deepmind/gemma, where they are installed.

None of them is a dependency: without them these tests are skipped. Ran with, each in an environment
of its own: google-tunix 0.1.7; gemma 3.3.0, with kauldron 1.4.2 and sentencepiece 0.2.1; Bonsai of
27 March 2026, as a checkout in PYTHONPATH, for jax-bonsai on PyPI is empty.
"""

import dataclasses
import importlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lora_jax import lora
from lora_jax.lora import config as lora_config
from lora_jax.lora import linen, peft
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.quant import conversion

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
TOKENS = jnp.arange(12).reshape(2, 6) % 7


@pytest.fixture(autouse=True)
def their_settings():
    """They add arrays of unequal ranks; and Tunix sets this flag, when it is first imported."""
    before = flax.config.flax_always_shard_variable
    flax.config.update("flax_always_shard_variable", False)
    with jax.numpy_rank_promotion("allow"):
        yield
    flax.config.update("flax_always_shard_variable", before)


def model_of(name):
    """Their module of that name, or a skip that says how to have it."""
    package = name.split(".")[0]
    how = {
        "tunix": "pip install google-tunix",
        "gemma": "pip install gemma sentencepiece==0.2.1",
        "bonsai": "a checkout of github.com/jax-ml/bonsai in PYTHONPATH",
    }[package]
    try:
        return importlib.import_module(name)
    except Exception as error:  # versions that do not go together fail in many ways
        pytest.skip(f"wants {package} ({how}): {error}")


def moved(tree, scale=0.1):
    """The arrays plus noise: some kernels of Tunix and Bonsai begin with zeros."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + scale * rng.normal(size=p.shape).astype(p.dtype), tree)


# ------------------------------------------------------------------------- NNX


def tunix_llama():
    their = model_of("tunix.models.llama3.model")
    lora.register(their.Einsum, lambda layer: layer.einsum_str, weight="w")
    sizes = their.ModelConfig(
        num_layers=2, vocab_size=7, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8,
        num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
    )  # fmt: skip
    positions, mask = jnp.tile(jnp.arange(6), (2, 1)), jnp.tril(jnp.ones((2, 6, 6), bool))
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    return (
        their.Llama3(sizes, rngs=nnx.Rngs(0)),
        lambda model: model(TOKENS, positions, None, mask)[0],
        lora_config.LoRAConfig(rank=4, targets=targets),
    )


def tunix_gemma():
    their = model_of("tunix.models.gemma3.model")
    lora.register(their.Einsum, lambda layer: layer.einsum_str, weight="w")
    sizes = their.ModelConfig(
        num_layers=2, num_embed=7, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8,
        num_kv_heads=2, sliding_window_size=4, param_dtype=jnp.float32,
    )  # fmt: skip
    positions, mask = jnp.tile(jnp.arange(6), (2, 1)), jnp.tril(jnp.ones((2, 6, 6), bool))
    targets = ("q_einsum", "kv_einsum", "gate_proj")
    return (
        their.Gemma3(sizes, rngs=nnx.Rngs(0)),
        lambda model: model(TOKENS, positions, None, mask)[0],
        lora_config.LoRAConfig(rank=4, targets=targets, parts={"kv_einsum": (-1, 1)}),
    )


def bonsai_gemma():
    their = model_of("bonsai.models.gemma3.modeling")
    sizes = their.ModelConfig.gemma3_4b_it(norm_dtype=jnp.float32)
    vision = dataclasses.replace(
        sizes.vision_config, hidden_size=8, image_size=28, intermediate_size=8,
        num_attention_heads=2, num_hidden_layers=1,
    )  # fmt: skip
    text = dataclasses.replace(
        sizes.text_config, head_dim=8, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        layer_types=sizes.text_config.layer_types[4:6], num_hidden_layers=2, num_key_value_heads=2,
        vocab_size=7,
    )  # fmt: skip
    sizes = dataclasses.replace(
        sizes, vision_config=vision, text_config=text, mm_tokens_per_image=4
    )

    def run(model):
        cache = their.init_cache(sizes, 2, 6, 2, dtype=jnp.float32)
        ones = jnp.ones_like(TOKENS)
        return model(TOKENS, None, cache=cache, segment_ids=ones, token_type_ids=0 * ones)

    targets = r"language_model\..*\.(q_proj|v_proj|gate_proj)"
    settings = lora_config.LoRAConfig(rank=4, targets=targets, use_dora=True)
    return their.Gemma3Model(sizes, rngs=nnx.Rngs(0)), run, settings


def bonsai_qwen():
    their = model_of("bonsai.models.qwen3.modeling")
    sizes = dataclasses.replace(
        their.ModelConfig.qwen3_0_6b(), num_layers=2, vocab_size=7, emb_dim=32, mlp_dim=64,
        num_heads=4, head_dim=8, num_kv_heads=2,
    )  # fmt: skip

    def run(model):
        cache = their.init_cache(sizes, 2, 6, 2, dtype=jnp.float32)
        return model(TOKENS, cache=cache, segment_ids=jnp.ones_like(TOKENS))

    settings = lora_config.LoRAConfig(rank=4, targets="all-linear")
    return their.Qwen3(sizes, rngs=nnx.Rngs(0)), run, settings


@pytest.mark.parametrize("fmt", ["none", "int8"])
@pytest.mark.parametrize("made", [tunix_llama, tunix_gemma, bonsai_gemma, bonsai_qwen])
def test_their_nnx_model_is_adapted(made, fmt, tmp_path):
    model, run, settings = made()
    run = nnx.jit(run)
    nnx.update(model, moved(nnx.state(model, nnx.Param)))
    if fmt != "none":
        conversion.quantize_model(model, fmt)
    plain = nnx.clone(model)
    base = run(plain)
    assert np.abs(base).max() > 0.1

    ranks = lora.inject(model, settings, rngs=nnx.Rngs(1))
    assert len(ranks) >= 6
    np.testing.assert_allclose(run(model), base, rtol=1e-4, atol=1e-4)

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=lora.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = run(model).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[::-1]).mean()

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, lora.LoRAParam))(model)
        optimizer.update(model, gradient)
        return value

    before = jax.tree.leaves(nnx.state(model, lora.LoRAParam))
    losses = [step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    after = jax.tree.leaves(nnx.state(model, lora.LoRAParam))
    assert all((old != new).any() for old, new in zip(before, after, strict=True))
    kept = dict(nnx.to_flat_state(nnx.state(model)))
    for path, variable in nnx.to_flat_state(nnx.state(plain)):
        np.testing.assert_array_equal(kept[path][...], variable[...])

    trained = run(model)
    assert np.abs(trained - base).max() > 0.01
    peft.save(tmp_path, model, settings)
    loaded = nnx.clone(plain)
    peft.load(loaded, tmp_path)
    np.testing.assert_allclose(run(loaded), trained, rtol=1e-5, atol=1e-5)
    lora.merge(model)
    np.testing.assert_allclose(run(model), trained, rtol=1e-3, atol=1e-3)
    if fmt == "none":
        assert nnx.graphdef(model) == nnx.graphdef(plain)


# ------------------------------------------------------------------------- Linen


@pytest.mark.parametrize("fmt", ["none", "int8"])
def test_their_linen_gemma_is_adapted(fmt, tmp_path):
    their = model_of("gemma.gm.nn._transformer")
    attention = model_of("gemma.gm.nn._modules").AttentionType
    sizes = model_of("gemma.gm.nn._config").TransformerConfig(
        num_embed=7, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8, num_kv_heads=2,
        final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True,
        sliding_window_size=4, attention_types=(attention.LOCAL_SLIDING, attention.GLOBAL),
    )  # fmt: skip
    module = their.Transformer(config=sizes, dtype=jnp.float32, tokens="")
    params = moved(jax.jit(module.init)(jax.random.key(0), TOKENS)["params"])

    targets = ("q_einsum", "kv_einsum", "attn_vec_einsum")
    settings = lora_config.LoRAConfig(rank=4, targets=targets, parts={"kv_einsum": (-1, 1)})
    adapted = linen.adapt(module, settings, TOKENS, quant=fmt)
    variables = adapted.init(jax.random.key(1), params)
    assert len(adapted.layer_configs) == 6
    run = jax.jit(lambda variables: adapted.apply(variables, TOKENS).logits)
    plain = jax.jit(lambda params: module.apply({"params": params}, TOKENS).logits)
    base = plain(adapted.merge(variables))  # of the rounded weights, for B is zero
    if fmt == "none":
        np.testing.assert_array_equal(base, plain(params))
    np.testing.assert_allclose(run(variables), base, rtol=1e-3, atol=1e-3)

    optimizer = adamw.make(optim_config.OptimConfig(lr=1e-2, warmup=0), 5)

    packed = {"quantized": variables.pop("quantized")} if fmt != "none" else {}

    @jax.jit
    def step(variables, state):
        def loss(variables):
            logits = run({**variables, **packed})
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[::-1]).mean()

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state, value

    start, state, losses = variables, optimizer.init(variables), []
    for _ in range(5):
        variables, state, value = step(variables, state)
        losses.append(value)
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, variables["params"], start["params"])
    changed = jax.tree.map(lambda old, new: bool((old != new).any()), start["lora"],
                           variables["lora"])  # fmt: skip
    assert all(jax.tree.leaves(changed))

    variables |= packed
    trained = run(variables)
    assert np.abs(trained - base).max() > 0.01
    peft.write(tmp_path, adapted.collect(variables))
    read = peft.read(tmp_path)
    again = linen.adapt(module, read.config, TOKENS, quant=fmt)
    loaded = again.apply(again.attach(params, read), TOKENS).logits
    np.testing.assert_allclose(loaded, trained, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(plain(adapted.merge(variables)), trained, rtol=1e-3, atol=1e-3)
