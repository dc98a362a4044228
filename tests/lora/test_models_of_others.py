"""Adapters in Flax NNX models as people write them: merged equals adapted, and so do gradients."""

import functools
import pickle
from typing import ClassVar, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, struct
from jax import ad_checkpoint

from lora_jax import errors, lora, peft, quant
from lora_jax.layers import registry

D, IDS = 8, jnp.arange(16)[None]
X = jax.random.normal(jax.random.key(0), (3, 5, D))


def linear(rngs, *sizes, **settings):
    return nnx.Linear(*(sizes or (D, D)), rngs=rngs, **settings)


class Multiplied(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) * 0.25


class Standardized(nnx.Linear):
    """Reads its weight itself, and calls no other class."""

    def __call__(self, x):
        kernel = self.kernel[...]
        return x @ (kernel / jnp.std(kernel, axis=0, keepdims=True)) + self.bias[None, None]


class OtherBias(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (D, D)))
        self.shift = nnx.Param(jax.random.normal(rngs.params(), (D,)))

    def __call__(self, x):
        return x @ self.w + self.shift[None, None]


class OtherWeight(OtherBias):
    def __call__(self, x, w=None):
        return super().__call__(x) if w is None else x @ w


class CallsWithAWeight(nnx.Module):
    """Calls a registered layer as it is, and with a weight in place of its own."""

    def __init__(self, rngs):
        self.part = OtherWeight(rngs)

    def __call__(self, x):
        return self.part(self.part(x), w=self.part.w.T)


class Scaled(OtherBias):
    """Has more than a weight and a bias."""

    def __call__(self, x):
        return (x @ self.w) * self.shift[None, None]


class Activated(OtherBias):
    """Is registered as a product, and is none."""

    def __call__(self, x):
        return jnp.tanh(x @ self.w + self.shift[None, None])


class Named(OtherBias):
    """Names the product for a policy of jax.checkpoint."""

    def __call__(self, x):
        return ad_checkpoint.checkpoint_name(x @ self.w, "product") + self.shift[None, None]


class Rows(OtherBias):
    """Multiplies rows."""

    def __call__(self, x):
        y = x.reshape(-1, x.shape[-1]) @ self.w + self.shift[None]
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Turned(OtherBias):
    """Gives the rows in another order."""

    def __call__(self, x):
        y = x.reshape(-1, x.shape[-1]) @ self.w + self.shift[None]
        return y.reshape(*x.shape[-2::-1], y.shape[-1])


class Repeated(OtherBias):
    """Multiplies three times."""

    def __call__(self, x):
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ self.w, x)


class WithoutBias(OtherBias):
    """Has a bias, and does not add it."""

    def __call__(self, x):
        return x @ self.w


class AnyArguments(OtherBias):
    def __call__(self, *args):
        return args[0] @ self.w


lora.register(OtherBias, "...i,io->...o", weight="w", bias="shift")
lora.register(Activated, "...i,io->...o", weight="w", bias="shift")
lora.register(Named, "...i,io->...o", weight="w", bias="shift")
lora.register(Rows, "...i,io->...o", weight="w", bias="shift")
lora.register(Turned, "...i,io->...o", weight="w", bias="shift")
lora.register(Repeated, "...i,io->...o", weight="w", bias="shift")
lora.register(WithoutBias, "...i,io->...o", weight="w", bias="shift")
lora.register(AnyArguments, "...i,io->...o", weight="w", bias="shift")
lora.register(OtherWeight, "...i,io->...o", weight="w", bias="shift")
lora.register(Scaled, "...i,io->...o", weight="w")


class Raw(nnx.Module):
    """Attention with parameters of its own."""

    def __init__(self, rngs):
        for name in ("wq", "wk"):
            setattr(self, name, nnx.Param(jax.random.normal(rngs.params(), (D, D)) / 3))

    def __call__(self, x):
        return jax.nn.softmax((x @ self.wq) @ (x @ self.wk[...]).mT) @ x


class Heads(nnx.Module):
    """Several weights, of which it is said how they multiply."""

    def __init__(self, rngs):
        self.q = nnx.Param(jax.random.normal(rngs.params(), (2, D, 4)) / 3)
        self.o = nnx.Param(jax.random.normal(rngs.params(), (2, 4, D)) / 3)

    def __call__(self, x):
        heads = jnp.einsum("btd,ndh->btnh", x, self.q[...])
        return jnp.einsum("btnh,nhd->btd", jnp.tanh(heads), self.o)


lora.register(Heads, {"q": "btd,ndh->btnh", "o": "btnh,nhd->btd"})


class OwnEinsum(nnx.Module):
    """As in Tunix and gemma."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (2, D, 4)) / 3)
        self.einsum_str = "BTD,NDH->BTNH"

    def __call__(self, x):
        return 2 * jnp.einsum(self.einsum_str, x, self.w[...])


class Experts(nnx.Module):
    """A weight of three axes is all that it has."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (2, D, D)) / 3)

    def __call__(self, x):
        return jnp.tanh(jnp.einsum("btd,edf->betf", x, self.w)).sum(1)


