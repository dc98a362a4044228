"""A Gemma as in the examples of flax, with an Einsum class of its own, which one line describes.

The base has learned to predict the largest token so far; the adapter learns the smallest one.
"""

import sys
import tempfile

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp

from lora_jax import config, lora, peft

# The model, which has no LoRA code.


class Einsum(nnx.Module):
    def __init__(self, einsum_str, shape, *, rngs):
        self.einsum_str = einsum_str
        self.w = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Attention(nnx.Module):
    def __init__(self, num_heads, num_kv_heads, features, head_dim, *, rngs):
        self.q_einsum = Einsum("BTD,NDH->BTNH", (num_heads, features, head_dim), rngs=rngs)
        self.kv_einsum = Einsum("BSD,CKDH->CBSKH", (2, num_kv_heads, features, head_dim), rngs=rngs)
        self.attn_vec_einsum = Einsum("BTNH,NHD->BTD", (num_heads, head_dim, features), rngs=rngs)

    def __call__(self, x):
        key, value = self.kv_einsum(x)
        encoded = jax.nn.dot_product_attention(self.q_einsum(x), key, value, is_causal=True)
        return self.attn_vec_einsum(encoded)


class FeedForward(nnx.Module):
    def __init__(self, features, hidden_dim, *, rngs):
        self.gate_proj = nnx.Linear(features, hidden_dim, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(features, hidden_dim, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(hidden_dim, features, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, features, *, rngs):
        self.pre_attention_norm = nnx.RMSNorm(features, rngs=rngs)
        self.attn = Attention(2, 1, features, 16, rngs=rngs)
        self.pre_ffw_norm = nnx.RMSNorm(features, rngs=rngs)
        self.mlp = FeedForward(features, 4 * features, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.pre_attention_norm(x))
        return x + self.mlp(self.pre_ffw_norm(x))


class Transformer(nnx.Module):
    def __init__(self, vocab_size=32, features=32, num_layers=2, *, rngs):
        self.embedder = nnx.Embed(vocab_size, features, rngs=rngs)
        self.layers = nnx.List(Block(features, rngs=rngs) for _ in range(num_layers))
        self.final_norm = nnx.RMSNorm(features, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedder(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.attend(self.final_norm(x))


def fit(model, wrt, task, num_steps):
    """An ordinary training loop; `wrt` is the type of what it trains."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, tokens, wanted):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens), wanted).mean()

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradient)
        return value

    rng = np.random.default_rng(0)
    batches = (rng.integers(32, size=(32, 8)) for _ in range(num_steps))
    return [step(model, optimizer, x, task(x, axis=1)).item() for x in batches]


def main(folder: str | None = None, num_steps: int = 100) -> list[float]:
    """The losses of the fine-tune."""
    base = Transformer(rngs=nnx.Rngs(0))
    fit(base, nnx.Param, np.maximum.accumulate, 80)

    lora.register(Einsum, lambda layer: layer.einsum_str, weight="w")
    settings = config.LoRAConfig(rank=8, targets=("q_einsum", "kv_einsum", "attn_vec_einsum"))
    model = nnx.clone(base)
    lora.inject(model, settings, rngs=nnx.Rngs(1))
    losses = fit(model, lora.LoRAParam, np.minimum.accumulate, num_steps)
    print("loss", *(f"{loss:.3f}" for loss in losses[::20]), f"{losses[-1]:.3f}")

    folder = folder or tempfile.mkdtemp()
    peft.save(folder, model, settings)
    peft.load(base, folder)  # what was trained is in there, and nothing else was changed
    states = (nnx.state(own, nnx.Param) for own in (base, model))
    jax.tree.map(np.testing.assert_array_equal, *states)
    print(f"adapter of {lora.num_params(model)} numbers in {folder}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
