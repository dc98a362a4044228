"""Models on meshes as jax.make_mesh makes them, whose axes are Explicit; and on Auto ones."""

import contextlib
import functools

import cases
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import config, linen, lora, quant

KERNELS = {
    "linear": lambda r: nnx.Linear(64, 32, rngs=r),
    "general": lambda r: nnx.LinearGeneral((4, 16), (8, 4), axis=(-2, -1), rngs=r),
    "einsum": lambda r: nnx.Einsum("btd,dnh->btnh", (64, 8, 4), (8, 4), rngs=r),
    "embed": lambda r: nnx.Embed(64, 32, rngs=r),
    "conv": lambda r: nnx.Conv(16, 32, (3,), rngs=r),
}
BATCH, WHOLE = P("data"), P()


def make_mesh(kind=AxisType.Explicit, shape=(2, 4)):
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind,) * 2)


def inputs(kind):
    if kind == "embed":
        return np.arange(48, dtype=np.int32).reshape(8, 6) * 7 % 64
    shape = {"general": (8, 6, 4, 16), "conv": (8, 6, 16)}.get(kind, (8, 6, 64))
    return np.float32(np.random.default_rng(5).normal(size=shape))


def model_of(kind, mesh, spec):
    """A model of that layer, with weights drawn by numpy and placed on the mesh, if any."""
    model = nnx.Dict(a=nnx.eval_shape(lambda: KERNELS[kind](nnx.Rngs(0))))
    state, rng = nnx.state(model), np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(state):
        where = None if mesh is None else NamedSharding(mesh, P() if path[-1] == "bias" else spec)
        values = np.float32(rng.normal(0, 0.2, variable.shape))
        variable.set_value(jax.device_put(values, where))
    nnx.update(model, state)
    return model


def results(kind, fmt, settings, mesh=None, spec=WHOLE, *, out=None, ambient=True, attend=False):
    """(the output, gradients of the input, A and B, the output once merged; the adapted model)."""
    within = jax.set_mesh(mesh) if mesh is not None and ambient else contextlib.nullcontext()
    with within:
        model = model_of(kind, mesh, spec)
        x = inputs("linear")[..., :32] if attend else inputs(kind)
        x = jax.device_put(x, None if mesh is None else NamedSharding(mesh, BATCH))
        if fmt:
            quant.quantize_model(model, fmt)
        lora.inject(model, config.LoRAConfig(rank=4, targets=("a",), **settings), rngs=nnx.Rngs(1))
        model.train()
        weights = nnx.state(model, lora.LoRAParam)
        nnx.update(model, jax.tree.map(changed, weights))
        more = {} if out is None or mesh is None else {"out_sharding": out}

        def call(model, x):
            return model.a.attend(x, **more) if attend else model.a(x, **more)

        def loss(model, x):
            y = call(model, x)
            return (y**2).mean(), y

        wrt = nnx.DiffState(0, lora.LoRAParam)
        wrt = wrt if x.dtype == jnp.int32 else (wrt, 1)
        grads, y = nnx.jit(nnx.grad(loss, argnums=wrt, has_aux=True))(model, x)
        adapted = nnx.clone(model)
        lora.merge(model)
        found = (y, grads, nnx.jit(call)(model, x), nnx.state(model, nnx.Param))
        return jax.tree.map(np.asarray, found), adapted, y


def changed(array):
    noise = 0.1 * np.cos(np.arange(array.size, dtype=np.float32)).reshape(array.shape)
    return jax.device_put(np.asarray(array) + noise, array.sharding)


@functools.cache
def alone(kind, fmt, settings, attend):
    """The results on one device."""
    found, *_ = results(kind, fmt, dict(settings), attend=attend)
    return found


def check(kind, fmt=None, settings=None, mesh=None, spec=WHOLE, **more):
    settings = settings or {}
    found, adapted, y = results(kind, fmt, settings, mesh or make_mesh(), spec, **more)
    expected = alone(kind, fmt, tuple(settings.items()), more.get("attend", False))
    assert_close(expected, found)
    return adapted, y


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def spec_of(variable):
    return variable[...].sharding.spec


