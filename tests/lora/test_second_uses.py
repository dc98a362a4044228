"""Weights that a model uses in a second place: merging changes no output, or is refused before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import linen as nn
from flax import nnx

from lora_jax import errors, linen, lora, peft, quant

IDS, X = jnp.arange(16)[None], jax.random.normal(jax.random.key(0), (3, 8))


class Tied(nnx.Module):
    def __init__(self, rngs, embed=nnx.Embed):
        self.wte, self.up = embed(16, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        return self.wte.attend(self.up(self.wte(ids))) / self.wte.embedding.shape[1]


class ReadsItself(Tied):
    def __call__(self, ids):
        return self.logits(self.up(self.wte(ids)))

    def logits(self, hidden):
        table = self.wte
        return hidden @ table.embedding[...].T


class Decoder(nnx.Embed):
    def decode(self, hidden):
        return hidden @ self.embedding.T


class CallsAMethod(Tied):
    def __init__(self, rngs):
        super().__init__(rngs, Decoder)

    def __call__(self, ids):
        return self.wte.decode(self.up(self.wte(ids)))


class Kernels(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x) + x @ layer.kernel
        return x


class OneParam(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(self.a(x))


class OneLayer(nnx.Module):
    def __init__(self, rngs):
        self.a = self.b = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.b(self.a(x))


def changed(model):
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, lora.LoRAParam):
            noise = jax.random.normal(jax.random.key(2), variable.shape)
            variable.set_value(variable[...] + 0.1 * noise)


@pytest.mark.parametrize(
    "make, x, settings",
    [
        (Tied, IDS, dict(targets=("wte",))),
        (Tied, IDS, dict(targets=("wte", "up"), use_dora=True)),
        (Tied, IDS, dict(targets=("up",), modules_to_save=("wte",))),
        (CallsAMethod, IDS, dict(targets=("up",), modules_to_save=("wte",))),
        (ReadsItself, IDS, dict(targets=("wte",))),
        (ReadsItself, IDS, dict(targets=("wte",), use_dora=True)),
        (ReadsItself, IDS, dict(targets=("up",), modules_to_save=("wte",))),
        (CallsAMethod, IDS, dict(targets=("wte",))),
        (Kernels, X, dict(targets="all-linear")),
        (OneParam, X, dict(targets=("a",))),
        (OneParam, X, dict(targets=("a", "b"), use_dora=True)),
        (OneParam, X, dict(targets=("b",), modules_to_save=("a",))),
        (OneParam, X, dict(targets=("a",), init_lora_weights="pissa")),
        (OneLayer, X, dict(targets=("a",))),
    ],
)
def test_merging_changes_no_output(make, x, settings):
    model = make(nnx.Rngs(0))
    before = model(x)
    lora.inject(model, lora.LoRAConfig(rank=2, **settings), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    changed(model)
    adapted = model(x)
    assert np.abs(adapted - before).max() > 0.01
    lora.merge(model)
    np.testing.assert_allclose(model(x), adapted, atol=1e-5)


@pytest.mark.parametrize("make", [OneParam, OneLayer])
def test_quantized_layers_with_one_weight_are_merged_as_well(make):
    model = make(nnx.Rngs(0))
    dense = model(X)
    quant.quantize_model(model, "int8")
    np.testing.assert_allclose(model(X), dense, atol=0.05)
    lora.inject(model, lora.LoRAConfig(rank=2, targets="all-linear"), rngs=nnx.Rngs(1))
    changed(model)
    adapted = model(X)
    lora.merge(model)
    np.testing.assert_allclose(model(X), adapted, atol=1e-5)
    assert type(model.a) is type(model.b) is nnx.Linear


def test_a_layer_whose_weight_a_wrapper_scales_is_refused():
    rngs = nnx.Rngs(0)
    inside = nnx.Linear(8, 8, rngs=rngs)
    model = nnx.Dict(a=nnx.WeightNorm(inside, rngs=rngs), b=inside, c=nnx.Linear(8, 8, rngs=rngs))
    for settings in (
        dict(targets=("b",)),
        dict(targets=("c",), modules_to_save=("layer_instance",)),
    ):
        with pytest.raises(errors.UserError, match="is in a WeightNorm, which scales its weight"):
            lora.inject(model, lora.LoRAConfig(**settings), rngs=rngs)
    alone, every = nnx.Dict(a=nnx.clone(model.a)), lora.LoRAConfig(targets="all-linear")
    with pytest.raises(errors.UserError, match=r"a\.layer_instance is in a WeightNorm"):
        lora.inject(alone, every, rngs=rngs)
    assert set(lora.inject(model, every, rngs=rngs)) == {"c"}


# ------------------------------------------------------------------------- modules saved whole


def nested():
    rngs = nnx.Rngs(0)
    head = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
    return nnx.Dict(body=nnx.Linear(4, 4, rngs=rngs), head=head)


def test_a_sequential_is_saved_by_pefts_names(tmp_path):
    model, config = nested(), lora.LoRAConfig(2, targets=("body",), modules_to_save=("head",))
    x = jax.random.normal(jax.random.key(1), (3, 4))
    lora.inject(model, config, rngs=nnx.Rngs(1))
    changed(model)
    adapted = model.head(model.body(x))
    peft.save(tmp_path, model, config)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "numpy") as file:
        names = {name for name in file.keys() if "lora" not in name}  # noqa: SIM118
        weight = file.get_tensor("base_model.model.head.layers.2.weight")
    assert names == {f"base_model.model.head.layers.{n}.{leaf}"
                     for n in (0, 2) for leaf in ("weight", "bias")}  # fmt: skip
    np.testing.assert_array_equal(weight, model.head.modules_to_save.layers[2].kernel[...].T)
    again = nested()
    peft.load(again, tmp_path)
    np.testing.assert_array_equal(again.head(again.body(x)), adapted)
    lora.merge(model)
    np.testing.assert_allclose(model.head(model.body(x)), adapted, atol=1e-6)


def test_a_container_is_refused_and_the_model_stays_as_it_was():
    """As PEFT does: what is in it is called, not the container, so its copy would not be used."""
    model = nnx.Dict(net=nested(), other=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    graphdef = nnx.split(model)[0]
    config = lora.LoRAConfig(targets=("other",), modules_to_save=("net",))
    with pytest.raises(errors.UserError, match="net is a container"):
        lora.inject(model, config, rngs=nnx.Rngs(1))
    assert nnx.split(model)[0] == graphdef


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = nested()
    graphdef, state = nnx.split(model)

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("lora_jax.lora.nnx.saved.Saved.begin", fails)
    config = lora.LoRAConfig(2, targets=("body",), modules_to_save=("head",),
                             init_lora_weights="pissa")  # fmt: skip
    with pytest.raises(MemoryError):
        lora.inject(model, config, rngs=nnx.Rngs(1))
    assert nnx.split(model)[0] == graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), state)


# ------------------------------------------------------------------------- Linen


class LinenTied(nn.Module):
    def setup(self):
        self.wte, self.up = nn.Embed(16, 8), nn.Dense(8)

    def __call__(self, ids):
        return self.wte.attend(self.up(self.wte(ids)))


class LinenReads(LinenTied):
    def __call__(self, ids):
        return self.up(self.wte(ids)) @ self.wte.embedding.T


class Block(nn.Module):
    reads: bool

    @nn.compact
    def __call__(self, x, _):
        dense = nn.Dense(8, name="d")
        y = nn.relu(dense(x))
        return (y @ dense.variables["params"]["kernel"] if self.reads else y), None


class Scanned(nn.Module):
    reads: bool = False

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Block), length=2, **axes)(self.reads, name="b")(x, None)[0]


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(8, name="d"))(x)


@pytest.mark.parametrize(
    "module, x, settings",
    [
        (LinenTied(), IDS, dict(targets=("wte",))),
        (LinenTied(), IDS, dict(targets=("wte",), use_dora=True)),
        (LinenReads(), IDS, dict(targets=("up",), modules_to_save=("wte",))),
        (LinenReads(), IDS, dict(targets=("wte",))),
        (Scanned(), X, dict(targets=("d",))),
        (Scanned(True), X, dict(targets=("d",))),
        (Normed(), X, dict(targets=("d",))),
    ],
)
def test_merging_changes_no_output_of_a_linen_model(module, x, settings):
    params = module.init(jax.random.key(0), x)["params"]
    adapted = linen.adapt(module, lora.LoRAConfig(rank=2, **settings), x)
    variables = adapted.init(jax.random.key(1), params)
    noise = lambda array: array + 0.1 * jax.random.normal(jax.random.key(2), array.shape)  # noqa: E731
    variables = {**variables, "lora": jax.tree.map(noise, variables["lora"])}
    found, before = adapted.apply(variables, x), module.apply({"params": params}, x)
    assert np.abs(found - before).max() > 0.01
    merged = module.apply({"params": adapted.merge(variables)}, x)
    np.testing.assert_allclose(merged, found, atol=2e-5)
