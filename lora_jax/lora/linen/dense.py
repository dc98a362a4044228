"""A Flax Linen layer with an adapter, for models that you write yourself."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lora_jax.kernels import explicit, matmul
from lora_jax.lora import algebra
from lora_jax.lora import config as lora_config


class LoRADense(nn.Module):
    """y = x W + b + scaling · (dropout(x) A) B: nn.Dense and an adapter.

    W and b are in `params`; A and B are in the collection `lora`, in float32. Under nn.scan or
    nn.vmap add it to variable_axes. With `train` the input of A has dropout, which uses the rng
    `dropout`. Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3.
    """

    features: int
    rank: int = lora_config.LoRAConfig.rank
    alpha: float = lora_config.LoRAConfig.alpha
    dropout: float = 0.0
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B d_in"], *, train: bool = False
    ) -> Float[Array, "*B d_out"]:
        base = nn.Dense(
            self.features, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype,
            name="base",
        )  # fmt: skip
        y, d_in = base(x), x.shape[-1]

        def initial():
            return algebra.initial(self.make_rng("params"), (), d_in, self.rank)

        A = self.variable("lora", "lora_A", initial).value
        B = self.variable("lora", "lora_B", jnp.zeros, (self.rank, self.features)).value
        if train and self.dropout:
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        scaled = B * (self.alpha / self.rank)

        def adapted(x, y, A, B):
            return y + matmul.matmul(matmul.matmul(x, A), B).astype(y.dtype)

        return explicit.like(y, adapted, x, y, A, scaled)
