"""A bias of B (PEFT's lora_bias): y = layer(x) + scaling · (x A B + bias)."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from lora_jax import errors, lora
from lora_jax.checkpoints import merge as folder_merge
from lora_jax.lora import adapter as host
from lora_jax.lora import adapters, linen, peft
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import bank, banked
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "lora_bias/final_adapter"
CONFIG = lora_config.LoRAConfig(rank=2, alpha=6, targets=("a", "b"), lora_bias=True)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)


def model_of(use_bias=True):
    return nnx.Dict(a=nnx.Linear(4, 4, use_bias=use_bias, rngs=nnx.Rngs(0)),
                    b=nnx.Linear(4, 6, use_bias=use_bias, rngs=nnx.Rngs(1)))  # fmt: skip


def drawn(like, seed=2):
    """The adapter with other values."""
    rng = np.random.default_rng(seed)
    return dataclasses.replace(like, factors={
        path: own._replace(**{name: rng.normal(size=getattr(own, name).shape).astype(np.float32)
                              for name in ("A", "B", "bias")})
        for path, own in like.factors.items()
    })  # fmt: skip


def adapter_of(config=CONFIG):
    model = model_of()
    lora.inject(model, config, rngs=nnx.Rngs(0))
    return drawn(lora.collect(model, config))


def test_it_is_added_scaled_trained_alone_and_taken_off():
    model, adapter = model_of(), adapter_of()
    own = adapter.factors["a"]
    expected = np.asarray(model.a(X)) + 3 * (np.asarray(X) @ own.A @ own.B + own.bias)
    before = model.a(X)
    lora.inject(model, CONFIG, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.a(X), before)
    assert lora.num_params(model) == 2 * (4 + 4) + 4 + 2 * (4 + 6) + 6
    assert adamw.labels(nnx.to_pure_dict(nnx.state(model, lora.LoRAParam)))["a"] == {
        "lora_A": "A", "lora_B": "B", "lora_bias": "B",
    }  # fmt: skip
    lora.strip(model)
    assert "lora_bias" not in vars(model.a)
    lora.attach(model, adapter)
    np.testing.assert_allclose(model.a(X), expected, rtol=1e-4, atol=1e-5)


def test_it_does_not_decay():
    """As Hugging Face's Trainer, which leaves biases out."""
    tree = {name: jnp.ones(2) for name in ("lora_A", "lora_B", "lora_bias")}
    how = optim_config.OptimConfig(lr=1.0, warmup=0, schedule="constant", weight_decay=0.5)
    optimizer = adamw.make(how, 2)
    zero = {name: jnp.zeros(2) for name in tree}
    updates, _ = optimizer.update(zero, optimizer.init(tree), tree)
    assert {name: float(array[0]) for name, array in updates.items()} == {
        "lora_A": -0.5, "lora_B": -0.5, "lora_bias": 0.0,
    }  # fmt: skip


def test_outputs_that_are_not_adapted_have_none():
    model = model_of()
    before = np.asarray(model.b(X))
    config = dataclasses.replace(CONFIG, targets=("b",), parts={"b": (1, -1, 1)})
    lora.inject(model, config, rngs=nnx.Rngs(0))
    assert lora.num_params(model) == 4 * 4 + 2 * 4 + 4
    model.b.lora_bias[...] += 1
    expected = before + 3 * np.asarray([1, 1, 0, 0, 1, 1])
    np.testing.assert_allclose(model.b(X), expected, rtol=1e-5)
    own = lora.collect(model, config).factors["b"]
    np.testing.assert_array_equal(own.bias, [1, 1, 0, 0, 1, 1])
    lora.merge(model)
    np.testing.assert_allclose(model.b(X), expected, rtol=1e-5)


def test_merging_needs_layers_with_a_bias():
    """As in PEFT, which trains it on layers without one, too."""
    model, adapter = model_of(use_bias=False), adapter_of()
    lora.attach(model, adapter)
    before = model.a(X)
    with pytest.raises(errors.UserError, match=r"(?s)a has none\n.*b has none"):
        lora.merge(model)
    np.testing.assert_array_equal(model.a(X), before)
    with pytest.raises(errors.UserError, match=r"layers\.0\.self_attn\.q_proj has none"):
        folder_merge.plan(GOLDEN / "models/llama", peft.read(FOLDER))
    module, own = nn.Sequential([nn.Dense(4, use_bias=False)]), dict(targets=("layers_0",))
    adapted = linen.adapt(module, dataclasses.replace(CONFIG, **own), X)
    variables = adapted.init(nnx.Rngs(0)(), {"layers_0": {"kernel": jnp.eye(4)}})
    with pytest.raises(errors.UserError, match="layers_0 has none"):
        adapted.merge(variables)


def test_adapters_side_by_side_are_refused_by_name():
    adapter = adapter_of()
    for attempt in (lambda: host.aligned({"x": adapter}), lambda: host.combined([(adapter, 1)]),
                    lambda: adapters.Adapters(model_of()).load("x", adapter)):  # fmt: skip
        with pytest.raises(errors.UserError, match=r"biases of B \(lora_bias\)"):
            attempt()
    model = model_of()
    bank.add(model, slots=1, rank=2, targets=("a", "b"))
    with pytest.raises(errors.UserError, match=r"(?s)biases of B.*lora-jax merge"):
        banked.Bank(model).contents(adapter, "x")


class Reads(nnx.Module):
    """A model with a parameter of its own, that also reads a layer's weight."""

    def __init__(self):
        self.own = nnx.Param(jnp.ones((4, 4)))
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return x @ self.own[...] @ self.layer.kernel[...]


def test_what_has_no_b_to_add_it_to_is_refused():
    embedding = nnx.Dict(a=nnx.Embed(4, 4, rngs=nnx.Rngs(0)), b=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(errors.UserError, match=r"a is an embedding, whose B has no bias"):
        lora.inject(embedding, CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(errors.UserError, match=r"own is no layer"):
        lora.inject(Reads(), dataclasses.replace(CONFIG, targets=("own",)), rngs=nnx.Rngs(0))
    model = Reads()
    lora.inject(model, dataclasses.replace(CONFIG, targets=("layer",)), rngs=nnx.Rngs(0))
    with pytest.raises(errors.UserError, match=r"weight is read, with a bias of B \(lora_bias\)"):
        model(X)
    for wrong in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(errors.UserError, match="lora_bias with use_dora, PiSSA or OLoRA"):
            dataclasses.replace(CONFIG, **wrong)


def test_an_adapter_and_its_settings_agree():
    adapter, model = adapter_of(), model_of()
    without = dataclasses.replace(adapter.config, lora_bias=False)
    with pytest.raises(errors.UserError, match=r"a\.lora_B\.bias is there, but lora_bias is false"):
        lora.attach(model, dataclasses.replace(adapter, config=without))
    lacking = {path: own._replace(bias=None) for path, own in adapter.factors.items()}
    with pytest.raises(errors.UserError, match=r"b\.lora_B\.bias is missing"):
        lora.attach(model, dataclasses.replace(adapter, factors=lacking))
    idle = {path: own._replace(B=0 * own.B) for path, own in adapter.factors.items()}
    lora.attach(model, dataclasses.replace(adapter, factors=idle))  # the bias has an effect
    none = {path: own._replace(bias=0 * own.bias) for path, own in idle.items()}
    with pytest.raises(errors.UserError, match="an adapter that has an effect"):
        lora.attach(model_of(), dataclasses.replace(adapter, factors=none))