class Model(nnx.Module):
    """x → relu(x W) and then the layer under test, `part`."""

    def __init__(self, part):
        self.first, self.part = linear(nnx.Rngs(5)), part

    def __call__(self, x):
        return self.part(nnx.relu(self.first(x)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.part, self.up = nnx.Embed(16, D, rngs=rngs), linear(rngs)

    def __call__(self, ids):
        return self.logits(self.up(self.part(ids)))

    def logits(self, hidden):
        return hidden @ self.part.embedding.T


class ReadsKernel(nnx.Module):
    def __init__(self, rngs):
        self.part = linear(rngs)

    @nnx.remat
    def __call__(self, x):
        rows = [*self.part.kernel]
        assert len(rows) == len(self.part.kernel)
        return self.part(x) + x @ jnp.stack(rows)


class OtherEinsum(nnx.Module):
    def __init__(self, rngs):
        self.part = nnx.Einsum("bti,io->bto", (D, D), rngs=rngs)

    def __call__(self, x):
        return self.part(x, "bti,oi->bto") + self.part(x)


class SumsRows(nnx.Module):
    """An einsum that is no product with a matrix: it sums an axis of x alone."""

    def __init__(self, rngs):
        self.part = nnx.Einsum("bti,io->bo", (D, D), rngs=rngs)

    def __call__(self, x):
        return self.part(x)


class ByKeyword(nnx.Module):
    def __init__(self, rngs):
        self.part = linear(rngs)

    def __call__(self, x):
        return self.part(inputs=x)


def twice(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


class Twice:
    __call__ = staticmethod(twice(jax.lax.dot_general))


class OwnFunctions(nnx.Module):
    """Layers that were given functions to multiply by."""

    def __init__(self, rngs):
        self.dense = linear(rngs, dot_general=twice(jax.lax.dot_general))
        self.heads = nnx.LinearGeneral(D, D, dot_general_cls=Twice, rngs=rngs)
        self.einsum = nnx.Einsum("bti,io->bto", (D, D), einsum_op=twice(jnp.einsum), rngs=rngs)
        own = {"conv_general_dilated": twice(jax.lax.conv_general_dilated)}
        self.conv = nnx.Conv(D, D, 3, rngs=rngs, **own)
        self.embed = nnx.Embed(4, D, promote_dtype=twice_each, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(self.conv(self.einsum(self.heads(self.dense(x)))))


def twice_each(arrays, **_):
    return tuple(2 * array for array in arrays)


def conv(rngs, cls=nnx.Conv, **settings):
    return Model(cls(D, D, 3, rngs=rngs, **settings))


def bridge(module, rngs):
    return nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=rngs), X)


def bridged(rngs, *layers):
    return Model(bridge(nn.Sequential(layers), rngs))


KINDS = {
    "multiplied": (lambda rngs: Model(Multiplied(D, D, rngs=rngs)), "part"),
    "standardized": (lambda rngs: Model(Standardized(D, D, rngs=rngs)), "part"),
    "other_bias": (lambda rngs: Model(OtherBias(rngs)), "part"),
    "other_weight": (CallsWithAWeight, "part"),
    "scaled": (lambda rngs: Model(Scaled(rngs)), "part"),
    "activated": (lambda rngs: Model(Activated(rngs)), "part"),
    "by_keyword": (ByKeyword, "part"),
    "reads_kernel": (ReadsKernel, "part"),
    "other_einsum": (OtherEinsum, "part"),
    "sums_rows": (SumsRows, "part.kernel"),
    "tied": (Tied, "part"),
    "raw": (lambda rngs: Model(Raw(rngs)), "wq"),
    "two_raw": (lambda rngs: Model(Raw(rngs)), ("wq", "wk")),
    "experts": (lambda rngs: Model(Experts(rngs)), "w"),
    "own_einsum": (lambda rngs: Model(OwnEinsum(rngs)), "w"),
    "heads": (lambda rngs: Model(Heads(rngs)), ("q", "o")),
    "own_functions": (lambda rngs: Model(OwnFunctions(rngs)),
                      ("dense", "heads", "einsum", "conv", "embed")),
    "groups": (lambda rngs: conv(rngs, feature_group_count=2), "part"),
    "mask": (lambda rngs: conv(rngs, mask=jnp.tri(D)[None].repeat(3, 0)), "part"),
    "transposed": (lambda rngs: conv(rngs, nnx.ConvTranspose, strides=2), "part"),
    "bridged": (lambda rngs: bridged(rngs, nn.Dense(D), nn.tanh, nn.Dense(4)), "layers_0"),
    "bridged_alone": (lambda rngs: Model(bridge(nn.Dense(4), rngs)), "part"),
    "bridged_conv": (lambda rngs: bridged(rngs, nn.Conv(D, (3,))), "layers_0"),
}  # fmt: skip
QUANTIZED = ("standardized", "own_functions")
# Kinds of which other cases do the same.
ALIKE = ("other_bias", "scaled", "standardized", "two_raw", "experts", "own_functions", "mask",
         "transposed", "bridged")  # fmt: skip


@functools.cache
def _made(kind):
    make, _ = KINDS[kind]
    return nnx.split(make(nnx.Rngs(0)))


def changed(model, scale=0.2):
    """Gives the adapters an effect."""
    rng = np.random.default_rng(0)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, lora.LoRAParam):
            noise = np.float32(scale * rng.normal(size=variable.shape))
            variable.set_value(jnp.asarray(np.asarray(variable[...]) + noise))


def params_of(model):
    """The base's parameters."""
    return nnx.filter_state(lora.base_state(model), nnx.Param)


@functools.cache
def _adapted_program(graphdef, merges):
    """(trained, rest, x) → the output, and the gradient of its mean square; that of the merged."""

    def both(trained, rest, x):
        def loss(trained, merge):
            model = nnx.merge(graphdef, trained, rest, copy=True)
            if merge:
                lora.merge(model)
            y = model(x)
            return (y**2).mean(), y

        own, y = jax.grad(loss, has_aux=True)(trained, False)
        return y, own, jax.grad(loss, has_aux=True)(trained, True)[0] if merges else None

    return jax.jit(both)


def outputs(model, x, merges=True):
    """(the output, its gradient with respect to A and B, and that of the merged model)."""
    graphdef, trained, rest = nnx.split(model, lora.LoRAParam, ...)
    return jax.tree.map(np.asarray, _adapted_program(graphdef, merges)(trained, rest, x))


def check_gradients(own, merged):
    for one, other in zip(*map(jax.tree.leaves, (own, merged)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


@functools.cache
def _program(graphdef):
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))


def output(model, x):
    """model(x) by one program, made once for models of the same structure."""
    graphdef, state = nnx.split(model)
    return jax.tree.map(np.asarray, _program(graphdef)(state, x))


@pytest.mark.parametrize(
    "kind, fmt, use_dora",
    # in turn with and without DoRA
    [(kind, "none", i % 2 == 0) for i, kind in enumerate(KINDS) if kind not in ALIKE]
    + cases.long(*((kind, "none", i % 2 == 0) for i, kind in enumerate(KINDS) if kind in ALIKE))
    + cases.long(*((kind, "none", i % 2 == 1) for i, kind in enumerate(KINDS)))
    + [(kind, "int4", False) for kind in QUANTIZED]
    + cases.long(
        *(
            (kind, "int4", False)
            for kind in (
                "multiplied",
                "other_bias",
                "other_einsum",
                "other_weight",
                "scaled",
                "activated",
                "by_keyword",
                "reads_kernel",
            )
        )
    )
    + cases.long(("standardized", "int4", True)),
)
def test_merged_equals_adapted(kind, fmt, use_dora):
    _, targets = KINDS[kind]
    x = IDS if kind == "tied" else X
    plain, model = (nnx.merge(*_made(kind), copy=True) for _ in range(2))
    if fmt != "none":
        quant.quantize_model(model, fmt)
    before = output(model, x)
    targets = (targets,) if isinstance(targets, str) else targets
    config = lora.LoRAConfig(rank=2, targets=targets, use_dora=use_dora)
    lora.inject(model, config, rngs=nnx.Rngs(1))
    merges = not use_dora  # whose norm counts as a constant
    np.testing.assert_allclose(outputs(model, x, merges)[0], before, atol=1e-5)
    assert isinstance(model.part, type(plain.part)) or fmt != "none"
    base = jax.tree.map(np.array, params_of(model))
    changed(model)
    trained = lora.collect(model, config)
    y, gradient, of_merged = outputs(model, x, merges)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    if merges:
        check_gradients(gradient, of_merged)
    assert np.abs(y - before).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, params_of(model), base)
    with lora.disabled(model):
        np.testing.assert_allclose(output(model, x), before, atol=1e-6)
    np.testing.assert_allclose(outputs(model, x, merges)[0], y, atol=1e-6)
    base_model = lora.get_base_model(model)
    np.testing.assert_allclose(output(base_model, x), before, atol=1e-6)
    lora.attach(base_model, trained)
    np.testing.assert_allclose(outputs(base_model, x, merges)[0], y, atol=1e-5)
    lora.merge(model)
    np.testing.assert_allclose(output(model, x), y, atol=2e-5)
    assert nnx.graphdef(model) == nnx.graphdef(plain)


