"""Derivatives of adapted models in every mode, and inside a shard_map."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax import config, linen, lora, quant

X = np.float32(np.random.default_rng(0).normal(size=(8, 8)))
SETTINGS = config.LoRAConfig(rank=2, targets=("up", "heads"))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.heads = nnx.Einsum("bd,dnh->bnh", (16, 2, 4), (2, 4), rngs=rngs)

    def __call__(self, x):
        return jnp.sin(self.heads(jnp.tanh(self.up(x))))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.Einsum((16, 2, 4), "bd,dnh->bnh", name="heads")
        return jnp.sin(heads(jnp.tanh(nn.Dense(16, name="up")(x))))


def drawn(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape) / 3), tree)


def of_nnx(fmt):
    """(A and B, the mean square of the output for them and X, the same of the merged model)."""
    model = Net(nnx.Rngs(0))
    if fmt != "none":
        quant.quantize_model(model, fmt)
    lora.inject(model, SETTINGS, rngs=nnx.Rngs(1))
    graphdef, adapters, rest = nnx.split(model, lora.LoRAParam, ...)

    def loss(adapters, rest, x, merge=False):
        model = nnx.merge(graphdef, adapters, rest, copy=True)
        if merge:
            lora.merge(model)
        return jnp.mean(model(x) ** 2)

    return drawn(adapters), rest, loss


def of_linen(fmt):
    module = LinenNet()
    params = module.init(jax.random.key(0), X)["params"]
    adapted = linen.adapt(module, SETTINGS, X, **({} if fmt == "none" else {"quant": fmt}))
    variables = dict(adapted.init(jax.random.key(1), params))

    def loss(adapters, rest, x, merge=False):
        variables = {**rest, "lora": adapters}
        if merge:
            return jnp.mean(module.apply({"params": adapted.merge(variables)}, x) ** 2)
        return jnp.mean(adapted.apply(variables, x) ** 2)

    return drawn(variables.pop("lora")), variables, loss


@pytest.mark.parametrize(
    "made, fmt",
    [(of_nnx, "int4"), (of_linen, "int8"),
     *cases.long((of_nnx, "none"), (of_nnx, "int8"), (of_linen, "none"), (of_linen, "int4"))],
)  # fmt: skip
def test_forward_mode_and_products_with_the_hessian(made, fmt):
    """jax.jvp, and jax.jvp of jax.grad, equal those of the merged model."""
    adapters, rest, loss = made(fmt)
    direction = jax.tree.map(jnp.cos, adapters)

    @functools.partial(jax.jit, static_argnums=1)
    def derivatives(adapters, merge):
        own = functools.partial(loss, rest=rest, x=jnp.asarray(X), merge=merge)
        return [jax.jvp(f, (adapters,), (direction,)) for f in (own, jax.grad(own))]

    found, expected = (jax.tree.leaves(derivatives(adapters, merge)) for merge in (False, True))
    assert all(np.abs(one).max() > 1e-4 for one in expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(other).max())


@pytest.mark.parametrize(
    "made, fmt, kind",
    [(of_nnx, "int4", AxisType.Explicit), (of_nnx, "none", AxisType.Auto),
     (of_linen, "int8", AxisType.Explicit),
     *cases.long((of_nnx, "int8", AxisType.Auto), (of_nnx, "int4", AxisType.Auto),
                 (of_linen, "int4", AxisType.Auto),
                 (of_linen, "none", AxisType.Explicit), (of_linen, "int4", AxisType.Explicit))],
)  # fmt: skip
def test_data_parallel_in_a_shard_map(made, fmt, kind):
    """Each device has its own inputs and the same model; the gradients are summed over devices."""
    adapters, rest, loss = made(fmt)
    expected = jax.jit(jax.grad(loss))(adapters, rest, X)
    whole, rows = PartitionSpec(), PartitionSpec("data")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        each = jax.shard_map(jax.grad(loss), in_specs=(whole, whole, rows), out_specs=whole)
        found = jax.jit(each)(adapters, rest, jax.device_put(X, NamedSharding(mesh, rows)))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(np.asarray(one) / 4, other, rtol=1e-4, atol=1e-6)
