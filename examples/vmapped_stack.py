"""Layers stacked by nnx.vmap and run by nnx.scan: adapters on some of them, with dropout.

The checkpoint of the plain model fits the adapted one, whose parameters keep their paths.
"""

import pathlib
import sys
import tempfile

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from orbax import checkpoint as ocp

from lora_jax import config, lora, peft

# The model, which has no LoRA code.


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.RMSNorm(32, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Net(nnx.Module):
    def __init__(self, num_layers=4, *, rngs):
        @nnx.split_rngs(splits=num_layers)
        @nnx.vmap
        def stack(rngs):
            return Layer(rngs=rngs)

        self.embed = nnx.Linear(2, 32, rngs=rngs)
        self.layers = stack(rngs)
        self.head = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return self.head(run(self.embed(x), self.layers))


def fit(model, wrt, direction, num_steps):
    """An ordinary training loop plus one line; `wrt` is the type of the variables it trains."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, key):
        nnx.update(model, lora.reseed(nnx.state(model, lora.DropoutKey), key))  # new dropout masks
        x = jax.random.uniform(key, (64, 2), minval=-1, maxval=1)

        def loss(model):
            return jnp.mean((model(x) - jnp.sin(3 * x @ jnp.array(direction)[:, None])) ** 2)

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradient)
        return value

    return [step(model, optimizer, jax.random.key(i)).item() for i in range(num_steps)]


def main(folder: str | None = None, num_steps: int = 80) -> list[float]:
    """The losses of the fine-tune."""
    folder = pathlib.Path(folder or tempfile.mkdtemp()).absolute()
    plain = Net(rngs=nnx.Rngs(0))
    fit(plain, nnx.Param, (1.0, 1.0), 60)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "base", nnx.state(plain), force=True)

    model = Net(rngs=nnx.Rngs(1))
    settings = config.LoRAConfig(rank=8, targets=("up", "down"), layers=(1, 2, 3), dropout=0.05)
    print(lora.inject(model, settings, rngs=nnx.Rngs(2)))  # {"layers.1.up": 8, …}
    shapes = nnx.state(nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0))))
    nnx.update(model, ocp.StandardCheckpointer().restore(folder / "base", shapes))
    np.testing.assert_array_equal(model.layers.up.kernel[...], plain.layers.up.kernel[...])

    model.train()  # switches dropout on
    losses = fit(model, lora.LoRAParam, (1.0, -1.0), num_steps)
    model.eval()
    print("loss", *(f"{loss:.3f}" for loss in losses[::20]), f"{losses[-1]:.3f}")

    peft.save(folder / "adapter", model, settings)
    peft.load(plain, folder / "adapter")  # it holds all that was trained: nothing else has changed
    states = (nnx.state(own, nnx.Param) for own in (plain, model))
    jax.tree.map(np.testing.assert_array_equal, *states)
    print(f"base and adapter in {folder}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
