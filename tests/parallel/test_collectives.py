"""What a step of the engine exchanges between devices: activations and logits, no large weight."""

import dataclasses

import cases
import jax
import pytest

from lora_jax.models import config
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
