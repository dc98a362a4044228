"""Kernels of decoding on GPUs that are faulty on purpose are found and left out."""

import functools

import cases
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lora_jax.generation import weights
from lora_jax.kernels import choice, platform
from lora_jax.kernels.attention import flash_decoding
from lora_jax.kernels.int4_matmul import triton_gpu as int4_gpu
from lora_jax.kernels.low_rank import triton_gpu
from lora_jax.lora.nnx import bank
from lora_jax.models import config, llama
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import conversion, formats
from lora_jax.selftest import case, decoding, int4_products, low_rank, of_model, proof

MATMULS = int4_gpu.matmuls

KERNEL, SHRINK, EXPAND = (
    functools.partial(function, interpret=True)
    for function in (flash_decoding.attend, triton_gpu.shrink, triton_gpu.expand)
)


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch, tmp_path):
    """This device gets the GPU's kernel, interpreted; nothing is remembered of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(platform, "platform_here", lambda: "gpu")
    monkeypatch.setattr(flash_decoding, "attend", KERNEL)
    monkeypatch.setattr(triton_gpu, "shrink", SHRINK)
    monkeypatch.setattr(triton_gpu, "expand", EXPAND)
    with choice.restored():
        yield


def attended(**how):
    shape = {"slots": 9, "places": 150, "heads": 4, "kv_heads": 2, "width": 16}
    return decoding.cached_attention(**{**shape, "dtype": jnp.float32, **how})


@pytest.mark.parametrize(
    "how",
    [
        *cases.long({"slots": 1}, {"dtype": jnp.bfloat16}),
        {"window": 50, "tokens": 3},
        {"kv_dtype": "int8", "dtype": jnp.bfloat16, "tokens": 2},
    ],
)
def test_the_right_kernel_passes(how):
    one = attended(**how)
    assert one.kernel == choice.ATTENTION_CACHED
    found = case.check(one)
    assert found.problem is None, found
    assert found.distance.whole < 5e-3


def of_the_first_layer(q, k, v, k_scale, v_scale, layer, *rest):
    return KERNEL(q, k, v, k_scale, v_scale, 0 * layer, *rest)


def without_the_new_token(*operands):
    *rest, num_real, window = operands
    return KERNEL(*rest, jnp.maximum(num_real - 1, 0), window)


def one_place_too_many(*operands):
    *rest, num_real, window = operands
    return KERNEL(*rest, num_real, window + 1)


def of_other_heads(q, *rest):
    return KERNEL(q[:, :, ::-1], *rest)


FAULTS = {
    of_the_first_layer: {},
    without_the_new_token: {},
    one_place_too_many: {"window": 20},
    of_other_heads: {},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_left_out(fault, monkeypatch):
    monkeypatch.setattr(flash_decoding, "attend", fault)
    found = proof.run([attended(**FAULTS[fault])])
    assert [each.kernel for each in found.left_out] == [choice.ATTENTION_CACHED]
    assert attended().kernel == choice.XLA


def products(rows=7):
    how = {"k": 192, "n": 128, "slots": 3, "rank": 16, "dtype": jnp.bfloat16}
    return low_rank.products(rows=rows, **how)


@pytest.mark.parametrize("rows", [*cases.long(1), 7])
def test_right_products_pass(rows):
    found = case.check(products(rows))
    assert found.kernel == choice.LOW_RANK and found.problem is None, found


def shrunk_in_the_first_layer(x, A, layer):
    return SHRINK(x, A, 0 * layer)


def without_the_last_rows(x, A, layer):
    return SHRINK(x.at[:, 128:].set(0), A, layer)


def expanded_in_the_first_layer(*operands):
    *rest, layer = operands
    return EXPAND(*rest, 0 * layer)


def without_the_last_columns(*operands):
    return EXPAND(*operands).at[:, 96:].set(operands[0][:, 96:])


def without_a_stretch(y, mixed, B, weights, *rest):
    return EXPAND(y, mixed, B, 0 * weights, *rest)


@pytest.mark.parametrize(
    "name, fault",
    [
        ("shrink", without_the_last_rows),
        ("expand", expanded_in_the_first_layer),
        *cases.long(
            ("shrink", shrunk_in_the_first_layer),
            ("expand", without_the_last_columns),
            ("expand", without_a_stretch),
        ),
    ],
)
def test_faulty_products_are_left_out(name, fault, monkeypatch):
    monkeypatch.setattr(triton_gpu, name, fault)
    found = proof.run([products()])
    assert [each.kernel for each in found.left_out] == [choice.LOW_RANK]
    assert products().kernel == choice.XLA


def test_a_model_names_its_cases():
    """Of attention to a token of each slot, and to guesses; and of each shape of its bank."""

    def names(width, **how):
        c = config.LlamaConfig(
            vocab_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=width,
            max_position_embeddings=64, **how,
        )  # fmt: skip

        def make():
            model = llama.LlamaForCausalLM(c, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
            bank.add(model, slots=2, rank=8, targets=["up_proj", "down_proj"])
            return model

        with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))):
            model = nnx.eval_shape(make)
            return [one.shapes for one in of_model.generation(model, 3, "int8", 2)]

    of_bank = [
        f"bfloat16 [{rows}, {k}] × A [{k}, 16] × B [16, {n}]"
        for k, n in ((128, 64), (64, 128))
        for rows in (3, 9, 32, 64)
    ]
    # Random logits would not reach a cap of 50.
    assert names(16, sliding_windows=(64,), attn_logit_softcapping=50.0) == [
        "bfloat16 [3, 1, 4, 16], 2 heads of 300 int8 keys, window 100, soft cap 1",
        "bfloat16 [3, 3, 4, 16], 2 heads of 300 int8 keys, window 100, soft cap 1",
        *of_bank,
    ]
    assert names(24) == of_bank


def stacks():
    return [
        formats.quantize(jax.random.normal(jax.random.key(n), (256, n)), "int4") for n in (128, 64)
    ]


def joined():
    each = [jax.tree.map(lambda a: jnp.stack([a, 0 * a, a]), packed) for packed in stacks()]
    return int4_products.joined_products(each, rows=5)


def interpreted(x, weights, layer):
    return MATMULS(x, weights, layer, interpret=True)


def with_the_words_of_one_for_all(x, weights, layer):
    words = jnp.concatenate([packed.q for packed in weights], axis=2)
    return interpreted(
        x, tuple(packed._replace(q=words[..., : packed.q.shape[2]]) for packed in weights), layer
    )


def of_the_layer_before(x, weights, layer):
    return interpreted(x, weights, layer - 1)


@pytest.mark.parametrize(
    "kernel, is_right",
    [
        (interpreted, True),
        (with_the_words_of_one_for_all, False),
        *cases.long((of_the_layer_before, False)),
    ],
)
def test_joined_products_are_proven(kernel, is_right, monkeypatch):
    monkeypatch.setattr(int4_gpu, "matmuls", kernel)
    assert joined().kernel == choice.INT4_TENSOR_CORES
    found = proof.run([joined()])
    left_out = [] if is_right else [choice.INT4_TENSOR_CORES]
    assert [each.kernel for each in found.left_out] == left_out


@functools.cache
def quantized():
    c = config.LlamaConfig(
        vocab_size=8, hidden_size=256, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    model = llama.LlamaForCausalLM(c, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    conversion.quantize_model(model, "int4")
    return model


@pytest.mark.parametrize("form, slots", [("joined", 3), *cases.long(("k_minor", 70))])
def test_a_model_names_the_products_that_decoding_joins(form, slots, monkeypatch):
    """Those with one input; also on Hopper, with more slots than its own kernel takes."""
    monkeypatch.setattr(weights, "best", lambda device: form)
    with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))):
        found = [one.shapes for one in of_model.generation(quantized(), slots)
                 if one.operation == "int4 product of decoding"]  # fmt: skip
    assert found == [
        f"bfloat16 [{slots}, 256] × W [256, {n}], int8 scales"
        for n in ("256 + 128 + 128", "384 + 384")
    ]


def test_a_model_names_the_products_of_guesses_and_of_each_device():
    """Two devices compute the same products as one does with half as many slots."""

    def rows(slots, data):
        mesh = sharding.make_mesh({"data": data, "fsdp": 1, "tensor": 1}, jax.devices()[:data])
        model = nnx.clone(quantized())
        with jax.set_mesh(mesh):
            sharding.set_partitions(model)
            found = of_model.generation(model, slots, None, 2)
            return {int(one.shapes.split("[")[1].split(",")[0]) for one in found
                    if one.operation == "int4 product"}  # fmt: skip

    one = rows(3, 1)
    assert one >= {3, 9, 32, 64}
    assert rows(6, 2) == {2 * each for each in one}
