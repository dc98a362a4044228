"""Linen models as others write them: what they compute with adapters is what a merge gives, and
the gradients are those of the merged function."""

import functools

import cases
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core, nnx
from flax import linen as nn

from lora_jax import errors
from lora_jax.lora import config as lora_config
from lora_jax.lora import linen

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
SEQUENCE = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 8)), jnp.float32)
IDS = jnp.arange(12).reshape(2, 6) % 11


def config(*targets, **settings):
    targets = targets[0] if targets and targets[0] == "all-linear" else targets
    return lora_config.LoRAConfig(**{"rank": 2, "targets": targets, **settings})


def moved(variables):
    rng = np.random.default_rng(3)
    change = lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32)  # noqa: E731
    return {**variables, "lora": jax.tree.map(change, variables["lora"])}


def close(ours, theirs, atol=2e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-4), ours, theirs)


@pytest.fixture(autouse=True)
def _rank_promotion():
    with jax.numpy_rank_promotion("allow"):  # as other people's models need it
        yield


def weighed(y):
    """A scalar whose gradient is that of no other y."""
    return sum((jnp.sin(leaf + 0.3) ** 2).sum() for leaf in jax.tree.leaves(y))


def agrees(module, settings, *args, quant="none", products=None, exclude=(), **kwargs):
    """Checks that the adapted model's output and gradients are those of the module with merged
    weights; returns the adapted model and its variables.

    products: the sites that are computed as x A B; the others by their weight.
    """
    given = drawn.variables(module, *args, **kwargs)
    adapted = linen.adapt(module, settings, *args, quant=quant, exclude=exclude, **kwargs)

    @jax.jit
    def compare(given, key):
        """Everything by one program: of the fresh adapters first, and of the changed ones."""
        variables = adapted.init(key, given)
        moving = moved(variables)
        mutable = [name for name in given if name != "params"]

        def plain(params):
            return module.apply({**given, "params": params}, *args, mutable=mutable, **kwargs)[0]

        def merged(trained):
            y = plain(adapted.merge({**variables, "lora": trained}))
            return weighed(y), y

        def run(trained):
            own = {**variables, "lora": trained}
            y = adapted.apply(own, *args, mutable=mutable, **kwargs)[0]
            return weighed(y), y

        both = jax.tree.map(lambda *each: jnp.stack(each), variables["lora"], moving["lora"])
        found = [jax.vmap(jax.grad(f, has_aux=True))(both) for f in (run, merged)]
        return moving, plain(given["params"]), *found

    moving, *found = compare(given, jax.random.key(1))
    before, ours, theirs = jax.tree.map(np.asarray, found)
    close(ours, theirs, 1e-4)
    fresh, changed = (jax.tree.map(lambda leaf, at=at: leaf[at], ours) for at in range(2))
    if quant == "none":
        close(fresh[1], before)
    differ = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), changed[1], before)
    assert max(jax.tree.leaves(differ)) > 1e-3
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(changed[0]))
    if products is not None:
        found = {line.split()[0] for line in str(adapted).splitlines()
                 if "rank" in line and "computed as" not in line}  # fmt: skip
        assert found == set(products)
    return adapted, moving


class NestedApply(nn.Module):
    """As Hugging Face's language models with a tied head."""

    def setup(self):
        self.emb, self.fc = nn.Embed(11, 8), nn.Dense(8)
        self.head = nn.Dense(11, use_bias=False)

    def __call__(self, ids):
        h = jnp.tanh(self.fc(self.emb(ids)))
        weight = self.emb.variables["params"]["embedding"].T
        return self.head.apply({"params": {"kernel": weight}}, h)


class Attends(nn.Module):
    by_hand: bool = False

    @nn.compact
    def __call__(self, ids):
        emb = nn.Embed(11, 8, name="emb")
        h = jnp.tanh(nn.Dense(8, name="fc")(emb(ids)))
        return h @ emb.embedding.T if self.by_hand else emb.attend(h)


class Scaled(nn.Dense):
    def __call__(self, inputs):
        return 0.25 * super().__call__(inputs)


