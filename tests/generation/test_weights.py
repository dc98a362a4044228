"""The second forms of the weights for decoding: they give the same products; when they are used."""

import functools
import pathlib
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import lora
from lora_jax.checkpoints import loader
from lora_jax.generation import weights as decode_weights
from lora_jax.kernels import choice, platform
from lora_jax.kernels.int4_matmul import triton_gpu
from lora_jax.layers import stack
from lora_jax.lora import config
from lora_jax.lora.nnx import bank, sites
from lora_jax.models import cache, llama
from lora_jax.models import config as model_config
from lora_jax.parallel import devices
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import conversion

STORIES = pathlib.Path(__file__).parents[1] / "golden" / "models" / "stories260K"
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@functools.cache
def model(fmt):
    """stories260K with adapters that have an effect; its K of 172 is padded if it is quantized."""
    mesh = sharding.make_mesh(ONE)
    loaded = loader.load(STORIES, dtype="float32", quantization=fmt, mesh=mesh)
    lora.inject(loaded, config.LoRAConfig(targets="all-linear"), rngs=nnx.Rngs(0))
    adapters = nnx.state(loaded, lora.LoRAParam)
    nnx.update(loaded, jax.tree.map(lambda a: a + 0.01, adapters))
    return loaded


@pytest.mark.long
@pytest.mark.parametrize("fmt", [*cases.long("none"), "int4"])
def test_steps_with_the_dense_form_give_the_same_logits(fmt):
    """Two steps with it and two without, after the same prefill: logits and caches are equal."""
    whole = model(fmt)

    @functools.partial(jax.jit, static_argnums=2)
    def step(ids, kv, derived, start):
        arrays = decode_weights.derive(whole, "dense", 2)
        how = {"forms": decode_weights.forms(whole, "dense", arrays)} if derived else {}
        start = jnp.full(2, start)
        place = cache.Place(start, jnp.full(2, ids.shape[1]), start + ids.shape[1])
        hidden, kv = whole.extend(ids, kv, place, **how)
        return whole.logits(hidden[:, -1]), kv

    ids = jnp.array([[1, 5, 9, 300], [1, 77, 8, 4]])
    _, plain = step(ids, whole.empty_cache(2, 12), False, 0)
    derived = plain
    for number in range(4, 6):
        logits, plain = step(ids[:, :1], plain, False, number)
        found, derived = step(ids[:, :1], derived, True, number)
        assert np.abs(logits).max() > 1
        for value, expected in ((found, logits), (derived.k, plain.k), (derived.v, plain.v)):
            np.testing.assert_allclose(value, expected, atol=2e-4)


def test_the_bytes_of_the_dense_form():
    whole = model("int4")
    weights = sum(site.in_features * site.out_features for site in sites.find(whole) if site.lead)
    layers = whole.config.num_hidden_layers
    assert decode_weights.num_bytes(whole, "dense") == 4 * weights * layers
    assert decode_weights.num_bytes(whole, "k_minor") == 0  # no kernel takes float32
    assert decode_weights.num_bytes(whole, "joined") == 0  # the weights as they are


def test_a_form_is_chosen_if_it_fits(monkeypatch):
    mesh, whole = sharding.make_mesh(ONE), model("int4")
    assert decode_weights.choose(whole, mesh) == "dense"
    needed = decode_weights.num_bytes(whole, "dense")
    for free, chosen in ((None, "dense"), (2 * needed, "dense"), (2 * needed - 1, None)):
        monkeypatch.setattr(devices, "free_bytes", lambda device, free=free: free)
        assert decode_weights.choose(whole, mesh) == chosen


def test_each_device_has_its_form():
    device = types.SimpleNamespace
    assert decode_weights.best(device(platform="gpu", compute_capability="9.0")) == "k_minor"
    assert decode_weights.best(device(platform="gpu", compute_capability="8.0")) == "joined"
    assert decode_weights.best(device(platform="tpu")) is None
    assert decode_weights.best(device(platform="cpu")) == "dense"


@pytest.mark.long
def test_a_form_may_be_left_out():
    hopper = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    with choice.restored():
        choice.leave_out(choice.INT4_HOPPER, "a test")
        assert decode_weights.best(hopper) == "joined"
        choice.leave_out(choice.INT4_TENSOR_CORES, "a test")
        assert decode_weights.best(hopper) is None


@pytest.mark.parametrize("form", ["k_minor", "joined"])
def test_a_gpu_gets_its_form_if_the_kernel_takes_it(form, monkeypatch):
    """For int4 weights and bfloat16 inputs."""
    monkeypatch.setattr(decode_weights, "best", lambda device: form)
    mesh = sharding.make_mesh(ONE)
    how = {"dtype": "bfloat16", "mesh": mesh}
    half, nf4 = (loader.load(STORIES, quantization=fmt, **how) for fmt in ("int4", "nf4"))
    assert decode_weights.choose(half, mesh) == form
    assert decode_weights.choose(nf4, mesh) is None
    assert decode_weights.choose(model("int4"), mesh) is None  # float32


