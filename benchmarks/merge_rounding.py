"""How much rounding changes a model's output in a merge: python benchmarks/merge_rounding.py MODEL.

MODEL: a folder with a LLaMA. Prints the root mean square of the change of its logits, relative to
that of the logits, with random adapters on all linear layers. The limits of lora.merge(model, x)
come from it.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import checkpoints, config, lora, parallel


def change(folder: pathlib.Path, dtype: str, scale: float) -> float:
    """The change by a merge of adapters whose entries are changed by N(0, scale²)."""
    mesh = parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    model, ids = checkpoints.load(folder, dtype=dtype, mesh=mesh), jnp.arange(5, 69)[None]
    lora.inject(model, config.LoRAConfig(rank=8, targets="all-linear"), rngs=nnx.Rngs(0))
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, lora.LoRAParam):
            noise = jax.random.normal(jax.random.key(1), variable.shape)
            variable.set_value(variable[...] + scale * noise)
    before = model(ids)
    lora.merge(model)
    after = model(ids)
    return float(jnp.sqrt(jnp.square(after - before).mean() / jnp.square(before).mean()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path)
    folder = parser.parse_args().model
    for dtype in ("float32", "float16", "bfloat16"):
        for scale in (0.002, 0.02):
            print(f"{dtype:8} scale {scale:5}: {change(folder, dtype, scale):.2g}", flush=True)