class Standardized(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        return inputs @ ((kernel - kernel.mean(0)) / (kernel.std(0) + 1e-3))


class StandardizedParam(nn.Dense):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value / (1 + jnp.abs(value).max()) if name == "kernel" else value


class ReadsOther(nn.Module):
    """The input of one layer depends on the weight of another, and not by a call."""

    @nn.compact
    def __call__(self, x):
        a, b = nn.Dense(8, name="a"), nn.Dense(8, name="b")
        x = a(x)
        return b(jnp.tanh(x @ a.variables["params"]["kernel"]))


class Block(nn.Module):
    kind: type = nn.Dense

    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(x + self.kind(8, name="d")(x)), None


class Stack(nn.Module):
    """Scanned blocks of as many layers as features, so that shapes do not tell the axis."""

    axis: int = 0
    kind: type = nn.Dense
    nested: bool = False
    length: int = 8

    @nn.compact
    def __call__(self, x):
        def stacked(block, length, axis):
            return nn.scan(block, length=length, variable_axes={"params": axis},
                           split_rngs={"params": True})  # fmt: skip

        block = stacked(nn.remat(Block), self.length, self.axis)
        if self.nested:
            block = stacked(block, 2, 0)
        return block(self.kind, name="layers")(x, None)[0]


class Vmapped(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        kind = nn.vmap(nn.Dense, variable_axes={"params": self.axis}, split_rngs={"params": True},
                       in_axes=None, axis_size=8)  # fmt: skip
        return kind(8, name="experts")(x).sum(0)


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        q = x @ self.param("wq", init, (8, 8))
        heads = jnp.einsum("bd,hdk->bhk", q, self.param("wh", init, (2, 8, 4)))
        return heads * self.param("scale", nn.initializers.ones, (4,))


class Wrapped(nn.Module):
    kind: type

    @nn.compact
    def __call__(self, x):
        more = {"update_stats": False} if self.kind is nn.SpectralNorm else {}
        return self.kind(nn.Dense(8, name="d"), name="w")(x, **more)


class SharesScope(nn.Module):
    """As Flax's documentation puts a layer into the scope of another."""

    base: nn.Module

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        return self.base(x) * self.param("scale", nn.initializers.constant(0.5), (8,))


class OwnDerivative(nn.Module):
    """As Flax's documentation changes the gradients of a layer's parameters."""

    @nn.compact
    def __call__(self, x):
        def backward(vjp, dy):
            params, dx = vjp(dy)
            return jax.tree.map(jnp.sign, params), dx

        call = nn.Dense.__call__
        forward = functools.partial(nn.vjp, call)
        return nn.custom_vjp(call, forward, backward)(nn.Dense(8, name="d"), x)


def transposed(variables):
    return jax.tree.map(lambda w: w.T if w.ndim == 2 else w, variables)


class MapVariables(nn.Module):
    """Flax's own example of a tied autoencoder."""

    @nn.compact
    def __call__(self, x):
        encoder = nn.Dense(8, use_bias=False, name="d")
        decoder = nn.map_variables(
            lambda module, x: module(x), "params", transposed, transposed, mutable=True
        )
        return decoder(encoder, jnp.tanh(encoder(x)))


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), feature_group_count=4, name="groups")(x)
        x = nn.ConvTranspose(8, (4,), strides=(2,), name="up")(x)
        x = nn.Conv(8, (3,), mask=jnp.tril(jnp.ones((3, 8, 8))), name="masked")(x)
        return nn.Conv(4, (2,), strides=(2,), name="plain")(x)


class Keyword(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 3), name="g")(inputs=nn.Dense(8, name="d")(inputs=x))


class Mine(nn.Module):
    """A class with a bias by another name, and a multiplier that the einsum does not tell."""

    factor: float = 1.0

    @nn.compact
    def __call__(self, states, *, scale=1.0):
        w = self.param("w", nn.initializers.lecun_normal(), (8, 4))
        return (states @ w + self.param("b", nn.initializers.ones, (4,))) * self.factor


