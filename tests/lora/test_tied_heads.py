"""A tied embedding and head under an adapter: PEFT's files, training, saving and merging."""

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
from lora_jax.lora import peft, tied_head
from lora_jax.lora.nnx import model_state
from lora_jax.optim import loss as train_loss
from lora_jax.parallel import mesh as sharding

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
HEADS, BASE = GOLDEN / "tied_heads", GOLDEN / "models" / "llama_tied_hd16"
STAYS_TIED = {
    "save_head": False, "save_both": False, "target_head": False, "target_both_dora": False,
    "tied_save": True, "tied_target": True, "tied_target_head": True,
    "plain_99": True, "save_embed_99": False,
    "tokens": True, "tokens_of_head": False, "tokens_of_each": False, "tokens_99": True,
}  # fmt: skip
FEW = ("target_both_dora", "tied_target_head", "tokens_99")


def load(folder=BASE):
    one = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    return loader.load(folder, dtype="float32", mesh=one)


@functools.cache
def split_base():
    return nnx.split(load())


def base():
    return nnx.merge(*split_base(), copy=True)


@functools.cache
def golden():
    with np.load(HEADS / "logits.npz") as arrays:
        return dict(arrays)


@functools.cache
def function(graphdef):
    return jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))


def logits(model):
    graphdef, state = nnx.split(model)
    return np.asarray(function(graphdef)(state, jnp.asarray(golden()["input_ids"])))


@pytest.mark.parametrize("kind", [*FEW, *cases.long(*sorted({*STAYS_TIED} - {*FEW}))])
def test_pefts_files_are_read_saved_again_and_merged(kind, tmp_path):
    model, folder = base(), HEADS / kind
    config = peft.load(model, folder)
    np.testing.assert_allclose(logits(model), golden()[kind], atol=1e-4)
    peft.save(tmp_path / "again", model, config, base_model="llama_tied_hd16")
    if kind in ("save_embed_99", "tokens_99"):  # of which PEFT saves some tensors twice
        again = base()
        peft.load(again, tmp_path / "again")
        np.testing.assert_array_equal(logits(again), logits(model))
    else:
        name = "adapter_model.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert peft.config(tmp_path / "again").ensure_weight_tying == kind.startswith("tied")
    lora.merge(model)
    np.testing.assert_allclose(logits(model), golden()[kind], atol=1e-4)
    assert model.config.tie_word_embeddings is STAYS_TIED[kind]

    plan = merge.plan(BASE, peft.read(folder))
    with writer.new_folder(tmp_path / "merged", 0) as written:
        names = list(merge.write(BASE, written, plan))
    raw = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is STAYS_TIED[kind]
    assert ("lm_head.weight" in names) is not STAYS_TIED[kind]
    assert raw["vocab_size"] == (99 if kind.endswith("99") else 96)
    _, state = nnx.split(load(tmp_path / "merged"))
    jax.tree.map(np.testing.assert_allclose, state, nnx.split(model)[1])


@pytest.mark.parametrize(
    "settings, tied, trained",
    [
        *cases.long((dict(modules_to_save=("lm_head",)), False,
                     {"lm_head/modules_to_save/kernel"})),
        *cases.long((dict(targets=("lm_head",)), False, {"lm_head/lora_A", "lm_head/lora_B"})),
        *cases.long((dict(modules_to_save=("lm_head",), ensure_weight_tying=True), True,
                     {"model/embed_tokens/modules_to_save/embedding"})),
        (dict(targets=r"lm_head|.*v_proj", ensure_weight_tying=True), True,
         {"model/embed_tokens/lora_embedding_A", "model/embed_tokens/lora_embedding_B"}),
    ],
)  # fmt: skip
def test_what_is_trained_gets_gradients_and_leaves_with_the_adapter(settings, tied, trained):
    model = base()
    before, graphdef = logits(model), nnx.split(model)[0]
    lora.inject(model, lora.LoRAConfig(rank=2, **settings), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(logits(model), before, atol=1e-5)
    assert model.config.tie_word_embeddings is tied
    changed(model)
    ids = jnp.asarray(golden()["input_ids"])
    batch = train_loss.Batch(ids, ids, jnp.ones_like(ids))
    own, state, frozen = model_state.split(model)

    @jax.jit
    @jax.grad
    def gradient(state):
        built = nnx.merge(own, state, frozen.dropout_keys, frozen.base)
        return train_loss.losses(built, batch).sum()

    found = {"/".join(str(part.key) for part in path): np.abs(np.asarray(array)).max()
             for path, array in jax.tree_util.tree_leaves_with_path(gradient(state))}  # fmt: skip
    assert {path for path in found if "layers" not in path} == trained
    assert all(found[path] > 1e-3 for path in trained)
    lora.strip(model)
    assert nnx.split(model)[0] == graphdef
    np.testing.assert_array_equal(logits(model), before)


def changed(model):
    rng = np.random.default_rng(2)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, lora.LoRAParam):
            noise = np.float32(0.05 * rng.normal(size=variable.shape))
            variable.set_value(jnp.asarray(np.asarray(variable[...]) + noise))