def test_only_a_registered_call_that_is_a_product_is_one():
    products = (OtherBias, Named, Rows)
    others = (Activated, Scaled, Repeated, WithoutBias, AnyArguments, Turned)
    usual = {cls: registry.is_usual(cls(nnx.Rngs(0)), X) for cls in (*products, *others)}
    assert usual == dict.fromkeys(products, True) | dict.fromkeys(others, False)


@pytest.mark.parametrize("lead", [(), (3,), (1,), (1, 5), (3, 1), (1, 1), (2, 1, 3), (1, 2, 1, 1)])
def test_rows_that_are_flattened_and_parted_again_are_those_of_a_product(lead):
    assert registry.is_usual(Rows(nnx.Rngs(0)), jnp.ones((*lead, D)))
    assert registry.is_usual(Rows(nnx.Rngs(0)), jax.ShapeDtypeStruct((*lead, D), jnp.float32))


# ------------------------------------------------------------------------- stacks

PARAM_0, PARAM_1 = nnx.StateAxes({nnx.Param: 0, ...: None}), nnx.StateAxes({nnx.Param: 1, ...: 0})


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = linear(rngs, D, 12), linear(rngs, 12, D)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Scanned(nnx.Module):
    """Three blocks, on the axis that `axes` says."""

    def __init__(self, rngs, axes, made=0, block=Block):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=made)
        def blocks(rngs):
            return block(rngs)

        self.blocks, self.axes = blocks(rngs), axes

    def __call__(self, x):
        call = nnx.scan(lambda block, x: block(x), in_axes=(self.axes, nnx.Carry),
                        out_axes=nnx.Carry)  # fmt: skip
        return call(self.blocks, x)