class Plainly(nn.Module):
    @nn.compact
    def __call__(self, states):
        w = self.param("w", nn.initializers.lecun_normal(), (4, 8))
        return jnp.einsum("...i,oi->...o", states, w) + self.param("b", nn.initializers.ones, 4)


class Casts(nn.Module):
    """Computes in the dtype of x, whatever that of its weight is."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.lecun_normal(), (8, 8)).astype(x.dtype)


class Wrongly(Plainly):
    """Registered with the einsum of the transposed weight, if the weight were square."""

    @nn.compact
    def __call__(self, states):
        return states @ self.param("w", nn.initializers.lecun_normal(), (8, 8)).T


class Conv1D(nn.Module):
    """As Hugging Face's: a product of a class that nobody registered, with the axes swapped."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (6, 8))
        y = jax.lax.dot_general(x, kernel.T, (((x.ndim - 1,), (0,)), ((), ())))
        return y + self.param("bias", nn.initializers.ones, (6,))


class Einsum(nn.Module):
    """As that of google-deepmind/gemma, which is told how it multiplies when it is called."""

    shape: tuple[int, ...]
    weight: str = "w"

    @nn.compact
    def __call__(self, text, x):
        w = self.param(self.weight, nn.initializers.lecun_normal(), self.shape)
        return jnp.einsum(text, x, w)


class FeedForward(nn.Module):
    """As Gemma's, whose layers share a scope."""

    @nn.compact
    def __call__(self, x):
        up, down = Einsum((2, 6, 8), "up"), Einsum((6, 8), "down")
        nn.share_scope(self, up)
        nn.share_scope(self, down)
        gate, x = jnp.moveaxis(up("...d,ned->...ne", x), -2, 0)
        return down("bd,de->be", jnp.tanh(gate) * x)


class HasBias(nn.Module):
    """A bias of two axes, which is not mistaken for a weight."""

    @nn.compact
    def __call__(self, mask, x):
        w = self.param("w", nn.initializers.lecun_normal(), (3, 8, 4))
        return jnp.einsum("bd,ndh->bnh", x, w) + self.param("b", nn.initializers.ones, (3, 4))


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
        return HasBias(name="m")(None, x)


class InNNX(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs)])
        self.heads = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
        self.wq = nnx.Param(jax.random.normal(rngs.params(), (3, 4)))

    def __call__(self, x):
        return self.heads(jnp.tanh(self.blocks[0](x))) @ self.wq[...]


class Squared(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (8, 8)) ** 2


