"""Layers of all classes and axes: how they are adapted, merged, saved and loaded."""

import dataclasses
import pathlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from lora_jax import errors, lora
from lora_jax.kernels import int4_matmul
from lora_jax.layers import linear_map
from lora_jax.lora import config as lora_config
from lora_jax.lora import linen, peft, site
from lora_jax.lora.nnx import adapted as found_adapted
from lora_jax.lora.nnx import collect, inject, sites
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx import saved as nnx_saved
from lora_jax.quant import conversion, formats
from lora_jax.quant import linear as quant_linear

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lora_mixed"


def rand(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ------------------------------------------------------------------------- axes

EINSUMS = {  # einsum: shapes of x and W, K, N
    "BTD,DNH->BTNH": ((2, 3, 4), (4, 5, 6), 4, 30),
    "BTNH,NHD->BTD": ((2, 3, 5, 6), (5, 6, 4), 30, 4),
    "BSD,CKDH->CBSKH": ((2, 3, 4), (2, 5, 4, 6), 4, 60),
    "...D,DF->...F": ((2, 3, 4), (4, 7), 4, 7),
    "BTaN,NHa->BTH": ((2, 3, 5, 4), (4, 6, 5), 20, 6),
    "EBD,EDF->EBF": ((3, 2, 4), (3, 4, 5), 4, 5),
    "BED,EFD->BEF": ((2, 3, 4), (3, 5, 4), 4, 5),
}


@pytest.mark.parametrize("text", EINSUMS)
def test_a_linear_map_multiplies_as_its_einsum(text):
    shape_x, shape_w, k, n = EINSUMS[text]
    how, x, w = linear_map.parse(text), rand(*shape_x), rand(*shape_w, seed=1)
    matrix = how.matrix(w)
    assert matrix.shape == (*how.lead(shape_w), k, n) and how.sizes(shape_w) == (k, n)
    np.testing.assert_array_equal(how.tensor(matrix, shape_w), w)
    expected = jnp.einsum(text, x, w)
    np.testing.assert_allclose(how.multiply(x, matrix, shape=shape_w), expected, atol=1e-5)
    # One number for each output: the same as multiplying the columns of W.
    each = rand(*how.lead(shape_w), n, seed=2)
    scaled = jnp.einsum(text, x, how.tensor(matrix * each[..., None, :], shape_w))
    np.testing.assert_allclose(
        expected * how.spread(each, expected.ndim, shape_w), scaled, atol=1e-5
    )
    stack = rand(7, *shape_w)
    assert how.matrix(stack).shape == (7, *how.lead(shape_w), k, n)
    np.testing.assert_array_equal(how.tensor(how.matrix(stack), stack.shape), stack)


@pytest.mark.parametrize(
    "text, found",
    [
        ("BTD,DF", "not of the form"),
        ("BTD,...F->BTF", "not of the form"),
        ("BTD,DDF->BTF", "axis D twice in W"),
        ("BTD,DF->BF", "axis T of x is in neither W nor y"),
        ("BTD,DFG->BTF", "axis G of W is in neither x nor y"),
        ("BTD,DF->BTFH", "axis H of y is new"),
        ("BTD,D->BTD", "no axis that is summed"),
    ],
)
def test_einsums_that_are_no_matrix_product_are_refused(text, found):
    with pytest.raises(errors.UserError, match=f"(?s){found}.*{text}"):
        linear_map.parse(text)


# ------------------------------------------------------------------------- layer classes


class Heads(nnx.Module):
    """A class of our own, with a bias, and with its weight under another name."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (6, 2, 5)))
        self.bias = nnx.Param(jax.random.normal(rngs.params(), (2, 5)))

    def __call__(self, x):
        return jnp.einsum("btd,dnh->btnh", x, self.w[...]) + self.bias[...][None, None]


lora.register(Heads, "btd,dnh->btnh", weight="w")


class Layers(nnx.Module):
    """A layer of each class, with concatenated outputs."""

    def __init__(self, rngs):
        self.general = nnx.LinearGeneral(6, (2, 5), rngs=rngs)
        self.back = nnx.LinearGeneral((2, 5), 6, axis=(-1, -2), rngs=rngs)  # sorted by Flax
        self.front = nnx.LinearGeneral(4, 3, axis=1, use_bias=False, rngs=rngs)
        self.per_row = nnx.LinearGeneral(6, 3, batch_axis={0: 2}, rngs=rngs)
        self.einsum = nnx.Einsum("btd,ndh->btnh", (2, 6, 5), (2, 5), rngs=rngs)
        self.heads = Heads(rngs)
        self.conv = nnx.Conv(6, 5, 3, padding="CAUSAL", kernel_dilation=2, rngs=rngs)

    @nnx.jit
    def __call__(self, x):
        wide = self.general(x)
        outputs = (wide, self.back(wide), self.front(x), self.per_row(x), self.einsum(x),
                   self.heads(x), self.conv(x))  # fmt: skip
        return jnp.concatenate([y.reshape(-1) for y in outputs])


NAMES = ("general", "back", "front", "einsum", "heads", "conv")


def adapted(model, scale=0.3, **settings):
    """The model with adapters that have an effect."""
    settings = lora_config.LoRAConfig(**{"rank": 2, "targets": NAMES, **settings})
    lora.inject(model, settings, rngs=nnx.Rngs(1))
    state = nnx.state(model, lora.LoRAParam)
    rng = np.random.default_rng(3)
    moved = jax.tree.map(lambda p: p + scale * rng.normal(size=p.shape).astype(np.float32), state)
    nnx.update(model, moved)
    for found in sites.find(model):
        if len(set(ranks := getattr(found.module, "lora_ranks", ()))) > 1:
            used = (np.arange(max(ranks)) < np.array(ranks)[:, None])[:, None]
            A, B = lora_layer.factors(found.module)
            A.set_value(A[...] * used)
            B.set_value(B[...] * used.mT)
    return settings


@pytest.mark.parametrize("use_dora", [*cases.long(False), True])
def test_every_kind_is_adapted_merged_saved_and_loaded(use_dora, tmp_path):
    x, plain, model = rand(2, 4, 6), Layers(nnx.Rngs(0)), Layers(nnx.Rngs(0))
    base = plain(x)
    fresh = Layers(nnx.Rngs(0))
    names = (*NAMES, "per_row")
    settings = lora_config.LoRAConfig(rank=2, targets=names, use_dora=use_dora)
    ranks = lora.inject(fresh, settings, rngs=nnx.Rngs(1))
    assert set(ranks) == {*NAMES, "per_row.0", "per_row.1"}
    np.testing.assert_allclose(fresh(x), base, atol=1e-5)

    settings = adapted(model, targets=names, use_dora=use_dora)
    expected = model(x)
    sizes = [y.size for y in (plain.general(x), x, plain.front(x), plain.per_row(x),
                              plain.einsum(x), plain.heads(x), plain.conv(x))]  # fmt: skip
    for part in np.split(np.abs(np.asarray(expected - base)), np.cumsum(sizes)[:-1]):
        assert part.max() > 0.1  # each layer's own

    peft.save(tmp_path, model, settings, base_model="layers")
    loaded = Layers(nnx.Rngs(0))
    config = peft.load(loaded, tmp_path)
    assert config == dataclasses.replace(settings, targets=tuple(sorted(names)))
    np.testing.assert_array_equal(loaded(x), expected)
    ratios = lora.effects(model)
    assert set(ratios) == set(ranks) and min(ratios.values()) > 0.05

    lora.merge(model)
    assert not found_adapted.by_name(model) and type(model.conv) is nnx.Conv
    np.testing.assert_allclose(model(x), expected, atol=2e-5)
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    for path, weight in nnx.to_flat_state(nnx.state(plain, nnx.Param)):
        if path[-1] in ("kernel", "w"):
            merged = dict(nnx.to_flat_state(nnx.state(model)))[path]
            change = np.linalg.norm(merged[...] - weight[...]) / np.linalg.norm(weight[...])
            if path[0] != "per_row":
                assert change == pytest.approx(ratios[path[0]], rel=1e-3)


@pytest.mark.parametrize("use_dora", [False, *cases.long(True)])
def test_every_kind_is_adapted_on_a_quantized_base(use_dora):
    x, plain, model = rand(2, 4, 6), Layers(nnx.Rngs(0)), Layers(nnx.Rngs(0))
    conversion.quantize_model(model, "int4")
    names = ("general", "back", "front", "einsum", "heads")
    layers = [getattr(model, name) for name in names]
    assert all(isinstance(layer, quant_linear.QuantLayer) for layer in layers)
    assert model.heads.bias is not None and "w" not in vars(model.heads)
    for layer, dense, name in ((model.heads, plain.heads, "w"), (model.back, plain.back, "kernel")):
        weight, before = getattr(layer, name), getattr(dense, name)
        assert (weight.shape, weight.dtype, weight.ndim) == (
            before.shape,
            before.dtype,
            before.ndim,
        )
        np.testing.assert_allclose(weight[...], before[...], atol=0.5)
        np.testing.assert_array_equal(weight.value, weight[...])
    assert type(model.conv) is nnx.Conv and type(model.per_row) is nnx.LinearGeneral  # as they were
    rounded = model(x)
    assert 0.01 < np.abs(rounded - plain(x)).max() < 1

    settings = adapted(model, use_dora=use_dora)
    expected = model(x)
    adapter = lora.collect(model, settings)
    again = Layers(nnx.Rngs(0))
    conversion.quantize_model(again, "int4")
    lora.attach(again, adapter)
    np.testing.assert_allclose(again(x), expected, atol=1e-5)
    lora.merge(model)
    np.testing.assert_allclose(model(x), expected, atol=2e-3)
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    adapted(model, targets=("back",))
    with pytest.raises(errors.UserError, match="back has an adapter"):
        conversion.quantize_model(model, "int8")


def test_the_layer_stays_what_it_was():
    """Its class, its attributes and the paths of its parameters: a checkpoint still fits."""
    plain, model = Layers(nnx.Rngs(5)), Layers(nnx.Rngs(0))
    adapted(model)
    assert isinstance(model.general, nnx.LinearGeneral) and isinstance(model.heads, Heads)
    assert model.conv.kernel_size == (3,) and model.general.out_features == (2, 5)
    checkpoint = nnx.state(plain)
    own = nnx.state(model, nnx.filterlib.All(nnx.Param, nnx.Not(lora.LoRAParam)))
    assert jax.tree.structure(own) == jax.tree.structure(nnx.state(plain, nnx.Param))
    nnx.update(model, checkpoint)
    x = rand(2, 4, 6)
    lora.merge(model)
    weights = plain.heads.w[...]
    assert np.abs(model.heads.w[...] - weights).max() > 0.1
    np.testing.assert_array_equal(model.heads.bias[...], plain.heads.bias[...])
    assert model(x).shape == plain(x).shape


@pytest.mark.long
def test_a_vmapped_stack_of_any_kind_has_a_name_for_each_layer(tmp_path):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return Heads(rngs)

    model = nnx.Dict(stack=stacked(nnx.Rngs(0)), out=nnx.Linear(5, 1, rngs=nnx.Rngs(0)))
    plain = nnx.clone(model)
    settings = adapted(model, targets=("stack",), use_dora=True, layers=(0, 2),
                       rank_pattern={r"stack\.2": 3})  # fmt: skip
    assert model.stack.lora_ranks == (2, 0, 3)
    assert set(found_adapted.by_name(model)) == {"stack.0", "stack.2"}
    x = rand(3, 2, 4, 6)

    def run(model):
        return nnx.vmap(lambda layer, x: layer(x))(model.stack, x)

    out = run(model)
    change = np.abs(np.asarray(out - run(plain))).max(axis=(1, 2, 3, 4))
    assert change[1] < 1e-5 < 0.1 < min(change[0], change[2])  # the middle one has no adapter
    peft.save(tmp_path, model, settings, base_model="")
    loaded = nnx.clone(plain)
    peft.load(loaded, tmp_path)
    np.testing.assert_allclose(run(loaded), out, atol=1e-5)
    lora.merge(loaded)
    np.testing.assert_allclose(run(loaded), out, atol=2e-5)


def test_layers_of_one_shape_are_merged_by_one_program(monkeypatch):
    model = nnx.Dict({f"layer_{i}": nnx.Linear(40, 8, rngs=nnx.Rngs(i)) for i in range(3)})
    conversion.quantize_model(model, "int4")
    adapted(model, targets="all-linear")
    compiled, dequantize = [], formats.dequantize
    monkeypatch.setattr(
        formats, "dequantize", lambda *args, **how: compiled.append(how) or dequantize(*args, **how)
    )
    lora.merge(model)
    assert len(compiled) == 1 and type(model.layer_2) is nnx.Linear


class Gate(nnx.Module):
    """A class that is not registered."""

    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones((4, 4)))
        self.norm = nnx.RMSNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 4, rngs=rngs)


def awkward():
    rngs = nnx.Rngs(0)
    return nnx.Dict(
        a=nnx.Linear(4, 4, rngs=rngs),
        b=nnx.Dict(gate=Gate(rngs), attn=nnx.Dict(q=nnx.Linear(4, 4, rngs=rngs))),
        scaled=nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs),
        packed=conversion.quantize_linear(nnx.Linear(4, 4, rngs=rngs), "int8"),
    )


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (dict(targets=("a", "layer_instance")), ["scaled.layer_instance is in a WeightNorm"]),
        (dict(targets=("a", "gate")), ["b.gate is of class Gate, which is not registered"]),
        (dict(targets="a|.*norm"), ["b.gate.norm is of class RMSNorm, which is not registered"]),
        (dict(targets="a|.*attn"), ["b.attn is not a layer itself"]),
        (
            dict(targets=("a", "attn", "gate")),
            ["'attn' matches nothing", "b.gate is", "b.attn is not a layer itself"],
        ),
        (
            dict(rank=2, targets=("a", "packed"), init_lora_weights="pissa"),
            ["packed is in int8"],
        ),
        (
            dict(targets=("a",), modules_to_save=("b.attn", "packed")),
            ["packed is quantized", "b.attn is a container"],
        ),
        (dict(targets=("a",), parts={"a": (1, -2)}), ["parts (1, -2)"]),
    ],
)
def test_a_refusal_lists_all_and_leaves_the_model_as_it_was(settings, found):
    model = awkward()
    graphdef, state = nnx.split(model)
    before = jax.tree.map(np.asarray, state)
    with pytest.raises(errors.UserError) as raised:
        lora.inject(model, lora_config.LoRAConfig(**settings), rngs=nnx.Rngs(0))
    lines = raised.value.found.splitlines()
    assert len(lines) == len(found)
    assert all(text in line for text, line in zip(found, lines, strict=True))
    assert nnx.split(model)[0] == graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_what_cannot_be_adapted_may_be_in_the_model_if_it_is_not_targeted():
    for settings, paths in (
        (dict(targets=("a",)), {"a"}),
        (
            dict(targets="all-linear", exclude=("layer_instance",)),
            {"a", "b.gate.up", "b.attn.q", "packed"},
        ),
        (dict(targets="b.*", exclude=("gate", "norm")), {"b.gate.up", "b.attn.q"}),
    ):
        config = lora_config.LoRAConfig(**settings)
        assert set(lora.inject(awkward(), config, rngs=nnx.Rngs(0))) == paths


class Unnamed(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((4, 4)))


class Flat(Unnamed):
    pass


lora.register(Unnamed, "...i,io->...o")  # its weight is no `kernel`
lora.register(Flat, "...D,DNH->...NH", weight="w")


def test_layers_unlike_their_registration_are_refused_only_if_they_are_targeted():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        a=nnx.Linear(4, 4, rngs=rngs), unnamed=Unnamed(), flat=Flat(),
        odd=nnx.Einsum("...ab,...bc->...ac", (2, 4, 4), rngs=rngs),
    )  # fmt: skip
    with pytest.raises(errors.UserError) as raised:
        lora.inject(model, lora_config.LoRAConfig(targets="all-linear"), rngs=rngs)
    assert sorted(raised.value.found.split("\n            ")) == [
        "flat has a weight of 2 axes, but multiplies by one of 3",
        "unnamed has no 'kernel', which Unnamed is registered to hold its weight in",
    ]
    lora.inject(model, lora_config.LoRAConfig(targets=("a",)), rngs=rngs)
    assert set(found_adapted.by_name(model)) == {"a"}
    for register, cls in ((lora.register, Gate), (linen.register, nn.Module)):
        with pytest.raises(errors.UserError, match="not of the form"):
            register(cls, "ab")


def test_without_adapters_there_is_nothing_to_collect_or_merge():
    config = lora_config.LoRAConfig(targets=("a",))
    for attempt in (lora.merge, lambda model: lora.collect(model, config)):
        with pytest.raises(errors.UserError, match="a model with adapters"):
            attempt(awkward())


# ------------------------------------------------------------------------- PEFT's own


class Mixed(nnx.Module):
    """make_golden.py's module of that name, channels last."""

    def __init__(self, arrays):
        rngs = nnx.Rngs(0)
        self.image = nnx.Conv(3, 6, (3, 2), strides=(2, 1), padding=((1, 1), (0, 0)), rngs=rngs)
        self.text = nnx.Embed(10, 6, rngs=rngs)
        self.line = nnx.Conv(6, 5, 3, padding=1, rngs=rngs)
        self.out = nnx.Linear(5, 4, rngs=rngs)
        for name in ("image", "line", "out"):
            layer, weight = getattr(self, name), arrays[f"base.{name}.weight"]
            turned = np.moveaxis(weight, (0, 1), (-1, -2))  # torch has outputs and inputs first
            layer.kernel.set_value(jnp.asarray(turned))
            layer.bias.set_value(jnp.asarray(arrays[f"base.{name}.bias"]))
        self.text.embedding.set_value(jnp.asarray(arrays["base.text.weight"]))

    def __call__(self, image, ids):
        seen = jnp.tanh(self.image(jnp.moveaxis(image, 1, -1))).mean(axis=1) + self.text(ids)
        return self.out(jnp.tanh(self.line(seen)))


@pytest.mark.parametrize("name", [*cases.long("plain"), "dora"])
def test_convolutions_and_embeddings_equal_pefts(name, tmp_path):
    with np.load(GOLDEN / "golden.npz") as stored:
        arrays = dict(stored)
    inputs = jnp.asarray(arrays["image"]), jnp.asarray(arrays["ids"])
    model = Mixed(arrays)
    config = peft.load(model, GOLDEN / name)
    np.testing.assert_allclose(model(*inputs), arrays[name], atol=1e-5)
    peft.save(tmp_path, model, config, base_model="")
    file = "adapter_model.safetensors"
    assert (tmp_path / file).read_bytes() == (GOLDEN / name / file).read_bytes()
    lora.merge(model)
    np.testing.assert_allclose(model(*inputs), arrays[f"{name}_merged"], atol=1e-5)


# ------------------------------------------------------------------------- parts of an output


def test_parts_of_a_fused_layer_are_adapted_alone(tmp_path):
    """Q and V of four query heads and a shared K and V: K's columns do not change."""
    model = nnx.Dict(qkv=nnx.Linear(8, 12, rngs=nnx.Rngs(0)))
    plain, x = nnx.clone(model), rand(3, 8)
    settings = adapted(model, targets=("qkv",), parts={"qkv": (4, -1, 1)}, use_rslora=True)
    y = model.qkv(x)
    change = np.abs(np.asarray(y - plain.qkv(x))).max(axis=0)
    assert change[:8].min() > 0.05 and change[10:].min() > 0.05 and not change[8:10].any()
    assert lora.num_params(model) == 4 * 8 + 2 * 8 + 2 * 2
    graphdef, trained, rest = nnx.split(model, lora.LoRAParam, ...)
    gradient = jax.grad(lambda p: (nnx.merge(graphdef, p, rest).qkv(x) ** 2).sum())(trained)
    gradient = np.asarray(gradient["qkv"]["lora_B"][...])
    assert gradient[:2, :8].all() and gradient[2:, 10:].all()
    assert not gradient[:2, 8:].any() and not gradient[2:, :10].any()

    peft.save(tmp_path, model, settings, base_model="")  # as plain LoRA of twice the rank
    loaded = nnx.clone(plain)
    config = peft.load(loaded, tmp_path)
    assert config.rank == 4 and not config.parts
    np.testing.assert_allclose(loaded.qkv(x), y, atol=1e-5)
    lora.merge(loaded)
    np.testing.assert_array_equal(loaded.qkv.kernel[:, 8:10], plain.qkv.kernel[:, 8:10])


def test_parts_that_do_not_divide_the_output_are_refused():
    for parts in ((1, -1, 5), (-1, -1)):
        model = nnx.Dict(qkv=nnx.Linear(8, 12, rngs=nnx.Rngs(0)))
        with pytest.raises(errors.UserError, match="parts that divide the 12 outputs"):
            adapted(model, targets=("qkv",), parts={"qkv": parts})


# ------------------------------------------------------------------------- PiSSA


@pytest.mark.parametrize(
    "use_dora, init",
    [(False, "pissa_niter_8"),
     *cases.long((True, "pissa"), (False, "pissa"), (True, "pissa_niter_8"))],
)  # fmt: skip
def test_pissa_moves_the_principal_part_into_a_and_b(init, use_dora, tmp_path):
    model = nnx.Dict(a=nnx.Linear(20, 12, rngs=nnx.Rngs(0)), b=Heads(nnx.Rngs(1)))
    plain, x = nnx.clone(model), rand(2, 3, 6)
    kernel = plain.a.kernel[...]
    settings = lora_config.LoRAConfig(rank=3, targets=("a", "b"), use_dora=use_dora,
                                      init_lora_weights=init)  # fmt: skip
    lora.inject(model, settings, rngs=nnx.Rngs(2))
    scaling = 16 / 3
    U, S, Vt = np.linalg.svd(kernel)
    product = scaling * model.a.lora_A[...] @ model.a.lora_B[...]
    np.testing.assert_allclose(product, U[:, :3] * S[:3] @ Vt[:3], atol=1e-5)
    np.testing.assert_allclose(model.a.kernel[...], kernel - product, atol=1e-5)
    np.testing.assert_allclose(model.b(x), plain.b(x), atol=1e-5)

    back = nnx.clone(model)
    lora.strip(back)
    np.testing.assert_allclose(back.a.kernel[...], kernel, atol=1e-5)
    idle = nnx.clone(model)
    idle.a.lora_B.set_value(idle.a.lora_B[...] + 0.1)
    nnx.update(idle, collect.idle(idle))
    np.testing.assert_allclose(idle.a(rand(4, 20)), plain.a(rand(4, 20)), atol=1e-5)

    for part in (model.a.lora_A, model.a.lora_B, model.b.lora_B):  # trained
        part.set_value(part[...] + 0.1)
    expected = model.b(x), model.a(rand(4, 20))
    peft.save(tmp_path, model, settings, base_model="")
    loaded = nnx.clone(plain)  # onto the base as it was
    config = peft.load(loaded, tmp_path)
    assert config.rank == 6 and config.alpha == 32 and config.init_lora_weights == "default"
    for found, wanted in zip((loaded.b(x), loaded.a(rand(4, 20))), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_pissa_of_parts_takes_each_part_s_own(tmp_path):
    model = nnx.Dict(qkv=nnx.Linear(8, 12, rngs=nnx.Rngs(0)))
    plain, x = nnx.clone(model), rand(3, 8)
    settings = lora_config.LoRAConfig(rank=2, targets=("qkv",), parts={"qkv": (1, -1, 1)},
                                      init_lora_weights="pissa")  # fmt: skip
    lora.inject(model, settings, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model.qkv(x), plain.qkv(x), atol=1e-5)
    np.testing.assert_array_equal(model.qkv.kernel[:, 4:8], plain.qkv.kernel[:, 4:8])
    rest = np.linalg.svd(model.qkv.kernel[:, :4], compute_uv=False)
    whole = np.linalg.svd(plain.qkv.kernel[:, :4], compute_uv=False)
    np.testing.assert_allclose(rest, [*whole[2:], 0, 0], atol=1e-5)


def test_pissa_takes_no_larger_rank_than_a_weight_has():
    model = nnx.Dict(a=nnx.Linear(8, 32, rngs=nnx.Rngs(0)), b=nnx.Linear(32, 6, rngs=nnx.Rngs(0)))
    before = jax.tree.map(np.asarray, nnx.state(model))
    config = lora_config.LoRAConfig(
        rank=8, targets=("a", "b"), init_lora_weights="pissa", parts={"b": (1, -2)},
    )  # fmt: skip
    found = "b with rank 8 of 2 at most"
    with pytest.raises(errors.UserError, match=found):
        lora.inject(model, config, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    with pytest.raises(errors.UserError, match=found):
        lora.Principal(config).take("b", jnp.ones((6, 32)))
    dense, x = nn.Dense(6), jnp.ones((1, 32))
    alone = nn.Sequential([dense])
    params = alone.init(jax.random.key(0), x)["params"]
    config = dataclasses.replace(config, targets="all-linear", parts={})
    adapted = linen.adapt(alone, config, x)
    with pytest.raises(errors.UserError, match="layers_0 with rank 8 of 6 at most"):
        adapted.init(jax.random.key(0), params)


def test_pissa_of_quantized_weights_is_refused():
    model = nnx.Dict(a=nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    dense = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    conversion.quantize_model(model, "int4")
    with pytest.raises(errors.UserError, match=r"(?s)before quantization.*int4"):
        lora.inject(model, lora_config.LoRAConfig(targets=("a",), init_lora_weights="pissa"),
                    rngs=nnx.Rngs(0))  # fmt: skip
    given = {"a": (rand(32, 8), rand(8, 8))}
    lora.inject(model, lora_config.LoRAConfig(targets=("a",), init_lora_weights="pissa"),
                rngs=nnx.Rngs(0), principal=given)  # fmt: skip
    lora.inject(dense_model := nnx.Dict(_0=dense), lora_config.LoRAConfig(
        targets=("_0",), init_lora_weights="pissa"), rngs=nnx.Rngs(0))  # fmt: skip
    model._0 = dense_model._0  # found before the packed one
    before = np.asarray(dense.kernel[...])
    with pytest.raises(errors.UserError, match=r"(?s)take back.*a is in int4"):
        lora.strip(model)
    np.testing.assert_array_equal(dense.kernel[...], before)


# ------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize(
    "fmt, dropout",
    [("int4", 0.5), *cases.long(("none", 0.0), ("none", 0.5), ("int8", 0.0), ("nf4", 0.5))],
)
def test_dora_is_its_equation_in_training_too(fmt, dropout):
    """y = x W + (m/‖W + sAB‖ − 1) · x' W + m/‖W + sAB‖ · s · x' A B, x' = dropout(x); the norm is a
    constant."""
    model = nnx.Dict(a=nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    model.a.bias.set_value(rand(8, seed=9))
    if fmt != "none":
        conversion.quantize_model(model, fmt)
        kernel = conversion.dequantize_linear(model.a).kernel[...]
    else:
        kernel = model.a.kernel[...]
    adapted(model, targets=("a",), use_dora=True, dropout=dropout)
    model.train()
    x, layer = rand(5, 64), model.a
    dropped = x
    if dropout:
        dropped = site.dropped(layer.lora_dropout_key[...], dropout, x)
    assert (dropout > 0) == (np.asarray(dropped) == 0).any()

    def equation(p):
        delta = 8 * p["lora_A"] @ p["lora_B"]
        norm = jax.lax.stop_gradient(jnp.linalg.norm(kernel + delta, axis=0))
        stretch = (p["lora_magnitude_vector"] / norm)[None]
        whole = x @ kernel + layer.bias[...][None]
        return whole + (stretch - 1) * (dropped @ kernel) + stretch * (dropped @ delta)

    graphdef, trained, rest = nnx.split(model, lora.LoRAParam, ...)
    params = nnx.to_pure_dict(trained)
    run = jax.jit(lambda p: nnx.merge(graphdef, p, rest).a(x))
    np.testing.assert_allclose(run(params), equation(params["a"]), atol=2e-4)
    found = jax.grad(lambda p: (run(p) ** 2).sum())(params)["a"]
    wanted = jax.grad(lambda p: (equation(p) ** 2).sum())(params["a"])
    for name, gradient in wanted.items():
        np.testing.assert_allclose(
            found[name], gradient, rtol=2e-3, atol=2e-3 * np.abs(gradient).max()
        )


def test_dora_on_packed_weights_writes_no_dense_one(monkeypatch):
    """Its norm is computed from ‖W‖², a constant, and Aᵀ W, a product with the packed words."""
    model, calls = nnx.Dict(a=nnx.Linear(256, 64, use_bias=False, rngs=nnx.Rngs(0))), []
    conversion.quantize_model(model, "int4")
    adapted(model, targets=("a",), use_dora=True)
    multiply = int4_matmul.int4_matmul
    monkeypatch.setattr(
        int4_matmul,
        "int4_matmul",
        lambda x, *args, **how: calls.append(x.shape) or multiply(x, *args, **how),
    )
    monkeypatch.setattr(formats, "dequantize", None)
    model.a(rand(3, 256))
    assert calls == [(3, 256), (2, 256)]


class Towers(nnx.Module):
    """Modules to save with a list of layers, a list of arrays, and a dictionary."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.body = nnx.Linear(4, 4, rngs=rngs)
        first, last = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.head = nnx.Sequential(first, nnx.relu, last)
        self.gains = Gains()
        self.maps = nnx.Dict(one=nnx.Linear(4, 4, rngs=rngs))

    def __call__(self, x):
        return self.head(self.gains(self.maps.one(self.body(x))))


class Gains(nnx.Module):
    def __init__(self):
        self.each = nnx.List([nnx.Param(jnp.ones(4)), nnx.Param(2 * jnp.ones(4))])

    def __call__(self, x):
        return x * (self.each[0][...] * self.each[1][...])[None]


TOWERS = lora.LoRAConfig(rank=2, targets=("body",), modules_to_save=("head", "gains", "maps.one"))


def test_saved_modules_may_contain_lists(tmp_path):
    model, x = Towers(), jnp.arange(12.0).reshape(3, 4) / 12
    before = model(x)
    lora.inject(model, TOWERS, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(x), before, atol=1e-6)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, lora.LoRAParam):
            node.set_value(node[...] + 0.25)
    changed = model(x)
    peft.save(tmp_path, model, TOWERS)
    saved = peft.read(tmp_path).saved
    shapes = {f"head.layers.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert saved.keys() == {*shapes, "gains.each.0", "gains.each.1", "maps.one.weight",
                            "maps.one.bias"}  # fmt: skip
    np.testing.assert_array_equal(saved["gains.each.1"], 2.25 * np.ones(4))
    again = Towers()
    peft.load(again, tmp_path)
    np.testing.assert_allclose(again(x), changed, atol=1e-6)
    lora.merge(again)
    np.testing.assert_allclose(again(x), changed, rtol=1e-6)
    assert nnx.graphdef(again) == nnx.graphdef(Towers())


@pytest.mark.parametrize("fails", ["_adapt", "begin"])
def test_an_error_while_adapters_are_put_in_takes_them_out(fails, monkeypatch, tmp_path):
    model, before = Towers(), nnx.graphdef(Towers())
    lora.inject(model, TOWERS, rngs=nnx.Rngs(1))
    peft.save(tmp_path, model, TOWERS)
    lora.strip(model)
    found, function = (inject, inject._adapt) if fails == "_adapt" else (
        nnx_saved.Saved, nnx_saved.Saved.begin)  # fmt: skip

    def failing(*args, **settings):
        function(*args, **settings)
        raise MemoryError

    monkeypatch.setattr(found, fails, failing)
    with pytest.raises(MemoryError):
        lora.inject(model, TOWERS, rngs=nnx.Rngs(1))
    assert nnx.graphdef(model) == before
    with pytest.raises(MemoryError):
        peft.load(model, tmp_path, untrained=True)
    assert nnx.graphdef(model) == before