class Split(Scanned):
    """As MaxText: only the parameters are scanned over."""

    def __call__(self, x):
        graphdef, params, rest = nnx.split(self.blocks, nnx.Param, ...)

        def step(x, params):
            return nnx.merge(graphdef, params, rest, copy=True)(x), None

        return jax.lax.scan(jax.checkpoint(step), x, params)[0]


@functools.cache
def _stack(kind):
    return nnx.split(STACKS[kind]())


STACKS = {
    "param_0": lambda: Scanned(nnx.Rngs(0), PARAM_0),
    "all_0": lambda: Scanned(nnx.Rngs(0), 0),
    "split": lambda: Split(nnx.Rngs(0), None),
    "param_1": lambda: Scanned(nnx.Rngs(0), PARAM_1, PARAM_1),
}


DORA, SOME = {"use_dora": True}, {"alpha_pattern": {r"1\.up": 3}, "layers": (0, 1)}
HOW = [("none", DORA), ("int4", SOME), ("none", DORA), ("int4", SOME)]


@pytest.mark.parametrize(
    "kind, fmt, settings",
    [
        ("param_1", "int4", SOME),
        *cases.long(
            *(("split", "none", DORA), ("param_0", "none", DORA), ("all_0", "int4", SOME)),
            *((kind, *how) for kind, how in zip(STACKS, HOW[::-1], strict=True)),
            *(("param_1", "none", SOME), ("param_1", "int4", DORA | SOME)),
        ),
    ],
)
def test_a_stack_is_adapted_layer_by_layer(kind, fmt, settings, tmp_path):
    plain, model = (nnx.merge(*_stack(kind), copy=True) for _ in range(2))
    if fmt != "none":
        quant.quantize_model(model, fmt)
    before = output(model, X)
    assert np.abs(before - output(plain, X)).max() < 0.6
    config = lora.LoRAConfig(rank=2, targets="all-linear", **settings)
    ranks = lora.inject(model, config, rngs=nnx.Rngs(1))
    layers = range(3) if not settings.get("layers") else range(2)
    assert set(ranks) == {f"blocks.{n}.{name}" for n in layers for name in ("up", "down")}
    merges = not settings.get("use_dora")
    np.testing.assert_allclose(outputs(model, X, merges)[0], before, atol=1e-5)
    changed(model, 0.1)
    y, gradient, of_merged = outputs(model, X, merges)
    if merges:
        check_gradients(gradient, of_merged)
    trained = lora.collect(model, config)
    lora.merge(model)
    np.testing.assert_allclose(output(model, X), y, atol=2e-5)
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    if fmt == "none":
        lora.attach(plain, trained)
        np.testing.assert_allclose(outputs(plain, X, merges)[0], y, atol=1e-6)


class Reads(Block):
    """Reads weights itself."""

    def __call__(self, x):
        return super().__call__(x) + x @ self.up.kernel[...] @ self.down.kernel


class ReadsAll(Scanned):
    """Reads the weights of the whole stack, too."""

    def __call__(self, x):
        return super().__call__(x) + self.blocks.up.kernel[...].mean()


@pytest.mark.parametrize("axes, made", [(PARAM_0, 0), (PARAM_1, PARAM_1)])
@pytest.mark.parametrize("fmt", [*cases.long("none"), "int4"])
def test_a_stack_reads_its_weights_as_a_merge_changes_them(fmt, axes, made):
    model = ReadsAll(nnx.Rngs(0), axes, made, Reads)
    if fmt != "none":
        quant.quantize_model(model, fmt)
    lora.inject(model, lora.LoRAConfig(rank=2, targets="all-linear"), rngs=nnx.Rngs(1))
    changed(model, 0.1)
    y = output(model, X)
    lora.merge(model)
    np.testing.assert_allclose(output(model, X), y, rtol=1e-4, atol=1e-4)


def test_paths_of_a_stack_do_not_depend_on_the_rest_of_the_model():
    config = lora.LoRAConfig(rank=2, targets=("up",))
    model = nnx.Dict(encoder=nnx.Dict(inner=STACKS["all_0"]()))
    alone = set(lora.inject(model, config, rngs=nnx.Rngs(1)))
    model = nnx.Dict(
        encoder=nnx.Dict(inner=STACKS["all_0"](), norm=nnx.RMSNorm(D, rngs=nnx.Rngs(0)))
    )
    assert alone == set(lora.inject(model, config, rngs=nnx.Rngs(1)))
    assert alone == {f"encoder.inner.blocks.{n}.up" for n in range(3)}


# ------------------------------------------------------------------------- calls


class Each(nnx.Module):
    """Its layer's output for each of several inputs."""

    def __init__(self, dtype):
        self.part = linear(nnx.Rngs(0), dtype=dtype)

    def __call__(self, inputs):
        return [self.part(x) for x in inputs]


