"""A ViT in Flax Linen, with nn.scan and nn.remat, unchanged: adapters on an int8 base.

The base recognizes the direction of stripes; the adapter learns to do so for rotated images.
"""

import sys
import tempfile

import jax
import numpy as np
import optax
from flax import linen as nn

from lora_jax import config, linen, optim, peft

WIDTH, NUM_CLASSES = 32, 8

# The model, which has no LoRA code.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        y = nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(y)), None


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (4, 4), strides=4, name="patches")(images)
        x = x.reshape(len(images), -1, WIDTH)
        x = x + self.param("positions", nn.initializers.normal(0.1), (1, *x.shape[1:]))
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = blocks(name="layers")(x, None)
        return nn.Dense(NUM_CLASSES, name="head")(nn.LayerNorm()(x).mean(axis=1))


def stripes(rng, on_its_side):
    """24 images [16, 16, 1], and the direction of the stripes in each."""
    labels, phases = rng.integers(NUM_CLASSES, size=24), rng.uniform(0, 2 * np.pi, size=(24, 1, 1))
    angles = (np.pi / NUM_CLASSES * labels)[:, None, None]
    rows, columns = np.mgrid[:16, :16]
    images = np.sin(np.cos(angles) * rows[None] + np.sin(angles) * columns[None] + phases)
    images = images + 0.3 * rng.normal(size=images.shape)
    return np.float32(images.mT if on_its_side else images)[..., None], labels


def fit(apply, tree, optimizer, on_its_side, num_steps):
    """An ordinary training loop; returns the trained tree and the losses."""

    @jax.jit
    def step(tree, state, images, labels):
        def loss(tree):
            logits = apply(tree, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(tree)
        updates, state = optimizer.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state, value

    rng, state, losses = np.random.default_rng(0), optimizer.init(tree), []
    for _ in range(num_steps):
        tree, state, value = step(tree, state, *stripes(rng, on_its_side))
        losses.append(value.item())
    return tree, losses


def main(folder: str | None = None, num_steps: int = 40) -> list[float]:
    """The losses of the fine-tune."""
    model, (images, _) = ViT(), stripes(np.random.default_rng(1), True)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    params, _ = fit(lambda p, x: model.apply({"params": p}, x), params, optax.adam(5e-3), False, 40)

    settings = config.LoRAConfig(rank=4, targets=("query", "value", "up", "down"))
    adapted = linen.adapt(model, settings, images, quant="int8", exclude=("head",))
    variables = adapted.init(jax.random.key(1), params)
    print(jax.tree.map(lambda array: array.dtype.name, variables["quantized"]["layers"]["up"]))

    # Integers have no gradient: the packed weights stay out of the tree that is differentiated.
    packed = variables.pop("quantized")

    def apply(tree, images):
        return adapted.apply({**tree, "quantized": packed}, images)

    # LoRA+: B learns four times as fast as A. All variables get a label; most are frozen.
    groups = {"A": optax.adam(5e-3), "B": optax.adam(2e-2), "frozen": optim.frozen()}
    optimizer = optax.partition(groups, optim.labels)
    trained, losses = fit(apply, variables, optimizer, True, num_steps)
    print("loss", *(f"{loss:.3f}" for loss in losses[::10]), f"{losses[-1]:.3f}")
    jax.tree.map(np.testing.assert_array_equal, trained["params"], variables["params"])

    folder = folder or tempfile.mkdtemp()
    peft.write(folder, adapted.collect(trained))
    again = adapted.attach(params, peft.read(folder))
    jax.tree.map(np.testing.assert_array_equal, again, {**trained, "quantized": packed})
    print(f"adapter in {folder}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