@pytest.mark.parametrize(
    "settings, found",
    [
        (dict(targets=("embed_tokens",), use_dora=True), "use_dora"),
        (dict(targets=("lm_head",), rank_pattern={"lm_head": 4}), "another rank or alpha"),
    ],
)
def test_what_cannot_be_trained_as_one_weight_is_refused(settings, found):
    model = base()
    graphdef = nnx.split(model)[0]
    config = lora.LoRAConfig(ensure_weight_tying=True, **settings)
    with pytest.raises(errors.UserError, match=found):
        lora.inject(model, config, rngs=nnx.Rngs(0))
    assert nnx.split(model)[0] == graphdef


def test_a_refusal_leaves_the_head_tied():
    model = base()
    graphdef = nnx.split(model)[0]
    for settings in (dict(targets=("nothing",)), dict(targets=("lm_head", "norm"))):
        config = lora.LoRAConfig(modules_to_save=("lm_head",), **settings)
        with pytest.raises(errors.UserError):
            lora.inject(model, config, rngs=nnx.Rngs(0))
        assert nnx.split(model)[0] == graphdef
    with pytest.raises(errors.UserError, match=r"(?s)q_proj\.lora_A has shape"):
        lora.attach(model, damaged(peft.read(HEADS / "plain_99")))
    assert nnx.split(model)[0] == graphdef and model.model.embed_tokens.embedding.shape == (96, 32)


def damaged(adapter):
    factors = {path: own._replace(A=own.A[:-1]) for path, own in adapter.factors.items()}
    return host.Adapter(adapter.config, factors, adapter.saved)


def test_ensured_tying_without_the_heads_copy_ties():
    """PEFT writes both; it cannot read the file without the head."""
    adapter = peft.read(HEADS / "tied_save")
    saved = {name: array for name, array in adapter.saved.items() if "lm_head" not in name}
    model = base()
    lora.attach(model, host.Adapter(adapter.config, adapter.factors, saved))
    np.testing.assert_allclose(logits(model), golden()["tied_save"], atol=1e-4)


@pytest.mark.parametrize("use_rslora, scaling", [(False, 2.0), (True, 4.0)])
def test_a_tied_head_has_the_embeddings_rank_and_its_own_scaling(use_rslora, scaling):
    """PEFT gives it the embedding's A and B, and alpha and rank of its own for the scaling."""
    A, B = np.ones((96, 6), np.float32), np.ones((6, 32), np.float32)
    factors = {tied_head.EMBEDDING: host.Factors(A, B, None, "embedding"),
               tied_head.HEAD: host.Factors(B.T, A.T)}  # fmt: skip
    config = lora.LoRAConfig(4, 8, targets=("embed_tokens", "lm_head"), use_rslora=use_rslora,
                             ensure_weight_tying=True,
                             rank_pattern={"embed_tokens": 6})  # fmt: skip
    model = base()
    lora.attach(model, host.Adapter(config, factors))
    assert not model.config.tie_word_embeddings
    np.testing.assert_allclose(model.lm_head.lora_scaling[...], scaling)


def test_two_values_of_one_tied_weight_are_refused():
    adapter = peft.read(HEADS / "tied_save")
    adapter.saved["lm_head.weight"] = 2 * adapter.saved["lm_head.weight"]
    with pytest.raises(errors.UserError, match="the same trained weights"):
        lora.attach(base(), adapter)


@pytest.mark.parametrize("other", [False, True])
def test_embeddings_that_peft_saved_of_its_own_accord(other):
    """The base's own change nothing; other values are the base's from then on, as in PEFT."""
    adapter = peft.read(HEADS / "save_head")
    weight = np.asarray(base().model.embed_tokens.embedding) * (2 if other else 1)
    config = lora.LoRAConfig(2, 4, targets=("q_proj",), layers=(1,))
    own = host.Adapter(config, adapter.factors, {"model.embed_tokens.weight": weight})
    model, expected = base(), base()
    expected.model.embed_tokens.embedding.set_value(jnp.asarray(weight))
    lora.attach(model, own)
    lora.attach(expected, host.Adapter(config, adapter.factors))
    np.testing.assert_allclose(logits(model), logits(expected), atol=1e-5)
    assert set(lora.collect(model, config).saved) == (
        {"model.embed_tokens.weight", "lm_head.weight"} if other else set()
    )


def test_another_size_of_the_vocabulary_needs_both_weights():
    adapter = peft.read(HEADS / "plain_99")
    found = tied_head.fitted(adapter, (96, 32), tied=False, where="x")
    assert found.num_tokens == 99 and set(found.base) == {tied_head.EMBEDDING, tied_head.HEAD}
    del adapter.saved["lm_head.weight"]
    with pytest.raises(errors.UserError, match="99 rows in the adapter, 96 in the base, and no w"):
        tied_head.fitted(adapter, (96, 32), tied=False, where="x")
    assert tied_head.fitted(adapter, (96, 32), tied=True, where="x").num_tokens == 99
    with pytest.raises(errors.UserError, match=r"has shape \(99, 32\), expected \(…, 16\)"):
        tied_head.fitted(adapter, (96, 16), tied=True, where="x")
