"""Adapters: their algebra, which layers get one, and their dropout."""

import functools
import pathlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import errors, lora
from lora_jax.checkpoints import loader
from lora_jax.layers import weight
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets as selection
from lora_jax.lora.nnx import adapted as found_adapted
from lora_jax.lora.nnx import sites
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import conversion

LLAMA = pathlib.Path(__file__).parents[1] / "golden" / "models" / "llama"
EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMATS = ("none", "int8", "int4", "nf4")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 10, rngs=rngs)
        self.down = nnx.Linear(10, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Net(nnx.Module):
    """Not a LLaMA: a plain linear layer, a list of blocks, and three blocks stacked by vmap."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return Block(rngs)

        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.stack = stacked(rngs)
        self.lm_head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        graphdef, state = nnx.split(self.stack)
        x, _ = jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)
        return self.lm_head(x)


class Masks(nnx.Module):
    """With the weights that `masks` sets, every layer returns its dropout mask."""

    def __init__(self, width, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return nnx.Linear(width, width, rngs=rngs)

        self.one = nnx.Linear(width, width, rngs=rngs)
        self.two = nnx.Linear(width, width, rngs=rngs)
        self.stack = stacked(rngs)

    def __call__(self, x):
        graphdef, state = nnx.split(self.stack)
        _, ys = jax.lax.scan(lambda c, s: (c, nnx.merge(graphdef, s)(x)), None, state)
        return jnp.stack([self.one(x), self.two(x), *ys])


NET_NAMES = (
    *("first", "lm_head"),
    *(f"{part}.{i}.{name}" for part, n in (("blocks", 2), ("stack", 3)) for i in range(n)
      for name in ("up", "down")),
)  # fmt: skip


def net(fmt="none"):
    """A fresh Net with every linear layer except lm_head quantized to fmt."""
    return nnx.merge(*split_net(fmt), copy=True)


@functools.cache
def split_net(fmt):
    model = Net(nnx.Rngs(0))
    if fmt != "none":
        model.first = conversion.quantize_linear(model.first, fmt)
        for block in (*model.blocks, model.stack):
            block.up = conversion.quantize_linear(block.up, fmt)
            block.down = conversion.quantize_linear(block.down, fmt)
    return nnx.split(model)


def trained(model, config, scale=0.1):
    """model with adapters whose B is not zero, within each layer's own rank."""
    lora.inject(model, config, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    for site in sites.find(model):
        if isinstance(site.module, lora.LoRALayer):
            B = rng.normal(0, scale, site.module.lora_B.shape).astype(np.float32)
            for index, rank in enumerate(site.module.lora_ranks):
                (B[index] if site.lead else B)[rank:] = 0
            site.module.lora_B.set_value(jnp.asarray(B))
    return model


def base_of(layer):
    """What the layer computes without its adapter."""

    def call(*args):
        with weight.as_stored(layer):
            return super(lora.LoRALayer, layer).__call__(*args)

    return call


@functools.partial(jax.jit, static_argnums=0)
def _output(graphdef, state, x):
    return nnx.merge(graphdef, state)(x)


def run(model, x):
    return np.asarray(_output(*nnx.split(model), x))


def inputs(*shape, seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def config(targets, **settings):
    return lora_config.LoRAConfig(targets=targets, **settings)


@pytest.fixture(scope="module")
def llama():
    """(graphdef, state) of a three-layer LLaMA, on one device; merge for a fresh model."""
    one = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    return nnx.split(loader.load(LLAMA, dtype="float32", mesh=one))


@pytest.mark.parametrize("fmt", ["int4", *cases.long("none", "int8", "nf4")])
def test_fresh_adapters_change_nothing(fmt):
    model, x = net(fmt), inputs(2, 3, 5)
    before = run(model, x)
    lora.inject(model, config("all-linear"), rngs=nnx.Rngs(0))
    # Not bit for bit: XLA fuses scales and sums differently around an added zero.
    np.testing.assert_allclose(run(model, x), before, atol=2e-5, rtol=0)
    site = nnx.Dict(first=net(fmt).first)
    lora.inject(site, config(("first",)), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(site.first(x), base_of(site.first)(x))


def test_fresh_adapters_change_nothing_in_a_llama(llama):
    ids = jnp.arange(10)[None]
    model = nnx.merge(*llama, copy=True)
    before = run(model, ids)
    ranks = lora.inject(model, config(EVERYTHING), rngs=nnx.Rngs(0))
    assert len(ranks) == 3 * 7
    np.testing.assert_allclose(run(model, ids), before, atol=2e-5, rtol=0)


def test_initial_values_are_pefts():
    """A ~ U(−1/√d_in, 1/√d_in), each layer of a stack its own; B = 0."""
    model = nnx.Dict(wide=nnx.Linear(400, 3, rngs=nnx.Rngs(0)))
    lora.inject(model, config(("wide",), rank=50), rngs=nnx.Rngs(0))
    A, B = np.asarray(model.wide.lora_A), np.asarray(model.wide.lora_B)
    assert A.shape == (400, 50) and B.shape == (50, 3)
    assert 0.99 / 20 < np.abs(A).max() <= 1 / 20
    assert abs(A.std() * 20 - 1 / np.sqrt(3)) < 0.01 and abs(A.mean()) < 1e-3
    assert not B.any()

    stacked = net()
    lora.inject(stacked, config(("up",)), rngs=nnx.Rngs(0))
    A = np.asarray(stacked.stack.up.lora_A)
    assert A.shape == (3, 6, 8) and len({layer.tobytes() for layer in A}) == 3
    assert not np.array_equal(A[0], stacked.blocks[0].up.lora_A[...])


def test_adapters_of_a_bfloat16_model_are_float32():
    model = nnx.Dict(
        q=nnx.Linear(8, 8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    trained(model, config(("q",)))
    assert model.q.lora_A.dtype == model.q.lora_B.dtype == jnp.float32
    assert model.q(jnp.ones((2, 8), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("fmt", ["int4", *cases.long("none", "int8", "nf4")])
def test_merged_weights_compute_what_the_adapters_did(fmt):
    x = inputs(2, 3, 5)
    base = run(net(fmt), x)
    settings = config("all-linear", rank=4, rank_pattern={r"stack\.1\.up": 2, "first": 3})
    model = trained(net(fmt), settings)
    adapted = run(model, x)
    assert np.abs(adapted - base).max() > 0.3
    lora.merge(model)
    assert not found_adapted.by_name(model)
    assert all(isinstance(site.module, nnx.Linear) for site in sites.find(model))
    np.testing.assert_allclose(run(model, x), adapted, atol=2e-5, rtol=0)


def test_merging_makes_a_plain_model_again():
    """Of quantized layers without an adapter, too."""
    model, plain = trained(net("int8"), config(("down",))), net("none")
    lora.merge(model)
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(plain))


@pytest.mark.parametrize("rslora", [False, True])
def test_delta_is_scaling_times_x_a_b(rslora):
    """Unequal ranks and alphas in one stack; a layer without an adapter does not change."""
    settings = config(
        ("up",),
        rank=4,
        alpha=6,
        layers=(0, 2),
        rank_pattern={r"stack\.2\.up": 2},
        alpha_pattern={r"2\.up": 10, "up": 3},
        use_rslora=rslora,
    )
    model = net()
    ranks = lora.inject(model, settings, rngs=nnx.Rngs(1))
    assert ranks == {"blocks.0.up": 4, "stack.0.up": 4, "stack.2.up": 2}
    trained_B = inputs(3, 4, 10) * jnp.array([4, 0, 2])[:, None, None]
    trained_B = trained_B.at[2, 2:].set(0)
    model.stack.up.lora_B.set_value(trained_B)
    A = np.asarray(model.stack.up.lora_A)
    x = inputs(5, 6)
    graphdef, state = nnx.split(model.stack.up)
    found = jax.vmap(lambda s: nnx.merge(graphdef, s)(x), out_axes=0)(state)
    base = jax.vmap(lambda s: base_of(nnx.merge(graphdef, s))(x))(state)
    # `stack\.0` does not end the path, so it sets nothing.
    expected = [
        (alpha / (np.sqrt(rank) if rslora else rank))
        * np.asarray(x)
        @ A[layer][:, :rank]
        @ np.asarray(trained_B)[layer][:rank]
        if rank
        else np.zeros((5, 10))
        for layer, (alpha, rank) in enumerate([(3, 4), (0, 0), (10, 2)])
    ]
    np.testing.assert_allclose(np.asarray(found - base), np.stack(expected), atol=1e-4, rtol=1e-5)


def test_unequal_ranks_are_zero_outside_and_so_are_their_gradients():
    settings = config(
        ("up", "down"), rank=3, layers=(0, 2), rank_pattern={r"2\.up": 5, r"0\.down": 1}
    )
    model = net()
    ranks = lora.inject(model, settings, rngs=nnx.Rngs(1))
    assert ranks == {
        **{"blocks.0.up": 3, "blocks.0.down": 1, "stack.0.up": 3, "stack.0.down": 1},
        **{"stack.2.up": 5, "stack.2.down": 3},
    }
    assert lora.num_params(model) == 16 * sum(ranks.values())
    assert model.stack.up.lora_ranks == (3, 0, 5) and model.stack.down.lora_ranks == (1, 0, 3)
    assert set(found_adapted.by_name(model)) == set(ranks)
    graphdef, params, rest = nnx.split(model, lora.LoRAParam, ...)
    x = inputs(7, 5)

    @jax.jit
    def descend(params):
        gradient = jax.grad(lambda p: (nnx.merge(graphdef, p, rest)(x) ** 2).mean())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), gradient

    params, _ = descend(params)  # from here B is not zero, and A has a gradient too
    params, gradient = descend(params)
    for tree in (params, gradient):
        for name, most in (("up", 5), ("down", 3)):
            part = tree["stack"][name]
            A, B = np.asarray(part["lora_A"][...]), np.asarray(part["lora_B"][...])
            assert A.shape[-1] == B.shape[1] == most
            for layer, rank in enumerate(getattr(model.stack, name).lora_ranks):
                assert not A[layer, :, rank:].any() and not B[layer, rank:].any()
                assert rank == 0 or np.abs(A[layer, :, :rank]).min() > 0
                assert rank == 0 or np.abs(B[layer, :rank]).min() > 0


def test_collection_lora_holds_the_adapters_and_nothing_else(llama):
    assert nnx.variablelib.variable_type_from_name("lora") is lora.LoRAParam
    model = nnx.merge(*llama, copy=True)
    lora.inject(model, config(("q_proj", "up_proj"), rank=4, dropout=0.1), rngs=nnx.Rngs(0))
    flat = dict(nnx.to_flat_state(nnx.state(model, lora.LoRAParam)))
    assert set(flat) == {
        ("model", "layers", block, name, part)
        for block, name in (("self_attn", "q_proj"), ("mlp", "up_proj"))
        for part in ("lora_A", "lora_B")
    }
    assert sum(variable.size for variable in flat.values()) == lora.num_params(model)


@pytest.mark.parametrize(
    ("path", "targets", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", ("q_proj",), True),
        ("q_proj", ("q_proj",), True),
        ("model.layers.0.self_attn.my_q_proj", ("q_proj",), False),
        ("model.layers.0.self_attn.q_proj", ("self_attn.q_proj", "x"), True),
        ("model.layers.0.self_attn.q_proj", ("self_attn",), False),
        ("model.layers.0.self_attn.q_proj", (r".*q_proj",), False),  # a list holds names
        ("model.layers.0.self_attn.q_proj", r".*\.[qk]_proj", True),
        ("model.layers.0.self_attn.q_proj", "q_proj", False),  # full match
        ("model.layers.0.self_attn.q_proj", r"model\.layers\.0\.self_attn", False),
        ("model.layers.0.mlp.up_proj", "all-linear", True),
        ("lm_head", "all-linear", False),
        ("lm_head", ("lm_head",), True),
        ("q_proj", (), False),
    ],
)
def test_matches_is_pefts(path, targets, expected):
    assert selection.matches(path, targets) is expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(targets="all-linear"), [n for n in NET_NAMES if n != "lm_head"]),
        (dict(targets=("first", "lm_head")), ["first", "lm_head"]),
        (dict(targets=r"stack\.[02]\.up"), ["stack.0.up", "stack.2.up"]),
        (dict(targets=("blocks.1.up", "stack.1.down")), ["blocks.1.up", "stack.1.down"]),
        (
            dict(targets=["up", "first"], exclude=["blocks.1.up", "stack.1.up"]),
            ["blocks.0.up", "first", "stack.0.up", "stack.2.up"],
        ),
        (
            dict(targets="all-linear", exclude=r"(stack|blocks)\..*"),
            ["first"],
        ),
        (dict(targets=("down",), layers=[2]), ["stack.2.down"]),
        (
            dict(targets="all-linear", layers=(1,), exclude=("up",)),
            ["blocks.1.down", "stack.1.down"],
        ),
    ],
)
def test_inject_takes_the_targeted_layers(settings, expected):
    model = net()
    ranks = lora.inject(model, lora_config.LoRAConfig(**settings), rngs=nnx.Rngs(0))
    assert sorted(ranks) == sorted(expected)
    assert sorted(found_adapted.by_name(model)) == sorted(expected)


def test_find_names_every_linear_layer():
    assert sorted(n for site in sites.find(net()) for n in site.names) == sorted(NET_NAMES)
    adapted = trained(net("int4"), config(("up",)))
    assert sorted(n for site in sites.find(adapted) for n in site.names) == sorted(NET_NAMES)


NAMES = ("down", "first", "lm_head", "up")


@pytest.mark.parametrize("targets", [("up", "q_porj", "w1"), r".*\.q_porj"])
def test_targets_that_match_nothing_are_an_error_that_lists_the_names(targets):
    model = net()
    with pytest.raises(errors.UserError) as raised:
        lora.inject(model, config(targets), rngs=nnx.Rngs(0))
    message = str(raised.value)
    assert "q_porj" in message and all(f"{name} (linear" in message for name in NAMES)
    assert ("w1" in message and "'up'" not in message) or isinstance(targets, str)
    assert not found_adapted.by_name(model)


def test_the_head_of_a_classifier_is_named():
    saved = config(("up",), modules_to_save=("score",))
    with pytest.raises(errors.UserError, match=r"score matches nothing: the head of a classifier"):
        lora.inject(net(), saved, rngs=nnx.Rngs(0))


def test_a_target_that_is_excluded_or_in_no_layer_is_an_error():
    with pytest.raises(errors.UserError, match="'up' matches nothing"):
        lora.inject(net(), config(("up", "down"), exclude=("up",)), rngs=nnx.Rngs(0))
    with pytest.raises(errors.UserError, match="'lm_head' matches nothing"):
        lora.inject(net(), config(("up", "lm_head"), layers=(0,), exclude=("lm_head",)),
                    rngs=nnx.Rngs(0))  # fmt: skip


def test_a_path_given_whole_is_taken_in_any_layer():
    """As PEFT does."""
    ranks = lora.inject(net(), config(("up", "first", "blocks.1.up"), layers=(0,)),
                        rngs=nnx.Rngs(0))  # fmt: skip
    assert set(ranks) == {"blocks.0.up", "stack.0.up", "first", "blocks.1.up"}


def test_a_second_adapter_on_a_layer_is_an_error():
    model = trained(net(), config(("up",)))
    with pytest.raises(errors.UserError, match=r"blocks\.0\.up"):
        lora.inject(model, config(("up",)), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "setting, found",
    [
        (dict(exclude=("first.up",)), "exclude 'first.up' matches nothing"),
        (dict(layers=(0, 99)), "layer 99 does not exist"),
        (
            dict(rank_pattern={r"stack\.0": 2}),
            "matches nothing",
        ),  # a pattern matches the path's end
        (dict(alpha_pattern={"q_proj": 2}), "pattern 'q_proj' matches nothing"),
    ],
)
def test_settings_without_effect_are_an_error(setting, found):
    with pytest.raises(errors.UserError, match=found):
        lora.inject(net(), config(("up",), **setting), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("setting", [dict(rank=0), dict(dropout=1.0), dict(rank_pattern={"q": 0})])
def test_settings_that_mean_nothing_are_an_error(setting):
    with pytest.raises(errors.UserError, match=r"rank 0|dropout 1\.0"):
        lora_config.LoRAConfig(**setting)


RATE, WIDTH = 0.25, 64


@pytest.fixture(scope="module")
def masks():
    """(model, masks_of): what each of 5 layers multiplies its input by, [5, rows, WIDTH]."""
    model = Masks(WIDTH, nnx.Rngs(0))
    settings = config("all-linear", rank=WIDTH, alpha=WIDTH, dropout=RATE)
    lora.inject(model, settings, rngs=nnx.Rngs(1))
    for adapter in (model.one, model.two, model.stack):
        adapter.kernel.set_value(jnp.zeros_like(adapter.kernel[...]))
        for part in (adapter.lora_A, adapter.lora_B):
            part.set_value(jnp.broadcast_to(jnp.eye(WIDTH), part.shape))
    model.train()
    graphdef, keys, rest = nnx.split(model, lora.DropoutKey, ...)

    @jax.jit
    def read(key):
        fresh = lora.reseed(nnx.to_pure_dict(keys), key)
        return nnx.merge(graphdef, fresh, rest)(jnp.ones((50, WIDTH)))

    return model, lambda seed: np.asarray(read(jax.random.key(seed)))


def test_dropout_drops_at_its_rate_and_keeps_the_expectation(masks):
    _, masks_of = masks
    found = masks_of(0)
    kept = found != 0
    np.testing.assert_allclose(found[kept], 1 / (1 - RATE), rtol=1e-6)
    assert np.abs(kept.mean(axis=(1, 2)) - (1 - RATE)).max() < 0.03  # 3200 draws: 4 σ
    assert abs(found.mean() - 1) < 0.02


def test_dropout_differs_between_layers_rows_and_keys_and_repeats_with_the_key(masks):
    _, masks_of = masks
    zero, one = masks_of(0), masks_of(1)
    np.testing.assert_array_equal(masks_of(0), zero)
    rows = [*zero.reshape(-1, WIDTH), *one.reshape(-1, WIDTH)]
    assert len({row.tobytes() for row in rows}) == 2 * 5 * 50
    # Independent masks agree at (1 − p)² + p² of the places.
    agreement = np.mean(zero == one, axis=(1, 2))
    assert np.abs(agreement - ((1 - RATE) ** 2 + RATE**2)).max() < 0.04


def test_dropout_is_off_until_train_and_after_eval(masks):
    model, _ = masks
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, state, copy=True)
    copy.eval()
    np.testing.assert_array_equal(run(copy, jnp.ones((3, WIDTH))), 1)
    copy.train()
    assert (run(copy, jnp.ones((3, WIDTH))) == 0).any()
    fresh = Masks(WIDTH, nnx.Rngs(0))
    lora.inject(fresh, config("all-linear", dropout=0.5), rngs=nnx.Rngs(1))
    assert fresh.one.deterministic and fresh.stack.deterministic


def test_dropout_leaves_the_base_layers_input_alone():
    model = nnx.Dict(q=nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    x = inputs(4, 8)
    before = model.q(x)
    lora.inject(model, config(("q",), dropout=0.5), rngs=nnx.Rngs(1))  # B = 0
    model.train()
    np.testing.assert_array_equal(model.q(x), before)


def test_reseeding_a_model_gives_it_new_masks():
    model = net()
    lora.inject(model, config(("up",), dropout=0.5), rngs=nnx.Rngs(0))
    model.train()
    keys = nnx.to_pure_dict(nnx.state(model, lora.DropoutKey))
    before = jax.tree.leaves(keys)
    of_state = lora.reseed(nnx.state(model, lora.DropoutKey), jax.random.key(1))
    nnx.update(model, of_state)
    pure = lora.reseed(keys, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(of_state), pure)
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, lora.DropoutKey)))
    assert len(before) == len(after) > 1
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_merging_without_adapters_is_an_error():
    with pytest.raises(errors.UserError, match="a model with adapters"):
        lora.merge(net())
