"""Adapters in unedited Linen models, under scan, remat and vmap; files; quantized bases."""

import dataclasses
import functools

import cases
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from lora_jax import errors, lora
from lora_jax.lora import adapter as host
from lora_jax.lora import config as lora_config
from lora_jax.lora import linen, peft
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config


class Block(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x, _=None):
        heads = nn.DenseGeneral((2, 4), name="query")(nn.LayerNorm(name="norm")(x))
        x = x + nn.DenseGeneral(self.width, axis=(-2, -1), name="out")(jnp.tanh(heads))
        x = x + nn.Dense(self.width, name="up")(x)
        return x + nn.Einsum((self.width, 8), "...d,df->...f", name="mix")(x), None


class Net(nn.Module):
    """Embedding, a scanned stack of rematerialized blocks, another stack by vmap, a head."""

    axis: int = 0

    @nn.compact
    def __call__(self, ids, train=False):
        assert isinstance(train, bool)
        x = nn.Embed(11, 8, name="embed")(ids)
        x = nn.Conv(8, (3,), padding="SAME", name="conv")(x)
        scanned = nn.scan(
            nn.remat(Block), variable_axes={"params": self.axis}, split_rngs={"params": True},
            length=3,
        )  # fmt: skip
        x, _ = scanned(name="layers")(x, None)
        several = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
            out_axes=0, axis_size=2,
        )  # fmt: skip
        x = x + several(8, name="experts")(x).sum(axis=0)
        return nn.Dense(5, name="lm_head")(x)


IDS = jnp.arange(12).reshape(2, 6) % 11
TARGETS = ("embed", "conv", "query", "out", "up", "mix", "experts", "lm_head")
NAMES = {"embed", "conv", "lm_head", "experts.0", "experts.1"} | {
    f"layers.{i}.{name}" for i in range(3) for name in ("query", "out", "up", "mix")
}


@functools.cache
def made(axis=0):
    module = Net(axis=axis)
    return module, drawn.variables(module, IDS)["params"]


@functools.cache
def _plain(axis):
    return jax.jit(Net(axis=axis).apply)


def output(params, axis=0):
    """The model's output without adapters."""
    return np.asarray(_plain(axis)({"params": params}, IDS))


def config(**settings):
    return lora_config.LoRAConfig(**{"rank": 2, "targets": TARGETS, **settings})


def moved(variables, scale=0.1, seed=3):
    """The variables with `lora` changed."""
    rng = np.random.default_rng(seed)
    change = jax.tree.map(
        lambda p: jnp.asarray(np.asarray(p) + np.float32(scale * rng.normal(size=p.shape))),
        variables["lora"],
    )
    return {**variables, "lora": change}


BIAS = {"lora_bias": True, "targets": TARGETS[1:-1]}