@pytest.mark.parametrize("fmt", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_quantized_layer_promotes_as_the_dense_one(dtype, fmt):
    inputs = [jnp.eye(D, dtype=jnp.int32), jnp.ones((2, D), jnp.bfloat16),
              jnp.ones((0, D)), jnp.ones((2, 0, D), jnp.float16)]  # fmt: skip
    model = Each(dtype)
    expected = output(model, inputs)
    quant.quantize_model(model, fmt)
    found = output(model, inputs)
    lora.inject(model, lora.LoRAConfig(targets=("part",)), rngs=nnx.Rngs(0))
    adapted = jax.eval_shape(model, inputs)
    for own, like, plain in zip(found, adapted, expected, strict=True):
        assert own.dtype == like.dtype == plain.dtype
        assert own.shape == like.shape == plain.shape
        np.testing.assert_allclose(np.float32(own), np.float32(plain), atol=0.3)


def test_a_merge_restores_every_setting_of_a_layer():
    model = nnx.Dict(
        a=linear(nnx.Rngs(0), precision="highest", preferred_element_type=jnp.float32),
        b=linear(nnx.Rngs(0), D, 2),
        c=Multiplied(D, D, rngs=nnx.Rngs(0)),
    )
    model.a.kernel.set_metadata(note="kept")
    plain = nnx.graphdef(model)
    taken = quant.quantize_model(model, "int4")
    assert taken == {"a": "int4", "b": "int4", "c": "int4"}
    assert isinstance(model.c, Multiplied)
    assert model.a.kernel.shape == (D, D) and model.a.use_bias
    np.testing.assert_array_equal(X @ model.a.kernel, X @ model.a.kernel[...])
    dense = nnx.clone(model)
    quant.dequantize_model(dense)
    assert nnx.graphdef(dense) == plain
    np.testing.assert_allclose(dense.b(dense.a(X)), model.b(model.a(X)), atol=1e-5)
    lora.inject(model, lora.LoRAConfig(targets=("a",)), rngs=nnx.Rngs(1))
    lora.merge(model)
    assert nnx.graphdef(model) == plain


class Holder(nnx.Pytree):
    """Is no module, and reads its weights itself."""

    def __init__(self, rngs):
        self.part, self.w = linear(rngs), nnx.Param(jnp.eye(D))

    def __call__(self, x):
        return x @ self.part.kernel @ self.w


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", [True, False])
def test_methods_of_any_pytree_and_traced_functions_read_the_changed_weights(method, compiled):
    def function(holder, x):
        return x @ holder.part.kernel @ holder.w

    run = Holder.__call__ if method else function
    run = jax.jit(run) if compiled else run
    model = nnx.Dict(holder=Holder(nnx.Rngs(0)))
    lora.inject(model, lora.LoRAConfig(targets=("part", "w")), rngs=nnx.Rngs(1))
    stored = run(model.holder, X)
    changed(model)
    y = run(model.holder, X)
    closure = jax.jit(lambda x: run(model.holder, x))(X) if compiled else None
    both = nnx.DiffState(0, lora.LoRAParam)
    gradient = nnx.grad(lambda holder: function(holder, X).sum(), argnums=both)(model.holder)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    lora.merge(model)
    if compiled:  # a closure reads the same as an argument
        np.testing.assert_allclose(closure, y, atol=1e-5)
    if method or compiled:
        np.testing.assert_allclose(y, run(model.holder, X), atol=1e-5)
    else:  # as in a notebook
        np.testing.assert_array_equal(y, stored)


class Pair(NamedTuple):
    part: nnx.Linear
    other: nnx.Linear


@struct.dataclass
class PairOfData:
    part: nnx.Linear
    other: nnx.Linear


class Holds(nnx.Module):
    """Has its layers in a container that cannot be changed."""

    def __init__(self, container, rngs):
        self.pair = nnx.data(container(linear(rngs), linear(rngs)))

    def __call__(self, x):
        part, other = jax.tree.leaves(self.pair, is_leaf=lambda own: isinstance(own, nnx.Module))
        return other(part(x))


@pytest.mark.parametrize("container", [Pair, PairOfData, lambda *layers: layers])
def test_layers_in_tuples_and_dataclasses_are_quantized_and_merged(container):
    model = Holds(container, nnx.Rngs(0))
    plain, structure = model(X), nnx.graphdef(model)
    quant.quantize_model(model, "int8")
    lora.inject(model, lora.LoRAConfig(targets="all-linear"), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(X), plain, atol=0.05)
    changed(model)
    y = model(X)
    assert np.abs(y - plain).max() > 0.1
    lora.merge(model)
    np.testing.assert_allclose(model(X), y, atol=2e-5)
    assert nnx.graphdef(model) == structure


class OwnParam(nnx.Param):
    pass


class Unlisted(nnx.Module, pytree=False):
    """Has parts that Flax finds without marks, and parameters of a class of its own and of none."""

    def __init__(self, rngs):
        self.layers = [linear(rngs)]
        self.w, self.empty = OwnParam(jnp.eye(D)), nnx.Param(None)

    def __call__(self, x):
        return self.layers[0](x @ self.w)


def test_parts_of_own_classes_are_adapted():
    model = Unlisted(nnx.Rngs(0))
    plain, structure = model(X), nnx.graphdef(model)
    left = lora.inject(model, lora.LoRAConfig(targets="all-linear"), rngs=nnx.Rngs(1)).left
    assert left == {"w": "a parameter of Unlisted, which is not registered"}
    lora.strip(model)
    lora.inject(model, lora.LoRAConfig(targets=("layers.0", "w")), rngs=nnx.Rngs(1))
    changed(model)
    y = model(X)
    assert np.abs(y - plain).max() > 0.1
    np.testing.assert_allclose(nnx.clone(model)(X), y, atol=1e-6)
    lora.merge(model)
    np.testing.assert_allclose(model(X), y, atol=2e-5)
    assert nnx.graphdef(model) == structure


class Family(nnx.Module):
    """Registers its subclasses, which name themselves."""

    names: ClassVar = []

    def __init_subclass__(cls, *, name):
        super().__init_subclass__()
        cls.names.append(name)


class OwnLinear(nnx.Linear, Family, name="linear"):
    pass


class Raws(Raw, Family, name="raw"):
    pass


def test_classes_that_register_their_subclasses_see_none_of_adapted_layers():
    model = nnx.Dict(linear=OwnLinear(D, D, rngs=nnx.Rngs(0)), raw=Raws(nnx.Rngs(0)))
    taken = lora.inject(model, lora.LoRAConfig(targets=("linear", "wq")), rngs=nnx.Rngs(0))
    assert len(taken) == 2 and Family.names == ["linear", "raw"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).raw(X), model.raw(X))
    lora.merge(model)
    saved = lora.LoRAConfig(targets=("linear",), modules_to_save=("raw",))
    lora.inject(model, saved, rngs=nnx.Rngs(0))
    assert Family.names == ["linear", "raw"]


