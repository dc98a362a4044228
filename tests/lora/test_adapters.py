"""Several adapters on one base: switched without recompiling, combined, unloaded."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import errors, lora
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import adapters, peft
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx import sites
from lora_jax.quant import conversion

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32)), jnp.float32)


class Net(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return nnx.Linear(32, 32, rngs=rngs)

        self.layers = stacked(rngs)
        self.out = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        graphdef, state = nnx.split(self.layers)
        x, _ = jax.lax.scan(lambda x, s: (jnp.tanh(nnx.merge(graphdef, s)(x)), None), x, state)
        return self.out(x)


def net(fmt="none"):
    model = Net(nnx.Rngs(0))
    if fmt != "none":
        model.out = conversion.quantize_linear(model.out, fmt)
    return model


def made(seed, fmt="none", **settings):
    """(an adapter with an effect, what the model computes with it)."""
    model = net(fmt)
    settings = lora_config.LoRAConfig(**{"rank": 2, "targets": ("layers", "out"), **settings})
    lora.inject(model, settings, rngs=nnx.Rngs(seed))
    for site in sites.find(model):
        if isinstance(site.module, lora.LoRALayer):
            _, B = lora_layer.factors(site.module)
            used = np.arange(B.shape[-2]) < np.array(site.module.lora_ranks).reshape(-1, 1)
            used = used.reshape(*site.lead, -1, 1)
            new = 0.1 * np.random.default_rng(seed).normal(size=B.shape) * used
            B.set_value(jnp.asarray(new, jnp.float32))
    return lora.collect(model, settings), model(X)


@pytest.mark.parametrize("fmt", [*cases.long("none"), "int4"])
def test_switching_gives_each_adapter_s_own_output_and_compiles_once(fmt, tmp_path):
    model, base = net(fmt), net(fmt)(X)
    ours = {
        "small": made(1, fmt),
        "wide": made(2, fmt, rank=5, use_rslora=True, rank_pattern={"out": 3}),
        "partial": made(3, fmt, targets=("layers",), layers=(1,), alpha=4),
    }
    peft.write(tmp_path, ours["small"][0])
    shelf = adapters.Adapters(model, rank=6)
    shelf.load("small", tmp_path)
    shelf.load("wide", ours["wide"][0])
    shelf.load("partial", ours["partial"][0])
    assert shelf.names == ["small", "wide", "partial"] and shelf.active is None
    np.testing.assert_allclose(model(X), base, atol=1e-5)

    traced = []

    @jax.jit
    def run(trained, rest, x):
        traced.append(1)
        return nnx.merge(graphdef, trained, rest)(x)

    graphdef, _, rest = nnx.split(model, lora.LoRAParam, ...)
    for name in ("wide", "small", "partial", "wide"):
        np.testing.assert_allclose(run(shelf.state(name), rest, X), ours[name][1], atol=1e-4)
        shelf.activate(name)
        np.testing.assert_allclose(model(X), ours[name][1], atol=1e-4)
    np.testing.assert_allclose(run(shelf.state(None), rest, X), base, atol=1e-5)
    assert len(traced) == 1

    shelf.load("late", ours["small"][0])  # there is room for it
    run(shelf.state("late"), rest, X)
    assert len(traced) == 1 and shelf.active == "wide"
    shelf.unload("wide")
    assert shelf.active is None and shelf.names == ["small", "partial", "late"]
    np.testing.assert_allclose(model(X), base, atol=1e-5)
    peft.write(tmp_path / "again", shelf.adapter("small"))
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_an_adapter_that_is_larger_makes_room():
    model = net()
    shelf = adapters.Adapters(model)
    (small, with_small), (wide, with_wide) = made(1, targets=("out",)), made(2, rank=5)
    shelf.load("small", small)
    shelf.activate("small")
    shelf.load("wide", wide)
    np.testing.assert_allclose(model(X), with_small, atol=1e-4)  # it is active still
    shelf.activate("wide")
    np.testing.assert_allclose(model(X), with_wide, atol=1e-4)


def test_an_adapter_that_does_not_fit_leaves_all_as_it_was(tmp_path):
    """Whether it has other layers, which take other arrays, or the same of other sizes."""
    model = net()
    shelf = adapters.Adapters(model)
    shelf.activate(None)
    assert not jax.tree.leaves(shelf.state(None))
    with pytest.raises(errors.UserError, match="adapters to combine"):
        shelf.combine("none", {})
    small, with_small = made(1)
    shelf.load("small", small)
    shelf.activate("small")
    own = small.factors["out"]
    for factors in (
        {**small.factors, "elsewhere": own},
        {**small.factors, "out": own._replace(A=own.A[:8])},
    ):
        config = lora_config.LoRAConfig(rank=2, targets=("layers", "out", "elsewhere"))
        with pytest.raises(errors.UserError, match=r"(?s)has (no layer|shape).*bad"):
            shelf.load("bad", lora_adapter.Adapter(config, factors))
        assert shelf.names == ["small"] and shelf.active == "small"
        np.testing.assert_allclose(model(X), with_small, atol=1e-4)
    idle = {path: own._replace(B=0 * own.B) for path, own in small.factors.items()}
    peft.write(tmp_path, lora_adapter.Adapter(small.config, idle))
    with pytest.raises(errors.UserError, match="an adapter that has an effect"):
        shelf.load("idle", tmp_path)
    shelf.activate(None)
    np.testing.assert_allclose(model(X), net()(X), atol=1e-5)


def test_a_weighted_sum_is_that_of_the_changes():
    (one, _), (two, _) = made(1), made(2, rank=3, alpha=5, targets=("out",))
    model, plain = net(), net()
    shelf = adapters.Adapters(model)
    shelf.load("one", one)
    shelf.load("two", two)
    shelf.combine("both", {"one": 0.25, "two": -2.0})
    shelf.activate("both")
    delta = {}
    for adapter, weight in ((one, 0.25), (two, -2.0)):
        for path, own in adapter.factors.items():
            change = weight * adapter.scaling(path) * own.A @ own.B
            delta[path] = delta.get(path, 0) + change
    plain.out.kernel.set_value(plain.out.kernel[...] + delta["out"])
    stack = np.stack([delta[f"layers.{i}"] for i in range(3)])
    plain.layers.kernel.set_value(plain.layers.kernel[...] + stack)
    np.testing.assert_allclose(model(X), plain(X), atol=1e-4)

    # The nearest of a smaller rank: what is left out are the smallest singular values.
    whole = shelf.adapter("both").factors["out"]
    assert whole.A.shape[1] == 5
    cut = lora_adapter.combined([(one, 0.25), (two, -2.0)], rank=3).factors["out"]
    assert cut.A.shape[1] == 3
    lost = np.linalg.svd(whole.A @ whole.B - cut.A @ cut.B, compute_uv=False)
    values = np.linalg.svd(whole.A @ whole.B, compute_uv=False)
    np.testing.assert_allclose(lost[0], values[3], rtol=1e-4)


@pytest.mark.long
def test_dora_adapters_switch_among_themselves():
    model, base = net(), net()(X)
    (one, with_one), (two, with_two) = (made(n, use_dora=True, rank=n + 1) for n in (1, 2))
    shelf = adapters.Adapters(model)
    shelf.load("one", one)
    shelf.load("two", two)
    np.testing.assert_allclose(model(X), base, atol=1e-5)
    shelf.activate("one")
    np.testing.assert_allclose(model(X), with_one, atol=1e-4)
    shelf.activate("two")
    np.testing.assert_allclose(model(X), with_two, atol=1e-4)
    with pytest.raises(errors.UserError, match="DoRA beside plain LoRA"):
        shelf.load("plain", made(3)[0])
    with pytest.raises(errors.UserError, match="DoRA"):
        shelf.combine("both", {"one": 1, "two": 1})
    assert shelf.names == ["one", "two"]


def test_names_that_are_taken_or_unknown_are_reported():
    shelf = adapters.Adapters(net())
    shelf.load("one", made(1)[0])
    with pytest.raises(errors.UserError, match="an adapter 'one'"):
        shelf.load("one", made(1)[0])
    for call in (shelf.activate, shelf.unload, shelf.adapter, shelf.state):
        with pytest.raises(errors.UserError, match=r"(?s)'two'.*loaded: one"):
            call("two")