@pytest.mark.parametrize(
    "axis, how", [(1, {"use_dora": True}), *cases.long((0, {}), (0, BIAS), (1, BIAS))]
)
def test_an_unedited_model_is_adapted_merged_saved_and_loaded(axis, how, tmp_path):
    module, params = made(axis)
    settings = config(**how)
    adapted = linen.adapt(module, settings, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype), train=False)
    variables = adapted.init(jax.random.key(1), params)
    assert variables["lora"]["layers"]["query"]["lora_A"].shape == (3, 8, 2)
    base = output(params, axis)
    run = jax.jit(adapted.apply)
    np.testing.assert_allclose(run(variables, IDS), base, atol=2e-5)

    variables = moved(variables)
    expected = run(variables, IDS)
    assert np.abs(expected - base).max() > 0.5
    adapter = adapted.collect(variables, base_model="net")
    assert set(adapter.factors) == NAMES - {*TARGETS} | ({*settings.targets} & NAMES)
    peft.write(tmp_path, adapter)
    read = peft.read(tmp_path)
    assert read.config == dataclasses.replace(settings, targets=tuple(sorted(settings.targets)))
    again = linen.adapt(module, read.config, IDS).attach(params, read)
    np.testing.assert_allclose(run(again, IDS), expected, atol=1e-5)
    merged = adapted.merge(variables)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(output(merged, axis), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_of_a_stack_may_have_another_rank_or_none():
    module, params = made()
    settings = config(targets=("query", "up"), layers=(0, 2), rank_pattern={r"2\.query": 3})
    adapted = linen.adapt(module, settings, IDS)
    variables = adapted.init(jax.random.key(1), params)
    assert variables["lora"]["layers"]["query"]["lora_A"].shape == (3, 8, 3)
    factors = adapted.collect(variables).factors
    assert {name: own.A.shape[1] for name, own in factors.items()} == {
        "layers.0.query": 2, "layers.2.query": 3, "layers.0.up": 2, "layers.2.up": 2
    }  # fmt: skip


@pytest.mark.long
def test_training_changes_a_and_b_alone():
    module, params = made()
    adapted = linen.adapt(module, config(dropout=0.2), IDS)
    variables = adapted.init(jax.random.key(1), params)
    optimizer = adamw.make(optim_config.OptimConfig(lr=1e-2, warmup=0), 20)
    labels = set(jax.tree.leaves(adamw.labels(variables)))
    assert labels == {"A", "B", "frozen"}
    targets = jax.nn.one_hot(IDS % 5, 5)

    @jax.jit
    def step(variables, state, key):
        def loss(variables):
            logits = adapted.apply(variables, IDS, rngs={"lora": key})
            return optax.softmax_cross_entropy(logits, targets).mean()

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state, value

    state, start, losses = optimizer.init(variables), variables, []
    for number in range(20):
        variables, state, value = step(variables, state, jax.random.key(number))
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    for before, after in zip(jax.tree.leaves(start["params"]), jax.tree.leaves(variables["params"]),
                             strict=True):  # fmt: skip
        np.testing.assert_array_equal(before, after)


def test_dropout_differs_between_keys_and_layers_and_is_off_without_one():
    module, params = made()
    adapted = linen.adapt(module, config(dropout=0.5), IDS)
    variables = moved(adapted.init(jax.random.key(1), params))
    run = jax.jit(lambda rngs: adapted.apply(variables, IDS, rngs=rngs))
    one, same, other = (run({"lora": jax.random.key(n)}) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    plain = jax.jit(linen.adapt(module, config(), IDS).apply)(variables, IDS)
    np.testing.assert_allclose(jax.jit(adapted.apply)(variables, IDS), plain, atol=1e-5)


@pytest.mark.parametrize("fmt, use_dora", [("int4", True), *cases.long(("nf4-dq", False))])
def test_a_quantized_base_computes_with_the_dequantized_weights(fmt, use_dora):
    module, params = made()
    adapted = linen.adapt(module, config(use_dora=use_dora), IDS, quant=fmt, exclude=("lm_head",))
    variables = moved(adapted.init(jax.random.key(1), params))
    layers, packed = (variables[name]["layers"]["query"] for name in ("params", "quantized"))
    assert "kernel" not in layers and packed["kernel"]["q"].shape[0] == 3
    assert "kernel" in variables["params"]["lm_head"] and "kernel" in variables["params"]["conv"]
    y = jax.jit(adapted.apply)(variables, IDS)
    dense = adapted.merge(variables)
    np.testing.assert_allclose(output(dense), y, rtol=1e-3, atol=1e-3)
    alone = linen.adapt(module, None, IDS, quant=fmt)
    rounded = alone.init(jax.random.key(0), params)
    assert not rounded["lora"]
    plain = output(alone.merge(rounded))
    np.testing.assert_allclose(jax.jit(alone.apply)(rounded, IDS), plain, atol=2e-4)


def test_pissa_and_parts_are_those_of_nnx():
    module, params = made()
    settings = config(targets=("up",), init_lora_weights="pissa", parts={"up": (1, -1)})
    adapted = linen.adapt(module, settings, IDS)
    variables = adapted.init(jax.random.key(1), params)
    run = jax.jit(adapted.apply)
    np.testing.assert_allclose(run(variables, IDS), output(params), atol=1e-4)
    kernel, before = (p["layers"]["up"]["kernel"] for p in (variables["params"], params))
    np.testing.assert_array_equal(kernel[..., 4:], before[..., 4:])
    assert np.abs(kernel[..., :4] - before[..., :4]).max() > 0.1
    variables = moved(variables)
    expected = run(variables, IDS)
    adapter = adapted.collect(variables)
    assert adapter.config.rank == 4 and not adapter.config.parts
    plain = linen.adapt(module, adapter.config, IDS)
    found = jax.jit(plain.apply)(plain.attach(params, adapter), IDS)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_unconverted_adapter_takes_its_start_from_the_base_again():
    """As PEFT saves PiSSA and OLoRA without a conversion."""
    module, x = nn.Sequential([nn.Dense(6)]), jnp.ones((2, 4))
    params = drawn.variables(module, x)["params"]
    adapted = linen.adapt(module, config(targets=("layers_0",), init_lora_weights="olora"), x)
    variables = moved(adapted.init(jax.random.key(1), params))
    own = variables["lora"]["layers_0"]
    raw = host.Factors(np.asarray(own["lora_A"]), np.asarray(own["lora_B"]))
    again = adapted.attach(params, host.Adapter(adapted.config, {"layers_0": raw}))
    y = adapted.apply(variables, x)
    np.testing.assert_allclose(adapted.apply(again, x), y, atol=1e-5)
    plain = adapted.collect(again)
    assert plain.config.init_lora_weights == "default" and plain.config.rank == 4
    merged = module.apply({"params": adapted.merge(again)}, x)
    np.testing.assert_allclose(merged, y, atol=1e-5)


def test_fully_trained_modules_are_trained_with_the_adapters(tmp_path):
    module, params = made()
    settings = config(targets=("query",), modules_to_save=("lm_head", "norm", "conv"))
    adapted = linen.adapt(module, settings, IDS)
    variables = moved(adapted.init(jax.random.key(1), params))
    run = jax.jit(adapted.apply)
    expected = run(variables, IDS)
    adapter = adapted.collect(variables)
    shapes = {name: array.shape for name, array in adapter.saved.items()}
    assert shapes["lm_head.weight"] == (5, 8) and shapes["conv.weight"] == (8, 8, 3)
    assert shapes["layers.2.norm.weight"] == shapes["layers.0.norm.bias"] == (8,)
    peft.write(tmp_path, adapter)
    again = adapted.attach(params, peft.read(tmp_path))
    np.testing.assert_allclose(run(again, IDS), expected, atol=1e-5)
    np.testing.assert_allclose(output(adapted.merge(variables)), expected, rtol=1e-4, atol=1e-4)


class Twin(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(
            jnp.tanh(nn.DenseGeneral((2, 4), name="up")(x)).reshape(-1, 8)
        )


@pytest.mark.parametrize("how", [{"use_dora": True}, *cases.long({"lora_bias": True})], ids=str)
def test_an_adapter_moves_between_nnx_and_linen(how, tmp_path):
    """The same file, the same change of the same weights."""
    rng, x = (
        np.random.default_rng(0),
        jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32),
    )
    kernels = {"up": (6, 2, 4), "down": (8, 3)}
    params = {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
                     "bias": jnp.zeros(shape[1:])} for name, shape in kernels.items()}  # fmt: skip
    module = Twin()
    adapted = linen.adapt(module, config(targets=("up", "down"), **how), x)
    variables = moved(adapted.init(jax.random.key(0), params))
    peft.write(tmp_path, adapted.collect(variables))

    model = nnx.Dict(up=nnx.LinearGeneral(6, (2, 4), rngs=nnx.Rngs(0)),
                     down=nnx.Linear(8, 3, rngs=nnx.Rngs(0)))  # fmt: skip
    for name in kernels:
        getattr(model, name).kernel.set_value(params[name]["kernel"])
    peft.load(model, tmp_path)
    call = nnx.jit(lambda model: model.down(jnp.tanh(model.up(x)).reshape(-1, 8)))
    y = call(model)
    np.testing.assert_allclose(y, jax.jit(adapted.apply)(variables, x), atol=1e-5)
    back = lora.collect(model, peft.config(tmp_path))
    for name, own in adapted.collect(variables).factors.items():
        for ours, theirs in zip(own, back.factors[name], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    lora.merge(model)
    merged = adapted.merge(variables)
    np.testing.assert_allclose(call(model), y, atol=1e-5)
    np.testing.assert_allclose(module.apply({"params": merged}, x), y, atol=1e-5)
    for bias in (merged["up"]["bias"], model.up.bias[...]):
        assert bool(bias.any()) == ("lora_bias" in how)


class Jitted(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(x)


def test_a_module_that_jits_itself_is_traced_again():
    """Otherwise Flax would use what it traced without adapters, or with others."""
    module, x = Jitted(), jnp.ones((2, 4))
    params = drawn.variables(module, x)["params"]
    for dropout in (0.0, 0.9):
        adapted = linen.adapt(module, config(targets=("out",), dropout=dropout), x)
        variables = moved(adapted.init(jax.random.key(1), params))
        y = adapted.apply(variables, x)
        np.testing.assert_allclose(y, x @ adapted.merge(variables)["out"]["kernel"], atol=1e-5)
        assert np.abs(y - module.apply({"params": params}, x)).max() > 0.01
        dropped = adapted.apply(variables, x, rngs={"lora": jax.random.key(0)})
        assert np.array_equal(dropped, y) == (dropout == 0)
    other = linen.adapt(module, config(targets=("out",), dropout=0.1), x)
    less = other.apply(variables, x, rngs={"lora": jax.random.key(0)})
    assert not np.array_equal(less, dropped)


class Projection(nn.Module):
    """Like Gemma's: the einsum is an argument of the call, before x."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn, x):
        return jnp.einsum(eqn, x, self.param("w", nn.initializers.normal(), self.shape))


linen.register(Projection, lambda layer, eqn, x: eqn, weight="w", input=1)


class Projections(nn.Module):
    twice: bool = False

    @nn.compact
    def __call__(self, x):
        kv = Projection((2, 3, 6, 4), name="kv")
        y = kv("bsd,ckdh->cbskh", x)
        return (y, kv("bsd,ckdh->bsckh", x)) if self.twice else y


def test_a_registered_class_names_its_einsum():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)
    module = Projections()
    params = drawn.variables(module, x)["params"]
    settings = config(targets=("kv",), parts={"kv": (-1, 1)}, use_dora=True)  # v alone
    adapted = linen.adapt(module, settings, x)
    variables = moved(adapted.init(jax.random.key(1), params))
    plain = jax.jit(module.apply)
    y, base = jax.jit(adapted.apply)(variables, x), plain({"params": params}, x)
    assert np.abs(np.asarray(y) - base)[1].max() > 0.1
    np.testing.assert_allclose(plain({"params": adapted.merge(variables)}, x), y, atol=1e-4)


def test_a_layer_that_is_called_in_two_ways_is_adapted_through_its_weight():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)
    module = Projections(twice=True)
    params = drawn.variables(module, x)["params"]
    adapted = linen.adapt(module, config(targets=("kv",)), x)
    variables = moved(adapted.init(jax.random.key(1), params))
    for y, merged in zip(
        jax.jit(adapted.apply)(variables, x),
        jax.jit(module.apply)({"params": adapted.merge(variables)}, x),
        strict=True,
    ):
        np.testing.assert_allclose(y, merged, atol=1e-5)


class Shared(nn.Module):
    """Like Gemma's feed-forward: the weight of its layer is among its own parameters."""

    @nn.compact
    def __call__(self, x):
        layer = Misplaced(name="inner")
        nn.share_scope(self, layer)
        return layer(x)


class Misplaced(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("other", nn.initializers.normal(), (4, 4)) ** 2


linen.register(Misplaced, "...i,io->...o", weight="w")


class Awkward(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="a")(nn.RMSNorm(name="norm")(x))
        x = nn.Conv(4, (3,), feature_group_count=2, name="groups")(x)
        x = nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4)), name="mask")(x)
        return Shared(name="shared")(x)


def test_what_cannot_be_adapted_is_never_skipped_silently():
    module, x = Awkward(), jnp.ones((1, 5, 4))
    linen.adapt(module, config(targets="all-linear", exclude=("shared",)), x)
    weight = "holds a Misplaced without its registered parameter 'w'; its weights are shared.other"
    for targets, found in (
        ("a|norm", "norm is of class RMSNorm, which is not registered"),
        (("a", "shared"), f"shared {weight}"),
    ):
        with pytest.raises(errors.UserError) as raised:
            linen.adapt(module, config(targets=targets), x)
        assert raised.value.found == found
    adapted = linen.adapt(module, config(targets="all-linear"), x, quant="int8")
    left = "a parameter of Misplaced, whose call is no product with it alone"
    assert adapted.left["shared.other"] == (
        f"not adapted: {left}; name it in the targets; not quantized: {left}"
    )
    assert set(adapted.layer_configs) == adapted.packs == {("a",)}


def test_lora_dense_is_a_dense_layer_with_an_adapter():
    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = linen.LoRADense(6, rank=2, alpha=4, dropout=0.5, name="first")(x, train=train)
            return linen.LoRADense(3, rank=2, name="second")(jnp.tanh(x))

    x = np.ones((2, 4), np.float32)
    variables = jax.jit(Mine().init, static_argnums=2)(jax.random.key(0), x, False)
    assert set(variables) == {"params", "lora"}
    variables = jax.tree.map(np.asarray, moved(variables))
    run = jax.jit(Mine().apply, static_argnums=2)
    y = run(variables, x, False)
    first = {**variables["lora"]["first"], **variables["params"]["first"]["base"]}
    hidden = x @ first["kernel"] + 2 * x @ first["lora_A"] @ first["lora_B"]
    second = {**variables["lora"]["second"], **variables["params"]["second"]["base"]}
    expected = np.tanh(hidden) @ (second["kernel"] + 8 * second["lora_A"] @ second["lora_B"])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    dropped = run(variables, x, True, rngs={"dropout": jax.random.key(1)})
    assert np.abs(dropped - y).max() > 0.01


@pytest.mark.parametrize(
    ("of_file", "here", "found"),
    [
        (dict(alpha=5), {}, "layers_0 is scaled by 2.5, in this model by 8"),
        (dict(use_dora=True), {}, "use_dora = True"),
        ({}, dict(lora_bias=True), "lora_bias = False"),
        ({}, dict(use_dora=True), "use_dora = False"),
        (dict(rank=4, alpha=32), dict(parts={"layers_0": (1, -1, 1)}),
         "layers_0 has B outside the adapted parts"),
    ],
)  # fmt: skip
def test_an_adapter_with_other_settings_is_refused(of_file, here, found):
    """Its arrays fit, but would compute something else in this model."""
    module, x = nn.Sequential([nn.Dense(6)]), jnp.ones((2, 4))
    params = drawn.variables(module, x)["params"]
    other = linen.adapt(module, config(targets=("layers_0",), **of_file), x)
    adapter = other.collect(moved(other.init(jax.random.key(1), params)))
    adapted = linen.adapt(module, config(targets=("layers_0",), **here), x)
    with pytest.raises(errors.UserError) as raised:
        adapted.attach(params, adapter)
    assert raised.value.found == found
    theirs = dataclasses.replace(adapter.config, targets=("layers_0", "c_attn"))
    with pytest.raises(errors.UserError, match="'c_attn' matches nothing"):
        linen.adapt(module, theirs, x)
    again = linen.adapt(module, theirs, x, strict=False)
    np.testing.assert_allclose(
        again.apply(again.attach(params, adapter), x),
        x @ other.merge(other.attach(params, adapter))["layers_0"]["kernel"],
        atol=1e-5,
    )


def test_everything_that_does_not_fit_is_reported():
    module, params = made()
    with pytest.raises(errors.UserError, match=r"(?s)'q_proj' matches nothing.*query"):
        linen.adapt(module, config(targets=("q_proj",)), IDS)
    with pytest.raises(errors.UserError, match="scale matches nothing"):
        linen.adapt(module, config(modules_to_save=("scale",)), IDS)
    adapted = linen.adapt(module, config(targets=("query", "up")), IDS)
    adapter = linen.adapt(module, config(targets=("query", "mix")), IDS)
    adapter = adapter.collect(moved(adapter.init(jax.random.key(0), params)))
    with pytest.raises(errors.UserError) as raised:
        adapted.attach(params, adapter)
    assert "layers.1.up.lora_A is missing" in str(raised.value)
    lacking = {**params, "embed": {}, "lm_head": {"kernel": jnp.ones((8, 6))}}
    for attempt in (lambda p: adapted.init(jax.random.key(0), p),
                    lambda p: adapted.attach(p, adapter)):  # fmt: skip
        with pytest.raises(errors.UserError) as misfit:
            attempt(lacking)
        assert misfit.value.found.split("\n            ") == [
            "embed.embedding is missing", "lm_head.kernel has shape (8, 6), expected (8, 5)",
        ]  # fmt: skip
    with pytest.raises(errors.UserError, match="linear layers to quantize to int8"):
        linen.adapt(nn.Embed(3, 4), None, IDS, quant="int8")
    base = linen.adapt(module, None, IDS, quant="int8")
    for attempt in (
        lambda: adapted.collect({"params": params}),
        lambda: adapted.merge({"params": params}),
        lambda: base.collect(base.init(jax.random.key(0), params)),
    ):
        with pytest.raises(errors.UserError, match="variables with adapters"):
            attempt()
    with pytest.raises(errors.UserError, match=r"query\.kernel is missing"):
        base.apply({"params": base.init(jax.random.key(0), params)["params"]}, IDS)
    with pytest.raises(errors.UserError, match="a format among int8"):
        linen.adapt(module, None, IDS, quant="int5")
    assert "layers.1.mix.lora_A has no target" in str(raised.value)