class Doubled(nnx.Param):
    def get_value(self, **settings):
        return 2 * super().get_value(**settings)


def test_a_weight_that_changes_when_it_is_read_is_refused():
    model = Model(linear(nnx.Rngs(0)))
    model.part.kernel = Doubled(model.part.kernel[...])
    found = "part has a Doubled that changes its value when it is read"
    with pytest.raises(errors.UserError, match=found):
        lora.inject(model, lora.LoRAConfig(targets=("part",)), rngs=nnx.Rngs(0))
    taken = lora.inject(model, lora.LoRAConfig(targets="all-linear"), rngs=nnx.Rngs(0))
    assert list(taken) == ["first"] and taken.left == {"part": found.removeprefix("part ")}


def test_all_linear_takes_no_bias_of_a_bridged_stack():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(D)(x), None

    scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    model = nnx.Dict(stack=nnx.bridge.ToNNX(scan(), rngs=nnx.Rngs(0)), other=linear(nnx.Rngs(0)))
    nnx.bridge.lazy_init(model["stack"], X, None)
    taken = lora.inject(model, lora.LoRAConfig(targets="all-linear"), rngs=nnx.Rngs(1))
    assert list(taken) == ["other"] and "stack.Dense_0.bias" in taken.left


class Functional(nnx.Module):
    """Calls a function that holds a weight of the model as it is stored."""

    def __init__(self, rngs):
        self.part = linear(rngs)

    def __call__(self, x):
        return self.part(x) + x @ vars(self.part)["kernel"]


def test_a_merge_compares_the_outputs_of_a_call():
    model = ReadsKernel(nnx.Rngs(0))
    lora.inject(model, lora.LoRAConfig(targets=("part",)), rngs=nnx.Rngs(1))
    changed(model)
    lora.merge(model, X)
    assert type(model.part) is nnx.Linear
    half = Model(linear(nnx.Rngs(0), dtype=jnp.bfloat16))
    lora.inject(half, lora.LoRAConfig(targets=("part",)), rngs=nnx.Rngs(1))
    changed(half)
    lora.merge(half, X)
    model = Functional(nnx.Rngs(0))
    lora.inject(model, lora.LoRAConfig(targets=("part",)), rngs=nnx.Rngs(1))
    changed(model)
    y = model(X)
    with pytest.raises(errors.UserError, match="an output that changes by"):
        lora.merge(model, x=X)
    np.testing.assert_array_equal(model(X), y)


def test_a_single_layer_is_a_model(tmp_path):
    model, other = linear(nnx.Rngs(0)), linear(nnx.Rngs(0))
    quant.quantize_model(model, "int8")
    before = model(X)
    config = lora.LoRAConfig(rank=2, targets="all-linear")
    assert lora.inject(model, config, rngs=nnx.Rngs(1)) == {"kernel": 2}
    changed(model)
    y = model(X)
    assert jnp.abs(y - before).max() > 0.01
    peft.save(tmp_path, model, config)
    quant.quantize_model(other, "int8")
    peft.load(other, tmp_path)
    np.testing.assert_array_equal(other(X), y)
    lora.merge(model)
    np.testing.assert_allclose(model(X), y, atol=1e-5)
    assert type(model) is nnx.Linear


def test_a_merge_leaves_a_model_with_the_same_variables_alone():
    model = Block(nnx.Rngs(0))
    lora.inject(model, lora.LoRAConfig(rank=2, targets="all-linear"), rngs=nnx.Rngs(1))
    changed(model)
    y, other = model(X), nnx.merge(*nnx.split(model))
    assert other.up.kernel is model.up.kernel
    lora.merge(other)
    np.testing.assert_array_equal(model(X), y)
    np.testing.assert_allclose(other(X), y, atol=1e-5)


@pytest.mark.parametrize("change", [
    lambda model: lora.inject(model, lora.LoRAConfig(targets=("up",)), rngs=nnx.Rngs(1)),
    lambda model: quant.quantize_model(model, "int4"),
])  # fmt: skip
def test_a_model_without_arrays_is_refused(change):
    model = nnx.eval_shape(lambda: Block(nnx.Rngs(0)))
    with pytest.raises(errors.UserError, match="4 parameters of which only the shapes are there"):
        change(model)