@pytest.mark.long
@pytest.mark.parametrize("shape, fmt", [((8, 1), None), ((1, 8), "int4")])
def test_a_mesh_that_splits_only_the_data_or_only_the_kernel(shape, fmt):
    check("linear", fmt, mesh=make_mesh(shape=shape), spec=P(None, "tensor"))


@pytest.mark.parametrize("fmt", [None, "int4", *cases.long("int8", "nf4")])
def test_a_kernel_split_on_either_axis(fmt):
    adapted, y = check("linear", fmt, spec=P("data", "tensor"))
    assert jax.typeof(y).sharding.spec == P("data", None, "tensor")
    assert spec_of(adapted.a.lora_A) == P("data", None)
    assert spec_of(adapted.a.lora_B) == P(None, "tensor")
    if fmt:
        assert spec_of(adapted.a.q) == P("data", "tensor")


@pytest.mark.parametrize(
    "fmt, settings",
    [(None, {"dropout": 0.5}), ("int4", {"use_dora": True})],
)
def test_dora_and_dropout(fmt, settings):
    check("linear", fmt, settings, spec=P("tensor"), out=P("data"))


@pytest.mark.parametrize("fmt", [None, *cases.long("int4")])
def test_an_ambiguous_output_needs_out_sharding_as_in_flax(fmt):
    fully_sharded = P(None, "data")
    with pytest.raises(Exception, match="illegally sharded"):
        results("linear", fmt, {}, make_mesh(), fully_sharded)
    _, y = check("linear", fmt, spec=fully_sharded, out=BATCH)
    assert jax.typeof(y).sharding.spec == P("data", None, None)


@pytest.mark.parametrize(
    "kind, fmt, spec, a, b",
    [
        *cases.long(
            ("general", "int4", P("tensor"), P("tensor", None), P(None, None)),
            ("general", None, P(None, None, "tensor"), P(None, None), P(None, "tensor")),
        ),
        ("einsum", "int4", P(None, "tensor"), P(None, None), P(None, "tensor")),
    ],
)
def test_layers_with_several_axes(kind, fmt, spec, a, b):
    adapted, _ = check(kind, fmt, spec=spec)
    assert (spec_of(adapted.a.lora_A), spec_of(adapted.a.lora_B)) == (a, b)


def test_an_embedding_and_its_attend():
    adapted, _ = check("embed", spec=P("tensor"), out=BATCH)
    assert spec_of(adapted.a.lora_embedding_A) == P("tensor", None)
    check("embed", settings={"use_dora": True}, spec=P("tensor"), attend=True)


def test_a_convolution():
    check("conv", settings={"use_dora": True}, spec=P(None, None, "tensor"), out=BATCH)


@pytest.mark.parametrize("kind", [*cases.long(AxisType.Explicit), AxisType.Auto])
def test_arrays_follow_the_kernel_without_an_ambient_mesh(kind):
    adapted, _ = check(
        "general", "int4", mesh=make_mesh(kind), spec=P(None, None, "tensor"), ambient=False
    )
    assert spec_of(adapted.a.lora_B) == P(None, "tensor")
    assert spec_of(adapted.a.quantized.q) == P(None, "tensor")


class Block(nnx.Module):
    def __init__(self, rngs, named):
        names = {"kernel_metadata": {"out_sharding": (None, "tensor")}} if named else {}
        self.up = nnx.Linear(64, 32, rngs=rngs, **names)
        self.down = nnx.Linear(32, 64, rngs=rngs)

    def __call__(self, x):
        out = {} if jax.sharding.get_abstract_mesh().empty else {"out_sharding": BATCH}
        return x + self.down(nnx.relu(self.up(x)), **out)


