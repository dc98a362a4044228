"""A GPT-2 whose c_attn computes q, k and v in one product: adapters for q and v only.

The base has learned to repeat six digits; the adapter learns to repeat them backwards.
"""

import sys
import tempfile

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp

from lora_jax import config, lora, peft

WIDTH, NUM_TOKENS = 32, 6

# The model, which has no LoRA code.


class Attention(nnx.Module):
    def __init__(self, num_heads, *, rngs):
        self.num_heads = num_heads
        self.c_attn = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.c_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.c_attn(x), 3, axis=-1))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.ln_1, self.ln_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = Attention(4, rngs=rngs)
        self.c_fc = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.c_proj = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(nnx.gelu(self.c_fc(self.ln_2(x))))


class GPT2(nnx.Module):
    def __init__(self, vocab_size=10, num_layers=2, *, rngs):
        self.wte = nnx.Embed(vocab_size, WIDTH, rngs=rngs)
        self.wpe = nnx.Embed(2 * NUM_TOKENS, WIDTH, rngs=rngs)
        self.h = nnx.List(Block(rngs=rngs) for _ in range(num_layers))
        self.ln_f = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))[None]
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


def fit(model, wrt, direction, num_steps):
    """An ordinary training loop; `wrt` is the type of the variables that it trains."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            logits, wanted = model(tokens[:, :-1]), tokens[:, 1:]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
            return each[:, NUM_TOKENS - 1 :].mean()

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradient)
        return value

    rng = np.random.default_rng(0)
    given = (rng.integers(10, size=(32, NUM_TOKENS)) for _ in range(num_steps))
    return [step(model, optimizer, np.hstack([x, x[:, ::direction]])).item() for x in given]


def main(folder: str | None = None, num_steps: int = 100) -> list[float]:
    """The losses of the fine-tune."""
    model = GPT2(rngs=nnx.Rngs(0))
    fit(model, nnx.Param, 1, 80)
    before = [block.attn.c_attn.kernel[...] for block in model.h]

    # A and B of rank 8 for q and for v, none for k. With four query heads per key: (4, -1, 1).
    settings = config.LoRAConfig(rank=8, targets=("c_attn",), parts={"c_attn": (1, -1, 1)})
    lora.inject(model, settings, rngs=nnx.Rngs(1))
    losses = fit(model, lora.LoRAParam, -1, num_steps)
    print("loss", *(f"{loss:.3f}" for loss in losses[::20]), f"{losses[-1]:.3f}")

    folder = folder or tempfile.mkdtemp()
    peft.save(folder, model, settings)  # an adapter of rank 16, which PEFT can read
    lora.strip(model)
    peft.load(model, folder)
    lora.merge(model)
    for block, old in zip(model.h, before, strict=True):
        q, k, v = jnp.split(block.attn.c_attn.kernel[...] - old, 3, axis=1)
        assert q.any() and v.any() and not k.any()
    print(f"K is as it was; adapter in {folder}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