def test_a_shared_layer_is_found_by_each_of_its_names(tmp_path):
    model = nnx.Dict(a=linear(nnx.Rngs(0)))
    model.b = nnx.Dict(inner=model.a)
    config = lora.LoRAConfig(rank=2, targets=("inner",))
    plain = nnx.clone(model)
    assert lora.inject(model, config, rngs=nnx.Rngs(1)) == {"b.inner": 2}
    changed(model)
    trained = lora.collect(model, config)
    assert set(trained.factors) == {"b.inner"}
    lora.attach(plain, trained)
    np.testing.assert_array_equal(plain.b.inner(X), model.a(X))


class SharedRaw(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = Raw(rngs), Raw(rngs)
        self.two.wq = self.one.wq

    def __call__(self, x):
        return self.two(self.one(x))


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_parameter_of_two_modules_is_adapted_in_the_one_that_is_targeted(init):
    model = SharedRaw(nnx.Rngs(0))
    before, kept = model(X), model.two.wq[...]
    config = lora.LoRAConfig(rank=2, targets=("one.wq",), init_lora_weights=init)
    lora.inject(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(X), before, atol=1e-5)
    changed(model)
    y = model(X)
    lora.merge(model)
    np.testing.assert_allclose(model(X), y, atol=1e-5)
    np.testing.assert_array_equal(model.two.wq[...], kept)


@pytest.mark.parametrize("make, target", [(ByKeyword, "part"), (Raw, "wq")])
def test_the_base_of_an_adapter_that_starts_from_the_weights(make, target):
    model = make(nnx.Rngs(0))
    before = model(X)
    config = lora.LoRAConfig(rank=2, targets=(target,), init_lora_weights="pissa")
    lora.inject(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(lora.get_base_model(model)(X), before, atol=1e-5)
    with lora.disabled(model):
        np.testing.assert_allclose(model(X), before, atol=1e-5)
    np.testing.assert_allclose(model(X), before, atol=1e-5)


def test_an_update_from_a_method_changes_what_is_stored():
    class Trainer(nnx.Module):
        def __init__(self, model):
            self.model = model

        def restore(self, state):
            nnx.update(self.model, state)
            lora.merge(self.model)

    model, other = Model(Raw(nnx.Rngs(0))), Model(Raw(nnx.Rngs(1)))
    lora.inject(model, lora.LoRAConfig(rank=2, targets=("first", "wq")), rngs=nnx.Rngs(1))
    Trainer(model).restore(nnx.state(other))
    np.testing.assert_allclose(model(X), other(X), atol=1e-6)


@pytest.mark.parametrize(
    ("part", "targets"),
    [(Multiplied(D, D, rngs=nnx.Rngs(0)), "all-linear"), (Raw(nnx.Rngs(0)), ("wq", "first"))],
)
def test_an_adapted_model_is_pickled(part, targets):
    model = Model(part)
    quant.quantize_model(model, "int4")
    lora.inject(model, lora.LoRAConfig(targets=targets), rngs=nnx.Rngs(1))
    changed(model)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again(X), model(X))
    assert type(again.part) is type(model.part)


def test_a_checkpoint_of_the_base_is_restored_into_an_adapted_model(tmp_path):
    model, other = Block(nnx.Rngs(0)), Block(nnx.Rngs(1))
    lora.inject(model, lora.LoRAConfig(targets=("up",)), rngs=nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", nnx.state(other))
        checkpointer.wait_until_finished()
        nnx.update(model, checkpointer.restore(tmp_path / "base", lora.base_state(model)))
    np.testing.assert_allclose(model(X), other(X), atol=1e-6)


class WithDropout(nnx.Module):
    def __init__(self, rngs):
        self.part, self.drop = linear(rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.part(x)


def test_dropout_is_drawn_anew_in_each_call_of_a_model_with_rngs():
    model = WithDropout(nnx.Rngs(0))
    structure = jax.tree.structure(nnx.state(model))
    lora.inject(model, lora.LoRAConfig(targets=("part",), dropout=0.5), rngs=nnx.Rngs(1))
    changed(model)
    np.testing.assert_array_equal(model(X), model(X))
    training = nnx.view(model, deterministic=False)
    call = nnx.jit(lambda model, x: model(x))
    first, second = call(training, X), call(training, X)
    assert jnp.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(nnx.view(training, deterministic=True)(X), model(X))
    assert jax.tree.structure(lora.base_state(model)) == structure
    streams = nnx.StateAxes({nnx.RngState: 0, ...: None})
    each = nnx.split_rngs(splits=2)(nnx.vmap(lambda model: model(X), in_axes=(streams,)))
    assert jnp.abs(jnp.subtract(*each(training))).max() > 0.01


def test_dropout_of_experts_is_drawn_anew_in_each_call():
    model = nnx.Dict(experts=nnx.Einsum("ebd,edf->ebf", (2, D, D), rngs=nnx.Rngs(0)))
    model.streams, x = nnx.Rngs(0), jnp.ones((2, 3, D))
    lora.inject(model, lora.LoRAConfig(targets=("experts",), dropout=0.5), rngs=nnx.Rngs(1))
    changed(model)
    model.train()
    assert jnp.abs(model.experts(x) - model.experts(x)).max() > 0.01


def test_dropout_of_a_weight_that_is_read_is_an_error():
    model = ReadsKernel(nnx.Rngs(0))
    lora.inject(model, lora.LoRAConfig(targets=("part",), dropout=0.5), rngs=nnx.Rngs(1))
    model.train()
    with pytest.raises(errors.UserError, match=r"a Linear whose weight is read, with dropout 0\.5"):
        model(X)


# ------------------------------------------------------------------------- what was left


def test_what_was_left_is_named_with_the_reason():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(a=nnx.List([linear(rngs), linear(rngs)]), raw=Raw(rngs), head=linear(rngs),
                     embed=nnx.Embed(4, D, rngs=rngs), norm=nnx.RMSNorm(D, rngs=rngs))  # fmt: skip
    left = {
        "embed": "an embedding",
        "head": "excluded",
        "raw.wq": "a parameter of Raw, which is not registered",
        "raw.wk": "a parameter of Raw, which is not registered",
    }
    quantized = quant.quantize_model(nnx.clone(model), "int4", exclude=("head",))
    assert dict(quantized) == {"a.0": "int4", "a.1": "int4"} and set(quantized.left) == set(left)
    config = lora.LoRAConfig(targets="all-linear", exclude=("head",))
    taken = lora.inject(model, config, rngs=nnx.Rngs(1))
    assert taken == {"a.0": 8, "a.1": 8} and taken.left == left
    assert str(taken).splitlines()[:2] == ["a.N (2): 8", "left: embed, an embedding"]
    first = lora.summary(model).splitlines()[0]
    total = 5 * D * D + 3 * D + 4 * D + D + 2 * 2 * 8 * D
    assert (
        first
        == f"trainable params: 256 || all params: {total:,} || trainable%: {25600 / total:.4f}"
    )


def test_layers_that_cannot_be_taken_are_left():
    rngs = nnx.Rngs(0)
    blocks = nnx.vmap(nnx.vmap(Block))(nnx.Rngs(jax.random.split(jax.random.key(0), (2, 3))))
    model = nnx.Dict(a=linear(rngs), einsum=SumsRows(rngs).part, blocks=blocks,
                     normed=nnx.WeightNorm(linear(rngs), rngs=rngs))  # fmt: skip
    einsum = "has an einsum that is no product with a matrix: axis t of x is in neither W nor y"
    normed = {"normed.layer_instance": "is in a WeightNorm, which scales its weight"}
    quantized = quant.quantize_model(model, "int4")
    stack = dict.fromkeys(["blocks.down", "blocks.up"], "a stack of stacks")
    assert quantized == {"a": "int4"} and quantized.left == {"einsum": einsum, **normed, **stack}
    taken = lora.inject(model, lora.LoRAConfig(targets="all-linear"), rngs=nnx.Rngs(1))
    assert taken.left == {"einsum.kernel": f"a parameter of Einsum, which {einsum}", **normed}
    assert len(taken) == 1 + 2 * 2 * 3


def test_a_module_of_an_unknown_class_is_refused_with_its_parameters():
    model, found = Model(Raw(nnx.Rngs(0))), r"part is of class Raw, .*; target part\.wq, part\.wk\n"
    with pytest.raises(errors.UserError, match=found):
        lora.inject(model, lora.LoRAConfig(targets=("part",)), rngs=nnx.Rngs(0))


def test_a_parameter_in_a_list_is_refused_by_name():
    model = nnx.Dict(a=linear(nnx.Rngs(0)), ws=nnx.List([nnx.Param(jnp.ones((D, D)))]))
    assert lora.inject(
        nnx.clone(model), lora.LoRAConfig(targets="all-linear"), rngs=nnx.Rngs(0)
    ).left == {"ws.0": "a parameter of List, which is not registered"}
    with pytest.raises(errors.UserError, match=r"ws is of class List, which is not registered"):
        lora.inject(model, lora.LoRAConfig(targets=("ws",)), rngs=nnx.Rngs(0))


def test_a_quantized_model_has_the_parameters_of_the_dense_one():
    totals = set()
    for fmt in ("none", "int4", "int8"):
        model = Block(nnx.Rngs(0))
        if fmt != "none":
            quant.quantize_model(model, fmt)
        lora.inject(model, lora.LoRAConfig(rank=2, targets="all-linear"), rngs=nnx.Rngs(1))
        totals.add(lora.summary(model).splitlines()[0])
    assert len(totals) == 1 and "all params: 292 ||" in totals.pop()


def test_targets_that_match_nothing_list_the_likeliest_names_first():
    rngs = nnx.Rngs(0)
    layers = nnx.List([Block(rngs) for _ in range(2)])
    head, embed = linear(rngs, D, 4), nnx.Embed(4, D, rngs=rngs)
    model = nnx.Dict(layers=layers, head=head, embed=embed)
    names = r"down \(linear 12 → 8\), up \(linear 8 → 12\), head \(linear 8 → 4\), embed \(embed"
    with pytest.raises(errors.UserError, match=names):
        lora.inject(model, lora.LoRAConfig(), rngs=nnx.Rngs(0))
    with pytest.raises(errors.UserError, match=r"wk \(parameter 8 → 8\), wq \(parameter"):
        lora.inject(Raw(nnx.Rngs(0)), lora.LoRAConfig(targets="all-linear"), rngs=nnx.Rngs(0))


def test_a_parameter_is_adapted_as_the_einsum_of_its_module_multiplies():
    config = lora.LoRAConfig(rank=2, targets=("part.w",))
    ranks = lora.inject(Model(OwnEinsum(nnx.Rngs(0))), config, rngs=nnx.Rngs(0))
    assert dict(ranks) == {"part.w": 2}  # one adapter of K = D and N = 2 · 4
    assert len(lora.inject(Model(Experts(nnx.Rngs(0))), config, rngs=nnx.Rngs(0))) == 2
