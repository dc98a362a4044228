"""The modules that decoder layers are made of: linear layers, embedding, RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from lora_jax.kernels import embedding, matmul, partitioning
from lora_jax.layers import linear_map, registry


class Embedding(nnx.Embed):
    """y = W[ids]. partition: how a mesh shards W and the rows of ids."""

    partition = partitioning.WHOLE

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return embedding.lookup(self.embedding[...], ids, partition=self.partition)

    def attend(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """hidden · Wᵀ, in float32: the logits of a tied head."""
        return matmul.matmul(hidden, self.embedding[...].T, jnp.float32)

    def lookup(self, table: Float[Array, "V _"], ids: Int[Array, "B T"]) -> Float[Array, "B T _"]:
        """table[ids] for a small table that is replicated on every device."""
        rows = partitioning.Partition(self.partition.rows)
        return embedding.lookup(table, ids, partition=rows)


class RMSNorm(nnx.Module):
    """y = weight · x / √(mean(x²) + ε); normalized in float32, scaled in x's dtype.

    With an offset, y = (offset + weight) · …, scaled in float32: 1 in Gemma, 0 in OLMo.
    Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4.
    """

    def __init__(
        self, width: int, eps: float, *, offset: float | None = None, dtype: jax.typing.DTypeLike
    ):
        self.weight = nnx.Param(jnp.full(width, 1.0 - (offset or 0), dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*B width"]) -> Float[Array, "*B width"]:
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = jnp.expand_dims(self.weight[...], tuple(range(x.ndim - 1)))
        if self.offset is not None:
            return (wide * scale * (self.offset + weight.astype(jnp.float32))).astype(x.dtype)
        return (wide * scale).astype(x.dtype) * weight


# For nnx.Linear, which always contracts x's last axis with the kernel's first.
def _dot_general(x, kernel, dimension_numbers, **_):
    return matmul.matmul(x, kernel)


def _float32_dot_general(x, kernel, dimension_numbers, **_):
    return matmul.matmul(x, kernel, jnp.float32)


def norm(config, width, *, dtype):
    return RMSNorm(width, config.rms_norm_eps, offset=config.norm_offset, dtype=dtype)


def linear(config, d_in, d_out, use_bias, *, dot_general=_dot_general, dtype, rngs):
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dot_general=dot_general,
        rngs=rngs,
    )


def head(config, *, dtype, rngs):
    sizes = config.hidden_size, config.vocab_size
    return linear(config, *sizes, False, dot_general=_float32_dot_general, dtype=dtype, rngs=rngs)


registry.PRODUCTS += [_dot_general, _float32_dot_general]
registry.REGISTRATIONS[Embedding] = registry.Registration(
    "embedding", lambda layer: linear_map.Embedding(layer.lookup)
)
