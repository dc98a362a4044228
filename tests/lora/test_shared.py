"""Weights that a model uses in a second place: merging changes no output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from lora_jax import lora
from lora_jax.lora import linen

IDS = jnp.arange(16)[None]


class Tied(nnx.Module):
    """The embedding is the head, too, by its method `attend`."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.wte, self.up = nnx.Embed(16, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        return self.wte.attend(self.up(self.wte(ids)))


def trained(model):
    for path, node in nnx.iter_graph(model):
        if isinstance(node, lora.LoRAParam):
            key = jax.random.key(len(str(path)))
            node.set_value(node[...] + 0.1 * jax.random.normal(key, node.shape))


@pytest.mark.parametrize(
    "settings",
    [{"targets": ("wte",)}, {"targets": ("wte", "up"), "use_dora": True},
     {"targets": ("up",), "modules_to_save": ("wte",)}],
)  # fmt: skip
def test_an_embedding_that_is_the_head_by_attend_has_its_adapter_in_both(settings):
    model, before = Tied(), Tied()(IDS)
    lora.inject(model, lora.LoRAConfig(rank=2, **settings), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(IDS), before, atol=1e-5)
    trained(model)
    changed = model(IDS)
    assert abs(changed - before).max() > 0.1
    lora.merge(model)
    np.testing.assert_allclose(model(IDS), changed, atol=2e-5)
    assert type(model.wte) is nnx.Embed
    table = model.wte.embedding[...]  # used in both places
    np.testing.assert_allclose(model(IDS), model.up(table[IDS]) @ table.T, atol=2e-5)


class Shared(nnx.Module):
    def __init__(self, share):
        rngs = nnx.Rngs(0)
        self.a, self.b = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs)])
        share(self)

    def __call__(self, x):
        return self.blocks[0](self.b(self.a(x)))


def two_layers(model):
    model.b.kernel = model.a.kernel


def attribute(model):
    model.kernel = model.a.kernel


def in_a_list(model):
    model.blocks[0].kernel = model.a.kernel


@pytest.mark.parametrize("settings", [{"targets": ("a",)}, {"targets": "all-linear"},
                                      {"targets": (), "modules_to_save": ("a",)}])  # fmt: skip
@pytest.mark.parametrize("share", [two_layers, attribute, in_a_list])
def test_a_weight_in_two_places_is_two_weights_after_a_merge(share, settings):
    model = Shared(share)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    before, kernel = model(x), model.a.kernel[...]
    lora.inject(model, lora.LoRAConfig(rank=2, **settings), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    trained(model)
    changed = model(x)
    assert abs(changed - before).max() > 0.1
    lora.merge(model)
    np.testing.assert_allclose(model(x), changed, atol=2e-5)
    others = [holder.kernel[...] for holder in (model, model.b, model.blocks[0])
              if hasattr(holder, "kernel")]  # fmt: skip
    kept = any((other == kernel).all() for other in others)
    assert kept == (settings["targets"] != "all-linear" or share is attribute)


def test_the_other_layers_of_such_a_model_are_adapted():
    model = Shared(attribute)
    assert lora.inject(model, lora.LoRAConfig(rank=2, targets=("b",)), rngs=nnx.Rngs(1)) == {"b": 2}


def test_a_layer_that_is_used_twice_has_its_adapter_in_both():
    model = Shared(lambda model: setattr(model, "b", model.a))
    lora.inject(model, lora.LoRAConfig(rank=2, targets=("a",)), rngs=nnx.Rngs(1))
    trained(model)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    changed = model(x)
    lora.merge(model)
    np.testing.assert_allclose(model(x), changed, atol=1e-5)


class LinenTied(nn.Module):
    def setup(self):
        self.wte, self.up = nn.Embed(16, 8), nn.Dense(8)

    def __call__(self, ids):
        return self.wte.attend(self.up(self.wte(ids)))


def test_a_linen_embedding_that_attends_may_be_trained_whole():
    model = LinenTied()
    config = lora.LoRAConfig(rank=2, targets=("up",), modules_to_save=("wte",))
    adapted = linen.adapt(model, config, IDS)
    params = model.init(jax.random.key(0), IDS)["params"]
    variables = adapted.init(jax.random.key(1), params)
    variables = {**variables, "lora": jax.tree.map(lambda leaf: leaf + 0.1, variables["lora"])}
    found = model.apply({"params": adapted.merge(variables)}, IDS)
    np.testing.assert_allclose(found, adapted.apply(variables, IDS), atol=1e-5)
