"""LoRA on an int8 base in a Flax NNX model that knows nothing of either."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lora_jax import config, lora, quant


class Regressor(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 128, rngs=rngs)
        self.down = nnx.Linear(128, 1, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


def main(num_steps: int = 100) -> list[float]:
    """The losses of a short fine-tune; only A and B change."""
    model = Regressor(rngs=nnx.Rngs(0))
    quant.quantise_model(model, "int8", exclude=())
    settings = config.LoRAConfig(rank=4, alpha=8, targets=("up", "down"))
    ranks = lora.inject(model, settings, rngs=nnx.Rngs(1))
    print(f"adapted {ranks}, {lora.num_params(model)} trainable numbers")

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=lora.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, lora.LoRAParam))(model)
        optimizer.update(model, gradient)
        return value

    x = jax.random.normal(jax.random.key(2), (64, 16))
    y = jnp.sin(x.sum(axis=1, keepdims=True))
    losses = [step(model, optimizer, x, y).item() for _ in range(num_steps)]
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

    lora.merge(model)  # a plain model again
    return losses


if __name__ == "__main__":
    main()
