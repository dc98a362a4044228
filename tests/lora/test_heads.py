"""Heads that are tied to the embedding: PEFT's adapters that change either, or both."""

import dataclasses
import functools
import json
import pathlib

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import errors, lora
from lora_jax.checkpoints import loader, merge, writer
from lora_jax.lora import adapter as host
from lora_jax.lora import peft
from lora_jax.lora.nnx import inject
from lora_jax.parallel import mesh as sharding

BASE = pathlib.Path(__file__).parents[1] / "golden/models/llama_tied_hd16"
IDS = jnp.array([[1, 5, 9, 2, 7]])
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@functools.cache
def loaded():
    one = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    return nnx.split(loader.load(BASE, dtype="float32", mesh=one))


def base():
    return nnx.merge(*loaded(), copy=True)


@functools.cache
def _program(graphdef, method):
    return jax.jit(lambda state: getattr(nnx.merge(graphdef, state), method)(IDS))


def logits(model):
    """model(IDS), by one program for models of the same structure."""
    graphdef, state = nnx.split(model)
    return _program(graphdef, "__call__")(state)


def hidden_states(model):
    graphdef, state = nnx.split(model)
    return _program(graphdef, "hidden_states")(state)


def embedding():
    return np.asarray(base().model.embed_tokens.embedding[...])


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def expected(table, head):
    """The logits with this embedding [V, D] and head [V, D], each used where it belongs."""
    model = base()
    model.model.embed_tokens.embedding.set_value(jnp.asarray(table))
    return np.asarray(hidden_states(model) @ head.T)


def check(found, table, head):
    np.testing.assert_allclose(found, expected(table, head), atol=1e-4)


def merged(adapter, tmp_path):
    """(logits of the merged folder, whether it is tied, the names of its tensors)."""
    plan = merge.plan(BASE, adapter)
    with writer.new_folder(tmp_path / "merged", 0) as written:
        names = list(merge.write(BASE, written, plan))
    one = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    model = loader.load(tmp_path / "merged", dtype="float32", mesh=one)
    raw = json.loads((tmp_path / "merged/config.json").read_text())
    return logits(model), raw["tie_word_embeddings"], names


def attached(adapter):
    model = base()
    lora.attach(model, adapter)
    return model


def adapter(targets=(), saves=(), factors=None, saved=None, **how):
    config = lora.LoRAConfig(rank=2, alpha=6, targets=targets, modules_to_save=saves, **how)
    return host.Adapter(config, factors or {}, saved or {})


@functools.cache
def head_factors():
    vocabulary, width = embedding().shape
    return host.Factors(noise(width, 2), noise(2, vocabulary))


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": (HEAD,)}, {"targets": r".*(q_proj|lm_head)"},
     *cases.long({"targets": ("q_proj", HEAD)},
                 {"targets": (EMBEDDING,), "modules_to_save": (HEAD,)})],
)  # fmt: skip
def test_a_tied_head_that_is_trained_gets_a_weight_of_its_own(settings):
    model, before = base(), logits(base())
    lora.inject(model, lora.LoRAConfig(rank=2, **settings), rngs=nnx.Rngs(0))
    assert not model.config.tie_word_embeddings
    np.testing.assert_allclose(logits(model), before, atol=1e-5)
    lora.strip(model)
    assert model.config.tie_word_embeddings and not hasattr(model, HEAD)
    assert nnx.graphdef(model) == nnx.graphdef(base())
    np.testing.assert_array_equal(logits(model), before)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",)])
def test_a_tied_head_that_is_not_trained_stays_tied(targets):
    model = base()
    lora.inject(model, lora.LoRAConfig(rank=2, targets=targets), rngs=nnx.Rngs(0))
    assert model.config.tie_word_embeddings


def test_an_error_leaves_a_tied_model_tied():
    model = base()
    config = lora.LoRAConfig(targets=("q_proj", "nothing"), modules_to_save=(HEAD,))
    with pytest.raises(errors.UserError, match="'nothing' matches nothing"):
        lora.inject(model, config, rngs=nnx.Rngs(0))
    wrong = adapter(saves=(HEAD,), saved={"lm_head.weight": noise(97, 32)})
    with pytest.raises(
        errors.UserError, match=r"lm_head.weight has 97 rows in the adapter, 96 in the base"
    ):
        lora.attach(model, wrong)
    inject.check(model, adapter(saves=(HEAD,), saved={"lm_head.weight": embedding()}))
    assert nnx.graphdef(model) == nnx.graphdef(base())