class Several(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        gate = x @ self.param("gate", init, (8, 6)) + self.param("b", nn.initializers.ones, (6,))
        return nn.silu(gate) * (x @ self.param("up", init, (8, 6)))


class WithoutBias(nn.Module):
    """Has a bias, and does not add it."""

    @nn.compact
    def __call__(self, x):
        self.param("b", nn.initializers.ones, (6,))
        return x @ self.param("w", nn.initializers.lecun_normal(), (8, 6))


linen.register(Mine, "...i,io->...o", weight="w", bias="b")
linen.register(WithoutBias, "...i,io->...o", weight="w", bias="b")
linen.register(Plainly, "...i,oi->...o", weight="w", bias="b")
linen.register(Wrongly, "...i,io->...o", weight="w", bias=None)
linen.register(Casts, "...i,io->...o", weight="w", bias=None)
linen.register(Several, {"gate": "...i,io->...o", "up": "...i,io->...o"})


class Holds(nn.Module):
    kind: type
    settings: tuple = ()
    keyword: str = ""

    @nn.compact
    def __call__(self, x):
        layer = self.kind(**dict(self.settings), name="m")
        return layer(**{self.keyword: x}) if self.keyword else layer(x)


DENSE = (("features", 8),)
int8_dot = lambda x, w, dims, precision=None, **_: jax.lax.dot_general(  # noqa: E731
    jnp.round(x * 64) / 64, jnp.sinh(w), dims
)
CASES = {
    "nested apply": (NestedApply(), ("fc",), IDS, {"fc"}),
    "nested apply of an adapted weight": (NestedApply(), ("fc", "emb"), IDS, {"fc"}),
    "attend": (Attends(), ("fc", "emb"), IDS, {"fc", "emb"}),
    "attend by hand": (Attends(True), ("fc", "emb"), IDS, {"fc"}),
    "super": (Holds(Scaled, DENSE), ("m",), X, {"m"}),
    "own call": (Holds(Standardized, DENSE), ("m",), X, set()),
    "own param": (Holds(StandardizedParam, DENSE), ("m",), X, set()),
    "dot_general": (Holds(nn.Dense, (*DENSE, ("dot_general", int8_dot))), ("m",), X, set()),
    "input of another": (ReadsOther(), ("a", "b"), X, {"b"}),
    "weight norm": (Wrapped(nn.WeightNorm), ("d",), X, set()),
    "spectral norm": (Wrapped(nn.SpectralNorm), ("d",), X, set()),
    "map_variables": (MapVariables(), ("d",), X, set()),
    "raw": (Raw(), ("wq", "wh"), X, set()),
    "grouped": (Grouped(), ("groups", "up", "masked", "plain"), SEQUENCE, {"plain"}),
    "keyword": (Keyword(), ("d", "g"), X, {"d", "g"}),
    "a factor, and a keyword": (Holds(Mine, (("factor", 0.5),), "states"), ("m",), X, set()),
    "registered": (Holds(Plainly, (), "states"), ("m",), X, {"m"}),
    "registered wrongly": (Holds(Wrongly), ("m",), X, set()),
    "a bias that is not added": (Holds(WithoutBias), ("m",), X, set()),
    "seen to be a product": (Holds(Conv1D), ("m",), SEQUENCE, {"m"}),
    "told by the call": (Holds(FeedForward), ("up", "down"), X, {"m.up", "m.down"}),
    "a bias of two axes": (Masked(), ("m",), X, {"m"}),
    "an NNX module": (nnx.bridge.to_linen(InNNX), ("0", "heads", "wq"), X, set()),
    "a kernel otherwise": (Holds(Squared), ("m",), X, set()),
    "several weights": (Holds(Several), ("gate", "up"), X, set()),
    "one layer": (nn.Dense(4), ("kernel",), X, {"kernel"}),
    "square scan": (Stack(), ("d",), X, {"layers.d"}),
    "square scan on axis 1": (Stack(1), ("d",), X, {"layers.d"}),
    "nested scan": (Stack(1, nested=True, length=3), ("d",), X, {"layers.d"}),
    "scan of another call": (Stack(1, Standardized, length=3), ("d",), X, set()),
    "square vmap on axis 1": (Vmapped(1), ("experts",), X, {"experts"}),
    "shared scope": (SharesScope(nn.Dense(8)), ("kernel",), X, {"kernel"}),
    "own derivative": (OwnDerivative(), ("d",), X, set()),
}


# Whose code other cases take too, or the test of DoRA and of packed weights.
LONG = ("nested apply of an adapted weight", "attend by hand", "own param", "spectral norm",
        "square scan", "nested scan", "scan of another call", "several weights",
        "a factor, and a keyword", "registered", "keyword", "super", "map_variables",
        "told by the call", "a bias of two axes", "square vmap on axis 1",
        "a bias that is not added")  # fmt: skip


@pytest.mark.parametrize(
    "case", [*(case for case in CASES if case not in LONG), *cases.long(*LONG)]
)
def test_adapted_is_merged_in_values_and_gradients(case):
    module, targets, x, products = CASES[case]
    agrees(module, config(*targets), x, products=products)


@pytest.mark.parametrize(
    "case, quant, settings",
    [
        ("a factor, and a keyword", "int8", {}),
        ("several weights", "int4", {}),
        ("a bias that is not added", "int8", {}),
        ("nested apply of an adapted weight", "none", {"use_dora": True}),
        ("scan of another call", "int4", {"use_dora": True}),
        *cases.long(
            ("super", "int4", {}),
            ("shared scope", "int4", {}),
            ("square scan on axis 1", "int4", {}),
            ("grouped", "none", {"use_dora": True}),
            ("registered", "int4", {}),
            ("told by the call", "int4", {"use_dora": True}),
            ("seen to be a product", "int4", {}),
            ("own derivative", "int4", {}),
            ("attend", "none", {"use_dora": True}),
        ),
    ],
)
def test_so_it_is_with_dora_and_packed_weights(case, quant, settings):
    module, targets, x, products = CASES[case]
    adapted, variables = agrees(module, config(*targets, **settings), x, quant=quant,
                                products=products)  # fmt: skip
    assert bool(adapted.packs) == (quant != "none") == ("quantized" in variables)
    trained = {name: variables[name] for name in ("params", "lora")}
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trained))


