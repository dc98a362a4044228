"""Tokens that a model gets beside those of its base: rows, files, and how they are trained."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import errors, lora
from lora_jax.checkpoints import loader, merge, writer
from lora_jax.lora import adapter as host
from lora_jax.lora import new_tokens, peft, tied_head, unshared
from lora_jax.lora.nnx import vocabulary
from lora_jax.models import config as model_config
from lora_jax.parallel import mesh as sharding

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
BASES = {True: MODELS / "llama_tied_hd16", False: MODELS / "llama3"}  # {whether it is tied: base}
NEW = (96, 97)  # of the 96 tokens 0 to 95
ROWS = "token_adapter.trainable_tokens_delta"
BOTH = {"embed_tokens": NEW, "lm_head": NEW}


@functools.cache
def split_base(tied):
    one = sharding.make_mesh(sharding.ONE)
    return nnx.split(loader.load(BASES[tied], dtype="float32", mesh=one))


def base(tied):
    return nnx.merge(*split_base(tied), copy=True)


def check_same(a, b):
    for (path, of_a), (_, of_b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (a, b)),
                                       strict=True):  # fmt: skip
        np.testing.assert_allclose(of_a[...], of_b[...], atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_the_others_stay(tied):
    model, before = base(tied), base(tied)
    vocabulary.add(model, (95, 97))
    table, old = (np.asarray(m.model.embed_tokens.embedding) for m in (model, before))
    np.testing.assert_array_equal(table[:95], old[:95])
    np.testing.assert_allclose(table[[95, 97]], [old.mean(axis=0)] * 2, rtol=1e-4, atol=1e-8)
    assert table.shape == (98, 32) and model.config.vocab_size == 98
    if not tied:
        kernel, old = (np.asarray(m.lm_head.kernel) for m in (model, before))
        np.testing.assert_array_equal(kernel[:, :95], old[:, :95])
        np.testing.assert_allclose(kernel[:, 97], old.mean(axis=1), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    "tied, settings, tensors",
    [
        (True, {}, {f"model.embed_tokens.{ROWS}"}),
        (False, {}, {f"model.embed_tokens.{ROWS}", f"lm_head.{ROWS}"}),
        (False, {"modules_to_save": ("embed_tokens",)},
         {"model.embed_tokens.weight", f"lm_head.{ROWS}"}),
        (False, {"targets": ("q_proj", "model.embed_tokens")},
         {"model.embed_tokens.base_layer.weight", f"lm_head.{ROWS}"}),
    ],
)  # fmt: skip
def test_the_files_of_an_adapter_give_any_copy_of_the_base_its_rows(
    tied, settings, tensors, tmp_path
):
    """PEFT computes the same from them after resize_token_embeddings: tried with 0.21.2."""
    model = base(tied)
    vocabulary.add(model, NEW)
    config = lora.LoRAConfig(rank=2, **{"targets": ("q_proj",), **settings})
    config = new_tokens.trained(config, NEW, tied=tied)
    lora.inject(model, config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, lora.LoRAParam):
            noise = np.float32(0.1 * rng.normal(size=variable.shape))
            variable.set_value(jnp.asarray(np.asarray(variable[...]) + noise))
    peft.save(tmp_path / "adapter", model, config)
    adapter = peft.read(tmp_path / "adapter")
    assert adapter.saved.keys() == tensors

    again = base(tied)
    peft.load(again, tmp_path / "adapter")
    assert again.config == model.config
    assert lora.collect(again, config).saved.keys() == tensors
    lora.merge(model)
    lora.merge(again)
    check_same(again, model)
    with writer.new_folder(tmp_path / "merged", 0) as written:
        list(merge.write(BASES[tied], written, merge.plan(BASES[tied], adapter)))
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == 98
    check_same(loader.load(tmp_path / "merged", dtype="float32"), model)


def test_rows_that_are_in_no_file_are_refused():
    rows = {f"{path}.{ROWS}": np.zeros((2, 4), np.float32)
            for path in (tied_head.EMBEDDING, tied_head.HEAD)}  # fmt: skip

    def size(tokens, *, tied):
        config = lora.LoRAConfig(trainable_token_indices=tokens)
        own = host.Adapter(config, {}, rows)
        return tied_head.fitted(own, (96, 4), tied=tied, where="x").num_tokens

    assert size(NEW, tied=True) == size(BOTH, tied=False) == size(BOTH, tied=True) == 98
    assert size((3, 95), tied=False) == 96
    for tokens, tied in (((3, 97), True), (NEW, False), (BOTH | {"lm_head": (95, 97)}, False),
                         (BOTH | {"lm_head": (96,)}, False)):  # fmt: skip
        with pytest.raises(errors.UserError, match="98 rows in the adapter, 96 in the base"):
            size(tokens, tied=tied)


@pytest.mark.parametrize(
    "tied, settings, tokens",
    [
        (True, {}, NEW),
        (False, {}, BOTH),
        (True, {"targets": "all-linear"}, NEW),
        (False, {"targets": "all-linear"}, BOTH),
        (True, {"trainable_token_indices": (5, 96)}, (5, 96, 97)),
        (False, {"trainable_token_indices": {"lm_head": (5,)}},
         {"lm_head": (5, *NEW), "embed_tokens": NEW}),
        (True, {"trainable_token_indices": {"lm_head": (5,)}},
         {"lm_head": (5, *NEW), "embed_tokens": NEW}),
        (False, {"modules_to_save": ("lm_head",)}, NEW),
        (False, {"modules_to_save": ("lm_head", "embed_tokens")}, None),
        (True, {"modules_to_save": ("lm_head", "embed_tokens")}, None),
        (True, {"targets": ("lm_head",), "ensure_weight_tying": True}, None),
    ],
)  # fmt: skip
def test_what_is_not_trained_in_another_way_is_trained_by_rows(tied, settings, tokens):
    config = lora.LoRAConfig(**settings)
    found = new_tokens.trained(config, NEW, tied=tied)
    assert found.trainable_token_indices == tokens
    assert new_tokens.trained(found, NEW, tied=tied) == found  # as when a run is resumed


def test_a_tied_weight_of_which_one_part_is_trained_is_refused():
    config = lora.LoRAConfig(modules_to_save=("embed_tokens",))
    with pytest.raises(errors.UserError, match="--ensure-weight-tying"):
        new_tokens.trained(config, NEW, tied=True)


def test_a_mesh_has_to_divide_the_vocabulary_with_the_new_tokens():
    mesh = sharding.make_mesh(sharding.ONE | {"tensor": 2})
    model = loader.load(BASES[False], dtype="float32", mesh=mesh)
    with pytest.raises(errors.UserError, match="a mesh that divides the vocabulary"):
        vocabulary.add(model, (96,))
    where = model.lm_head.kernel[...].sharding
    vocabulary.add(model, NEW)
    alone = base(False)
    vocabulary.add(alone, NEW)
    check_same(model, alone)
    assert model.lm_head.kernel[...].sharding == where


def test_an_adapter_with_new_tokens_cannot_share_a_batch():
    of_base = model_config.load(BASES[True])
    rows = {f"{tied_head.EMBEDDING}.{ROWS}": np.zeros((2, 32), np.float32)}
    own = host.Adapter(lora.LoRAConfig(trainable_token_indices=NEW), {}, rows)
    assert unshared.find(own, of_base, "x")[0] == "a vocabulary of 98 tokens instead of 96"
    assert not unshared.find(host.Adapter(lora.LoRAConfig(), {}), of_base, "x")
