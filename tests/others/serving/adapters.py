"""Writes eight random adapters for stories260K into a folder. Run it where lora_jax is installed.

    python adapters.py FOLDER

They differ in rank and targets, and are strong enough that each tells another story.
"""

import pathlib
import sys

import jax
from flax import nnx

from lora_jax import config, lora, peft
from lora_jax.checkpoints import loader

STORIES = pathlib.Path(__file__).resolve().parents[3] / "tests/golden/models/stories260K"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def main(folder: str) -> None:
    for number in range(8):
        model = loader.load(STORIES)
        settings = config.LoRAConfig(
            rank=(2, 4, 8)[number % 3], alpha=8, targets=(ATTENTION, ALL)[number % 2]
        )
        lora.inject(model, settings, rngs=nnx.Rngs(number))
        keys = iter(jax.random.split(jax.random.key(number), 1000))
        drawn = jax.tree.map(
            lambda x, keys=keys: 0.1 * jax.random.normal(next(keys), x.shape, x.dtype),
            nnx.state(model, lora.LoRAParam),
        )
        nnx.update(model, drawn)
        peft.save(pathlib.Path(folder, f"a{number}"), model, settings)


if __name__ == "__main__":
    main(sys.argv[1])