def test_w_prime_is_w_plus_s_a_b():
    """Of a raw parameter, one matrix for each of its first axes."""
    adapted = linen.adapt(Raw(), config("wq", "wh", alpha=3), X)
    params = drawn.variables(Raw(), X)["params"]
    variables = moved(adapted.init(jax.random.key(1), params))
    own, merged = variables["lora"], adapted.merge(variables)
    for name in ("wq", "wh"):
        delta = jnp.matmul(own[name]["lora_A"], own[name]["lora_B"])
        np.testing.assert_allclose(merged[name], params[name] + 1.5 * delta, atol=1e-6)
    assert set(adapted.collect(variables).factors) == {"wq", "wh.0", "wh.1"}


def test_a_product_of_any_class_is_a_linear_layer():
    """Its K are the inputs, whichever axis of the kernel that is."""
    adapted = linen.adapt(Holds(Conv1D), config("all-linear", dropout=0.5), SEQUENCE)
    params = drawn.variables(Holds(Conv1D), SEQUENCE)
    variables = moved(adapted.init(jax.random.key(1), params))
    assert variables["lora"]["m"]["lora_A"].shape == (8, 2)
    y = adapted.apply(variables, SEQUENCE)
    dropped = adapted.apply(variables, SEQUENCE, rngs={"lora": jax.random.key(2)})
    assert np.abs(y - dropped).max() > 0.01


def test_dropout_where_an_adapter_has_no_input_is_refused_in_training():
    adapted = linen.adapt(Attends(True), config("emb", "fc", dropout=0.5), IDS)
    params = drawn.variables(Attends(), IDS)["params"]
    key = {"lora": jax.random.key(2)}
    variables = moved(adapted.init(jax.random.key(1), params))
    assert np.abs(adapted.apply(variables, IDS) - adapted.apply(variables, IDS, rngs=key)).max() > 0
    adapted = linen.adapt(Raw(), config("wq", dropout=0.5), X)
    variables = adapted.init(jax.random.key(1), drawn.variables(Raw(), X)["params"])
    adapted.apply(variables, X)
    with pytest.raises(errors.UserError, match="reads the weight of wq in another way"):
        adapted.apply(variables, X, rngs=key)


ONE_HOT, HALF = jnp.eye(8, dtype=jnp.int32), X.astype(jnp.bfloat16)