@pytest.mark.parametrize("fmt", [pytest.param(None, marks=pytest.mark.long), "int4"])
def test_a_scanned_stack_with_remat_has_the_metadata_of_its_kernels(fmt):
    def found(mesh):
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Block(rngs, named=mesh)))
            model, x = nnx.Dict(layers=make(nnx.Rngs(0))), inputs("linear")
            if mesh:
                x = jax.device_put(x, NamedSharding(mesh, BATCH))
            if fmt:
                quant.quantize_model(model, fmt)
            settings = config.LoRAConfig(rank=4, targets=("up", "down"))
            lora.inject(model, settings, rngs=nnx.Rngs(1))

            def loss(model, x):
                body = nnx.scan(
                    nnx.remat(lambda x, block: block(x)),
                    in_axes=(nnx.Carry, 0), out_axes=nnx.Carry,
                )  # fmt: skip
                y = body(x, model.layers)
                return (y**2).mean()

            wrt = nnx.DiffState(0, lora.LoRAParam)
            return nnx.jit(nnx.value_and_grad(loss, argnums=wrt))(model, x), model

    (alone, _), (sharded, model) = found(None), found(make_mesh())
    assert_close(alone, sharded)
    A, B = model.layers.up.lora_A, model.layers.up.lora_B
    assert A.get_metadata()["out_sharding"] == (None, None, None)
    assert B.get_metadata()["out_sharding"] == (None, None, "tensor") == tuple(spec_of(B))


@pytest.mark.parametrize(
    "fmt, use_dora", [pytest.param("none", False, marks=pytest.mark.long), ("int4", True)]
)
def test_linen(fmt, use_dora):
    def dense(features, *names):
        return nn.Dense(
            features, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), names)
        )

    module, x = (
        nn.Sequential([dense(128, None, "tensor"), nn.relu, dense(32, None, None)]),
        inputs("linear"),
    )
    params = drawn.variables(module, x)["params"]
    adapted = linen.adapt(
        module, config.LoRAConfig(rank=4, targets="all-linear", use_dora=use_dora), x, quant=fmt
    )

    def found(params, x):
        variables = adapted.init(jax.random.key(1), params)
        names = variables["lora"]
        lora = jax.tree.map(changed, variables["lora"])

        def loss(lora, x):
            y = adapted.apply({**variables, "lora": lora}, x)
            return (y**2).mean(), y

        grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(lora, x)
        merged = adapted.merge({**variables, "lora": lora})
        return jax.tree.map(np.asarray, (y, grads, merged)), names

    alone, _ = found(params, x)
    with jax.set_mesh(mesh := make_mesh()):

        def place(array):
            spec = array.get_partition_spec() if isinstance(array, nn.Partitioned) else P()
            return jax.device_put(array, NamedSharding(mesh, spec))

        boxed = lambda part: isinstance(part, nn.Partitioned)  # noqa: E731
        placed = jax.tree.map(place, params, is_leaf=boxed)
        sharded, names = found(placed, jax.device_put(x, NamedSharding(mesh, BATCH)))
    assert_close(alone, sharded)
    B = names["layers_0"]["lora_B"]
    assert B.names == (None, "tensor") == tuple(B.value.sharding.spec)
    assert names["layers_0"]["lora_A"].names == (None, None)


@pytest.mark.long
def test_linen_boxes_on_a_mesh_with_auto_axes():
    """The kernel's rows are split; its 2 rows of words and its one group cannot be."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("tensor", None))
    module, x = nn.Dense(8, kernel_init=init), jax.random.normal(jax.random.key(0), (2, 16))
    settings = config.LoRAConfig(rank=2, targets="all-linear")

    def found():
        params = module.init(jax.random.key(1), x)
        adapted = linen.adapt(module, settings, x, quant="int4")
        return str(adapted), adapted.apply(adapted.init(jax.random.key(2), params), x)

    text, alone = found()
    with jax.set_mesh(make_mesh(AxisType.Auto)):
        text_there, y = found()
    assert text == text_there == "kernel  rank 2; int4"
    np.testing.assert_allclose(y, alone, atol=1e-6)