def test_a_head_with_a_and_b_is_the_embedding_plus_their_product(tmp_path):
    own = head_factors()
    given = adapter((HEAD,), factors={HEAD: own})
    head = embedding() + 3 * (own.A @ own.B).T
    model = attached(given)
    check(logits(model), embedding(), head)
    peft.save(tmp_path / "adapter", model, given.config)
    again = peft.read(tmp_path / "adapter")
    assert again.factors.keys() == {HEAD} and again.saved.keys() == {"lm_head.base_layer.weight"}
    check(logits(attached(again)), embedding(), head)
    lora.merge(model)
    check(logits(model), embedding(), head)
    found, tied, names = merged(again, tmp_path)
    check(found, embedding(), head)
    assert not tied and "lm_head.weight" in names


def test_a_bias_of_b_is_divided_with_the_logits_of_granite():
    model = loader.load(BASE.parent / "granite", dtype="float32")
    ids = jnp.arange(3, 19)[None]
    before = model(ids)
    settings = lora.LoRAConfig(rank=2, alpha=4, targets=("lm_head",), lora_bias=True)
    lora.inject(model, settings, rngs=nnx.Rngs(0))
    model.lm_head.lora_bias[...] += 1.0
    np.testing.assert_allclose(model(ids) - before, 2 / model.config.logits_scaling, atol=1e-5)


def test_a_head_that_is_saved_whole_is_the_head_alone(tmp_path):
    head = embedding() + noise(*embedding().shape)
    given = adapter(saves=(HEAD,), saved={"lm_head.weight": head})
    model = attached(given)
    check(logits(model), embedding(), head)
    peft.save(tmp_path / "adapter", model, given.config)
    assert peft.read(tmp_path / "adapter").saved.keys() == {"lm_head.weight"}
    found, tied, _ = merged(given, tmp_path)
    check(found, embedding(), head)
    assert not tied


def test_an_embedding_and_a_head_that_are_saved_are_each_their_own(tmp_path):
    table, head = embedding() + 1, embedding() - 1
    saved = {f"{EMBEDDING}.weight": table, "lm_head.weight": head}
    given = adapter(saves=("embed_tokens", HEAD), saved=saved)
    check(logits(attached(given)), table, head)
    found, tied, _ = merged(given, tmp_path)
    check(found, table, head)
    assert not tied


@pytest.mark.parametrize("with_head", [True, False])
def test_a_head_that_peft_kept_tied_is_the_saved_embedding(with_head, tmp_path):
    table = embedding() + noise(*embedding().shape)
    saved = {f"{EMBEDDING}.weight": table} | ({"lm_head.weight": table} if with_head else {})
    given = adapter(saves=("embed_tokens",), saved=saved, ensure_weight_tying=True)
    peft.write(tmp_path / "adapter", given)
    again = peft.read(tmp_path / "adapter")
    assert again.config.ensure_weight_tying
    check(logits(attached(again)), table, table)
    found, tied, names = merged(again, tmp_path)
    check(found, table, table)
    assert tied and "lm_head.weight" not in names


@pytest.mark.parametrize("with_head", [True, False])
def test_a_head_that_peft_kept_tied_has_the_embeddings_a_and_b(with_head, tmp_path):
    head = head_factors()
    own = host.Factors(head.B.T, head.A.T, kind="embedding")
    factors = {EMBEDDING: own} | ({HEAD: head} if with_head else {})
    given = adapter(("embed_tokens",), factors=factors, ensure_weight_tying=True)
    table = embedding() + 3 * own.A @ own.B
    model = base()
    peft.write(tmp_path / "adapter", given)
    config = peft.load(model, tmp_path / "adapter")
    check(logits(model), table, table)
    peft.save(tmp_path / "again", model, config)
    check(logits(attached(peft.read(tmp_path / "again"))), table, table)
    found, tied, _ = merged(given, tmp_path)
    check(found, table, table)
    assert tied


