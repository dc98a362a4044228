"""Attention to a KV cache that is faulty on purpose is found and left out."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lora_jax.kernels import choice, platform
from lora_jax.kernels.attention import flash_decoding
from lora_jax.models import config, llama
from lora_jax.parallel import mesh as sharding
from lora_jax.selftest import case, decoding, of_model, proof

KERNEL = functools.partial(flash_decoding.attend, interpret=True)


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch, tmp_path):
    """This device gets the GPU's kernel, interpreted; nothing is remembered of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(platform, "platform_here", lambda: "gpu")
    monkeypatch.setattr(flash_decoding, "attend", KERNEL)
    with choice.restored():
        yield


def attended(**how):
    shape = {"slots": 9, "places": 150, "heads": 4, "kv_heads": 2, "width": 16}
    return decoding.cached_attention(**{**shape, "dtype": jnp.float32, **how})


@pytest.mark.parametrize(
    "how",
    [
        {"slots": 1},
        {"dtype": jnp.bfloat16},
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


def test_a_model_names_its_cases():
    """One for a token of each slot, and one with guesses; none where the kernel takes no heads."""

    def names(width, **how):
        c = config.LlamaConfig(
            vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=width,
            max_position_embeddings=64, **how,
        )  # fmt: skip
        model = nnx.eval_shape(lambda: llama.LlamaForCausalLM(c, rngs=nnx.Rngs(0)))
        with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))):
            return [one.shapes for one in of_model.generation(model, 3, "int8", 2)]

    assert names(16, sliding_windows=(64,)) == [
        "float32 [3, 1, 4, 16], 2 heads of 300 int8 keys, window 100",
        "float32 [3, 3, 4, 16], 2 heads of 300 int8 keys, window 100",
    ]
    assert names(24) == []
