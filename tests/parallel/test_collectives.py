"""What a step of the engine exchanges between devices: activations and logits, no large weight."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.models import config, modules
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import hlo, programs, serving

ARCHITECTURE = config.LlamaConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=8, head_dim=32, max_position_embeddings=64,
)  # fmt: skip
SLOTS = 8


FUSED = dataclasses.replace(ARCHITECTURE, fused_projections=True)


@pytest.mark.parametrize(
    "sizes, architecture",
    [*cases.long(((1, 1, 8), ARCHITECTURE), ((1, 8, 1), ARCHITECTURE), ((1, 1, 4), FUSED)),
     ((2, 2, 2), ARCHITECTURE)],
    ids=["tensor", "fsdp", "tensor-fused", "all"],
)  # fmt: skip
def test_a_decode_step_gathers_no_weight(sizes, architecture):
    """The largest array that is exchanged has the logits of all slots. A part of the head, which
    is [256, 2048] in float32, would be larger. Packed words and their scales are no floats.
    """
    job = serving.Serving(
        architecture, dtype="float32", slots=SLOTS, context=64, adapters=2, rank=4
    )
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    with jax.set_mesh(mesh):
        program = programs.decode(job, mesh)
    steps = hlo.parse(program.lower(mesh).compile().as_text())
    exchanged = [
        (dtype, dims)
        for (shape, opcode, *_), _, _ in steps
        if opcode.removesuffix("-start") in hlo.COLLECTIVES
        for dtype, dims, _ in hlo.arrays(shape)
    ]
    assert not {dtype for dtype, _ in exchanged} & {"u32", "s8"}
    logits = 4 * SLOTS * ARCHITECTURE.vocab_size
    assert max(hlo.num_bytes(*array) for array in exchanged) == logits


def test_a_norm_of_sharded_heads_exchanges_one_number_a_token():
    """OLMo's norm of q: the heads stay where they are, and its derivative exchanges as little."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 2})
    norm = modules.RMSNorm(64, 1e-6, offset=0.0, dtype=jnp.float32)
    x, dy = (np.random.default_rng(seed).normal(size=(2, 3, 64)) for seed in (0, 1))
    x, dy = x.astype(np.float32), dy.astype(np.float32)
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))

    @jax.jit
    def both(x, dy):
        y, vjp = jax.vjp(norm, x)
        return jax.lax.with_sharding_constraint((y, *vjp(dy)), heads)

    program = both.lower(*jax.device_put((x, dy), heads)).compile()
    exchanged = [
        (opcode, *dims)
        for (shape, opcode, *_), _, _ in hlo.parse(program.as_text())
        if opcode.removesuffix("-start") in hlo.COLLECTIVES
        for _, dims, _ in hlo.arrays(shape)
    ]
    assert exchanged == 2 * [("all-reduce", 2, 3)]
    found = program(*jax.device_put((x, dy), heads))
    for own, expected in zip(found, both(x, dy), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-6)