def test_a_tied_head_that_differs_from_the_embedding_is_an_error():
    table = embedding() + 1
    saved = {f"{EMBEDDING}.weight": table, "lm_head.weight": embedding()}
    given = adapter(saves=("embed_tokens",), saved=saved, ensure_weight_tying=True)
    with pytest.raises(
        errors.UserError, match="the same trained weights for embed_tokens and lm_head"
    ):
        attached(given)


def test_adapters_of_a_tied_head_are_switched():
    model, own = base(), head_factors()
    adapters = lora.Adapters(model)
    adapters.load("head", adapter((HEAD,), factors={HEAD: own}))
    before = np.asarray(logits(base()))
    np.testing.assert_allclose(logits(model), before, atol=1e-5)
    adapters.activate("head")
    check(logits(model), embedding(), embedding() + 3 * (own.A @ own.B).T)
    adapters.activate(None)
    np.testing.assert_allclose(logits(model), before, atol=1e-5)


def test_only_the_head_learns_if_it_alone_is_saved():
    model = base()
    config = lora.LoRAConfig(targets=(), modules_to_save=(HEAD,))
    lora.inject(model, config, rngs=nnx.Rngs(0))
    graphdef, trained, rest = nnx.split(model, lora.LoRAParam, ...)
    one = jax.jit(jax.grad(lambda t: nnx.merge(graphdef, t, rest)(IDS)[0, -1, 3]))
    (gradient,) = jax.tree.leaves(one(trained))
    hidden = hidden_states(model)[0, -1]
    np.testing.assert_allclose(gradient[:, 3], hidden, atol=1e-6)
    assert np.abs(gradient).sum() == pytest.approx(np.abs(hidden).sum(), rel=1e-5)


def test_an_embedding_and_a_head_that_peft_saved_unasked(tmp_path):
    factors = {"model.layers.0.self_attn.q_proj": host.Factors(noise(32, 2), noise(2, 64))}
    plain = adapter(("model.layers.0.self_attn.q_proj",), factors=factors)
    before = logits(attached(plain))
    same = embedding().astype(np.float32)
    saved = {f"{EMBEDDING}.weight": same, "lm_head.weight": same}
    given = dataclasses.replace(plain, saved=saved)
    model = attached(given)
    np.testing.assert_array_equal(logits(model), before)
    assert model.config.tie_word_embeddings and lora.num_params(model) == 2 * (32 + 64)
    found, tied, names = merged(given, tmp_path)
    np.testing.assert_allclose(found, before, atol=1e-4)
    assert tied and "lm_head.weight" not in names
    adapters = lora.Adapters(base())
    adapters.load("one", given)
    assert not adapters.adapter("one").saved


@pytest.mark.parametrize("names", [(EMBEDDING, HEAD), (EMBEDDING,), (HEAD,)])
def test_an_embedding_that_differs_though_the_config_does_not_name_it(names, tmp_path):
    """PEFT loads it into the weight that both share."""
    table = embedding() + 1
    layer = "model.layers.0.self_attn.q_proj"
    factors = {layer: host.Factors(noise(32, 2), np.zeros((2, 64), np.float32))}
    given = adapter((layer,), (), factors, {f"{name}.weight": table for name in names})
    model = base()
    peft.write(tmp_path / "adapter", given)
    config = peft.load(model, tmp_path / "adapter")
    check(logits(model), table, table)
    kept = lora.collect(model, config).saved
    assert kept.keys() == {f"{EMBEDDING}.weight", "lm_head.weight"}
    found, tied, _ = merged(given, tmp_path)
    check(found, table, table)
    assert tied


def test_an_enlarged_embedding_without_its_head_is_named_with_what_to_do():
    given = adapter(("q_proj",), ("embed_tokens",), saved={f"{EMBEDDING}.weight": noise(97, 32)})
    found = r"(?s)embed_tokens.weight has 97 rows in the adapter, 96 in the base.*resize_token_emb"
    with pytest.raises(errors.UserError, match=found):
        attached(given)