def wide():
    """A model whose weights the kernels for GPUs take: stories260K's are too narrow."""
    config = model_config.from_dict(
        {"model_type": "llama", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 384,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    )  # fmt: skip
    made = llama.LlamaForCausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    conversion.quantize_model(made, "int4")
    return made


def first_step(whole, ids, form, rows):
    """The hidden states of tokens at the start of `rows` sequences."""
    arrays = decode_weights.derive(whole, form, rows)
    forms = decode_weights.forms(whole, form, arrays)
    place = cache.Place(jnp.zeros(rows, int), jnp.ones(rows, int), jnp.ones(rows, int))
    return whole.extend(ids, whole.empty_cache(rows, 8), place, forms=forms)[0]


@pytest.mark.long
def test_the_form_for_hopper_lowers():
    """One kernel call each for q, k and v; o; gate and up; down."""
    ids = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    step = jax.jit(lambda ids: first_step(wide(), ids, "k_minor", 4))
    text = step.trace(ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 4  # in the body of the scan over layers


@pytest.mark.long
@pytest.mark.parametrize("form", [*cases.long("k_minor"), "joined"])
def test_weights_that_share_an_input_have_one_kernel(form, monkeypatch):
    """Also on Hopper, for more rows than its own kernel takes. The results are those of each."""
    kernel, calls, rows = triton_gpu.matmuls, [], 70

    def interpreted(x, weights, layer):
        calls.append([packed.q.shape[2] for packed in weights])
        return kernel(x, weights, layer, interpret=True)

    def alone(x, packed, layer, interpret=False):
        return interpreted(x, (packed,), layer)[0]

    monkeypatch.setattr(platform, "platform_here", lambda: "gpu")
    monkeypatch.setattr(triton_gpu, "matmuls", interpreted)
    monkeypatch.setattr(triton_gpu, "matmul", alone)
    whole, ids = wide(), jnp.arange(rows)[:, None] % 64
    with choice.restored():
        choice.leave_out(choice.ATTENTION_CACHED, "not interpreted here")
        found = jax.jit(lambda ids: first_step(whole, ids, form, rows))(ids)
        assert calls == [[256, 128, 128], [256], [384, 384], [256]]
        place = cache.Place(jnp.zeros(rows, int), jnp.ones(rows, int), jnp.ones(rows, int))
        expected = jax.jit(lambda ids: whole.extend(ids, whole.empty_cache(rows, 8), place)[0])(ids)
    assert len(calls) == 4 + 7
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=0.02
    )


def test_a_spread_bank_has_an_array_for_each_layer_of_the_stack():
    own = loader.load(STORIES, dtype="float32")
    bank.add(own, slots=2, rank=2, targets=("q_proj", "embed_tokens"))
    stored = jax.tree.map(lambda a: np.arange(a.size).reshape(a.shape), bank.state(own))
    found = jax.jit(decode_weights.spread)(stored)
    np.testing.assert_array_equal(
        found["model"]["embed_tokens"]["bank_A"], stored["model"]["embed_tokens"]["bank_A"]
    )
    whole = stored["model"]["layers"]["self_attn"]["q_proj"]
    each = found["model"]["layers"]["self_attn"]["q_proj"]
    for name in bank.NAMES:
        assert len(each[name]) == len(whole[name])
        for index, expected in enumerate(whole[name]):
            np.testing.assert_array_equal(stack.at(each, index)[name], expected)
            np.testing.assert_array_equal(stack.at(whole, index)[name], expected)


def test_sharded_weights_have_no_second_form():
    for sizes in ({"data": 4, "fsdp": 1, "tensor": 2}, {"data": 4, "fsdp": 2, "tensor": 1}):
        assert decode_weights.choose(model("int4"), sharding.make_mesh(sizes)) is None


def test_free_memory_of_this_host():
    free = devices.free_bytes(jax.devices()[0])
    assert free is None or free > 0


def test_a_layer_accepts_a_product_computed_elsewhere():
    """With bias and adapter, quantized and dense: the caller may supply base(x)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.float32)
    for quantized in (False, True):
        linear = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
        linear.bias.set_value(jnp.arange(8.0))
        layer = conversion.quantize_linear(linear, "int8") if quantized else linear
        product = layer(x) - jnp.arange(8.0)[None]
        model = nnx.Dict(layer=layer)
        lora.inject(model, config.LoRAConfig(rank=2, targets=("layer",)), rngs=nnx.Rngs(0))
        model.layer.lora_B.set_value(jnp.ones((2, 8)))
        adapted = model.layer(x)
        assert np.abs(adapted - product).max() > 1
        np.testing.assert_allclose(model.layer.with_product(x, product), adapted, atol=1e-5)