@pytest.mark.parametrize(
    "kind, quant, inputs",
    [(nn.Dense, "none", [ONE_HOT, X[:0]]), (nn.Dense, "int8", [ONE_HOT, X[0], HALF]),
     (nn.Dense, "int4", [HALF, X[:0], X.astype(bool)]),
     (Casts, "none", [HALF]), *cases.long((Casts, "int4", [HALF]))],
)  # fmt: skip
def test_dtypes_are_those_of_the_layer(kind, quant, inputs):
    """An integer is no reason for a product of integers, and no rows are no error."""
    module = Holds(kind, DENSE if kind is nn.Dense else ())
    adapted = linen.adapt(module, config("m"), X, quant=quant)
    dtypes = {x.dtype: jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32 for x in inputs}

    @jax.jit
    def both(wide, key):
        """[(ours, theirs)], with weights of x's dtype and of float32; {dtype: merged weights}."""
        found, weights = [], {}
        for dtype in {jnp.float32, *dtypes.values()}:
            given = jax.tree.map(lambda w, dtype=dtype: w.astype(dtype), wide)
            variables = moved(adapted.init(key, given))
            weights[dtype] = variables, adapted.merge(variables)
        for x in inputs:
            for dtype in {jnp.float32, dtypes[x.dtype]}:
                variables, merged = weights[dtype]
                found.append((adapted.apply(variables, x), module.apply({"params": merged}, x)))
        return found, {np.dtype(dtype).name: merged for dtype, (_, merged) in weights.items()}

    found, merged = both(drawn.variables(module, X), jax.random.key(1))
    for dtype, own in merged.items():
        assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype(dtype)}
    for y, plain in found:
        assert (y.dtype, y.shape) == (plain.dtype, plain.shape)
        np.testing.assert_allclose(*(np.float32(a) for a in (y, plain)), atol=0.05, rtol=0.02)


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        init, boxed = nn.initializers.lecun_normal(), nn.with_partitioning
        x = nn.Dense(6, kernel_init=boxed(init, (None, "model")), name="up")(x)
        logical = nn.with_logical_partitioning(init, ("heads", "width", "embed"))
        x = nn.DenseGeneral(8, kernel_init=logical, axis=(-2, -1), name="out")(x.reshape(-1, 2, 3))
        stacked = nn.scan(Boxed, length=2, variable_axes={"params": 1},
                          split_rngs={"params": True},
                          metadata_params={nn.PARTITION_NAME: "stage"})  # fmt: skip
        return stacked(name="layers")(x, None)[0]


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
        return nn.Dense(8, kernel_init=init, name="d")(x), None


@pytest.mark.parametrize(
    "change, quant",
    [*cases.long((lambda p: p, "none"), (nn.meta.unbox, "none")), (core.freeze, "int4")],
)
def test_boxes_and_containers_come_back_as_they_were(change, quant):
    module = Partitioned()
    given = change(drawn.variables(module, X)["params"])
    adapted = linen.adapt(module, config("all-linear", use_dora=True), X, quant=quant)

    @jax.jit
    def start(given, key):
        variables = moved(adapted.init(key, given))
        merged = adapted.merge(variables)
        return variables, merged, module.apply({"params": merged}, X)

    variables, merged, expected = start(given, jax.random.key(1))
    assert jax.tree.structure(merged) == jax.tree.structure(given)
    assert type(variables["params"]) is type(merged) is type(given)
    run = jax.jit(adapted.apply)
    y = run(variables, X)
    close(y, expected, 1e-4)
    np.testing.assert_array_equal(y, run(nn.meta.unbox(variables), X))
    if change is not nn.meta.unbox:
        spec, own = nn.get_partition_spec(variables), jax.sharding.PartitionSpec
        assert spec["lora"]["up"] == {
            "lora_A": own(None, None), "lora_B": own(None, "model"),
            "lora_magnitude_vector": own("model"),
        }  # fmt: skip
        assert spec["lora"]["out"]["lora_A"] == own("heads", None)
        assert spec["lora"]["layers"]["d"]["lora_B"] == own("stage", None, "b")
        if quant == "none":
            assert spec["params"]["layers"]["d"]["kernel"] == own("a", "stage", "b")
        else:
            assert spec["quantized"]["layers"]["d"]["kernel"]["q"] == own("stage", "a", "b")


class Coder(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(4), nn.Dense(8)
        self.norm = nn.BatchNorm(use_running_average=False)

    def encode(self, x):
        return self.norm(self.encoder(x))

    def decode(self, z):
        return self.decoder(z)


def test_the_methods_of_a_model_and_its_other_collections():
    module, z = Coder(), X[:, :4]
    encode, decode = linen.Call(X, method="encode"), linen.Call(z, method=Coder.decode)
    adapted = linen.adapt(module, config("all-linear"), encode, decode)
    given = drawn.variables(module, X, method=lambda m, x: m.decode(m.encode(x)))
    variables = moved(adapted.init(jax.random.key(1), given))
    assert set(adapted.layer_configs) == {("encoder",), ("decoder",)}
    assert set(variables) == {"params", "batch_stats", "lora"}
    merged = {**given, "params": adapted.merge(variables)}
    settings = {"method": "encode", "mutable": ["batch_stats"], "capture_intermediates": True}
    ours, theirs = adapted.apply(variables, X, **settings), module.apply(merged, X, **settings)
    assert set(ours[1]) == {"batch_stats", "intermediates"}
    close(ours, theirs)
    close(adapted.apply(variables, z, method="decode"), module.apply(merged, z, method="decode"))
    with pytest.raises(errors.UserError, match=r"(?s)'decoder' matches nothing.*encoder"):
        linen.adapt(module, config("decoder"), X, method="encode")
    with pytest.raises(errors.UserError, match="a Call for each"):
        linen.adapt(module, config("decoder"), encode, X)


class Reads(nn.Module):
    @nn.compact
    def __call__(self, x, by_hand=False):
        dense = nn.Dense(8, use_bias=False, name="d")
        y = dense(x)
        return x @ dense.variables["params"]["kernel"] ** 2 if by_hand else y


@pytest.mark.parametrize("quant", [*cases.long("none"), "int4"])
def test_each_call_is_looked_at_when_it_is_made(quant):
    """The example did not read the weight by hand."""
    adapted = linen.adapt(Reads(), config("d"), X, quant=quant)
    variables = moved(adapted.init(jax.random.key(1), drawn.variables(Reads(), X)))
    merged = {"params": adapted.merge(variables)}
    for by_hand in (False, True, False):
        y = adapted.apply(variables, X, by_hand=by_hand)
        close(y, Reads().apply(merged, X, by_hand=by_hand), 1e-4)


def test_what_was_taken_and_what_was_left():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 8, name="emb")(ids)
            x = nn.Conv(8, (3,), name="conv")(nn.LayerNorm()(x))
            x = nn.Dense(8, name="up")(x) @ self.param("wq", nn.initializers.normal(), (8, 8))
            return nn.Dense(4, name="lm_head")(x)

    adapted = linen.adapt(Mixed(), config("all-linear"), IDS, quant="int8")
    raw = "a parameter of Mixed, whose call is no product with it alone"
    assert adapted.left == {
        "emb": "not adapted: an embedding, which all-linear leaves out; "
        "not quantized: an embedding",
        "conv": "not adapted: a convolution, which all-linear leaves out; "
        "not quantized: a convolution",
        "lm_head": "not adapted: lm_head, which all-linear leaves out; not quantized: excluded",
        "wq": f"not adapted: {raw}; name it in the targets; not quantized: {raw}",
    }
    lines = dict(line.split(maxsplit=1) for line in str(adapted).splitlines())
    assert lines["up"] == "rank 2; int8" and lines["wq"] == adapted.left["wq"]
    named = linen.adapt(Mixed(), config("up"), IDS)
    assert named.left["conv"] == "not adapted: not among the targets" and "up" not in named.left


def test_a_layer_that_multiplies_in_a_loop_is_no_product():
    class Repeated(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (8, 8))
            return jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x)

    adapted = linen.adapt(nn.Sequential([Repeated(), nn.Dense(4)]), config("all-linear"), X)
    assert "whose call is no product" in adapted.left["layers_0.w"]


def test_layers_of_nnx_modules_are_known_by_their_classes():
    """Their kernels of three axes are matrices; a bias of two axes is no weight."""
    module = nnx.bridge.to_linen(InNNX)
    adapted = linen.adapt(module, config("all-linear"), X, quant="int8")
    assert set(adapted.layer_configs) == adapted.packs == {("blocks", 0), ("heads",)}
    raw = "a parameter of InNNX, whose call is no product with it alone"
    assert adapted.left == {
        "wq": f"not adapted: {raw}; name it in the targets; not quantized: {raw}"
    }
    variables = adapted.init(jax.random.key(0), drawn.variables(module, X))
    assert variables["lora"]["heads"]["lora_B"].shape == (2, 6)
