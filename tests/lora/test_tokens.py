"""Single rows of an embedding, or of a head, that are trained: PEFT's trainable_token_indices."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import errors, linen, lora, quant
from lora_jax.lora import peft, peft_tensors, token_indices

V, D = 16, 4
IDS = jnp.array([[3, 1, 5, 9], [0, 5, 5, 2]])
TOKENS = (9, 5)


class Tied(nnx.Module):
    """A head that is the embedding, as a layer or as its weight; and one of its own."""

    def __init__(self, rngs):
        self.words = nnx.Embed(V, D, rngs=rngs)
        self.mix = nnx.Linear(D, D, rngs=rngs)
        self.out = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.mix(self.words(ids))
        return self.words.attend(x), x @ self.words.embedding[...].T, self.out(x)


@functools.cache
def split():
    return nnx.split(Tied(nnx.Rngs(0)))


def tied():
    return nnx.merge(*split(), copy=True)


def settings(tokens=TOKENS, **more):
    return lora.LoRAConfig(rank=2, **{"targets": ("mix",), **more}, trainable_token_indices=tokens)


def injected(tokens=TOKENS, **more):
    model = tied()
    lora.inject(model, settings(tokens, **more), rngs=nnx.Rngs(1))
    return model


def changed(model):
    """The model with 1 more in all that is trained of tokens."""
    for path, variable in nnx.iter_graph(model):
        if path and path[-1] == "trainable_tokens_delta":
            variable.set_value(variable[...] + 1)
    return model


def expected(words=(), out=()):
    """What the model computes with 1 more in these rows of the embedding and of the head."""
    model = tied()
    for path, tokens in (("words.embedding", words), ("out.kernel", out)):
        layer, name = path.split(".")
        variable = getattr(getattr(model, layer), name)
        at = np.array(tokens, int)
        at = at if layer == "words" else (slice(None), at)
        variable.set_value(variable[...].at[at].add(1))
    return model(IDS)


def check(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


OF_EACH = {"words": (9, 5), "out": (0, 15, 3)}


@pytest.mark.parametrize("tokens", [TOKENS, OF_EACH], ids=["list", "by name"])
def test_rows_are_those_of_the_weight_until_they_are_trained(tokens):
    model, before = injected(tokens), tied()(IDS)
    check(model(IDS), before)
    out = tokens["out"] if isinstance(tokens, dict) else ()
    assert lora.num_params(model) == 2 * 2 * D + (len(TOKENS) + len(out)) * D
    assert "words: 2 tokens" in lora.summary(model)
    wanted = expected(TOKENS, out)
    assert all(abs(a - b).max() > 0.1 for a, b in zip(wanted[:2], before[:2], strict=True))
    check(changed(model)(IDS), wanted)
    lora.merge(model, IDS)
    check(model(IDS), wanted)
    assert type(model.words) is nnx.Embed and type(model.out) is nnx.Linear
    model = changed(injected(tokens))
    lora.strip(model)
    assert nnx.split(model)[0] == split()[0]
    check(model(IDS), before)


def test_only_the_tokens_that_occur_have_a_gradient():
    model = injected((9, 5, 7))

    wrt = nnx.DiffState(0, lora.LoRAParam)
    gradient = nnx.jit(nnx.grad(lambda model: (model.words(IDS) ** 2).sum(), argnums=wrt))
    rows = np.asarray(gradient(model)["words"]["trainable_tokens_delta"])
    table = np.asarray(tied().words.embedding)
    np.testing.assert_allclose(rows, 2 * np.array([[1], [3], [0]]) * table[[9, 5, 7]], rtol=1e-6)


def test_rows_are_rounded_to_the_dtype_of_the_weight():
    model = nnx.Dict(words=nnx.Embed(V, D, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
                     mix=nnx.Linear(D, D, rngs=nnx.Rngs(0)))  # fmt: skip
    lora.inject(model, settings(), rngs=nnx.Rngs(1))
    rows = model.words.trainable_tokens_delta
    assert rows.dtype == jnp.float32
    rows.set_value(rows[...] + 1e-3)
    before = np.float32(model.words(IDS))
    np.testing.assert_array_equal(before[1, 1], np.float32(rows[...].astype(jnp.bfloat16)[1]))
    lora.merge(model)
    np.testing.assert_array_equal(np.float32(model.words(IDS)), before)


def test_a_folder_has_the_rows_and_not_the_table(tmp_path):
    model = changed(injected(OF_EACH))
    peft.save(tmp_path, model, settings(OF_EACH))
    adapter = peft.read(tmp_path)
    assert {name: array.shape for name, array in adapter.saved.items()} == {
        "words.token_adapter.trainable_tokens_delta": (2, D),
        "out.token_adapter.trainable_tokens_delta": (3, D),
    }
    assert adapter.config.trainable_token_indices == OF_EACH
    again = tied()
    peft.load(again, tmp_path)
    check(again(IDS), model(IDS))
    name = "words.token_adapter.trainable_tokens_delta"
    _, named = peft_tensors.parse({f"base_model.model.{name}.default": adapter.saved[name]}, "x")
    assert named.keys() == {name}
    adapter.saved.popitem()
    with pytest.raises(errors.UserError, match="trainable_tokens_delta is missing"):
        lora.attach(tied(), adapter)
    with pytest.raises(errors.UserError, match="fully trained modules or tokens"):
        lora.Adapters(tied()).load("a", tmp_path)


@pytest.mark.parametrize("ambient", [True, False])
def test_on_a_mesh_with_explicit_axes(ambient):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    rows, out = (NamedSharding(mesh, spec) for spec in (P("data"), P("data", None, "tensor")))

    def call(model, ids):
        x = model.words(ids, out_sharding=rows)
        return x, model.words.attend(x, out_sharding=out)

    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        model = nnx.Dict(words=tied().words, mix=tied().mix)
        table = model.words.embedding
        table.set_value(jax.device_put(np.asarray(table), NamedSharding(mesh, P("tensor"))))
        lora.inject(model, settings(), rngs=nnx.Rngs(1))
        ids = jax.device_put(IDS, rows)
        found = nnx.jit(call)(changed(model), ids)
        assert jax.typeof(found[1]).sharding.spec == out.spec
        lora.merge(model)
        assert model.words.embedding.sharding.spec == table.sharding.spec
        merged = nnx.jit(call)(model, ids)
    words = changed(injected()).words
    alone = words(IDS), words.attend(words(IDS))
    for each in (found, merged):
        check(jax.tree.map(np.asarray, each), alone)


@pytest.mark.parametrize(
    "tokens, more, found",
    [
        ((16, 3), {}, "words has the tokens 0 to 15, and not 16"),
        ({"out": (99,)}, {}, "out has the tokens 0 to 15, and not 99"),
        (("<s>",), {}, "words has the tokens 0 to 15, and not '<s>'"),
        ({"words": (1,), "ords": (2,)}, {}, "words by two names"),
        ({"nothing": (1,)}, {}, "nothing matches nothing"),
        ({"mix": (1,)}, {"targets": ("out",)}, "mix has a bias"),
        (TOKENS, {"targets": ("words",)}, "words in targets"),
        (TOKENS, {"modules_to_save": ("words",)}, "words in modules_to_save"),
        ({"out": (1,)}, {"targets": "all-linear"}, "out in targets"),
    ],
)
def test_what_cannot_be_trained_by_rows_is_refused(tokens, more, found):
    model = tied()
    with pytest.raises(errors.UserError, match=found):
        lora.inject(model, settings(tokens, **more), rngs=nnx.Rngs(0))
    assert nnx.split(model)[0] == split()[0]


def test_quantized_heads_and_several_embeddings_are_refused():
    model = tied()
    quant.quantize_model(model, "int8", exclude=())
    with pytest.raises(errors.UserError, match="out is quantized"):
        lora.inject(model, settings({"out": (1,)}), rngs=nnx.Rngs(0))
    model.more = nnx.Embed(V, D, rngs=nnx.Rngs(0))
    with pytest.raises(errors.UserError, match=r"(?s)embed_tokens matches.*exist: more, words"):
        lora.inject(model, settings(), rngs=nnx.Rngs(0))


def test_all_linear_leaves_the_embedding_to_its_rows():
    model = injected({"words": TOKENS}, targets="all-linear")
    assert lora.summary(model).count("rank 2") == 2


@pytest.mark.parametrize("tokens", [(5, 5), (-1,), {"words": (2, 2)}])
def test_ids_are_numbers_that_are_listed_once(tokens):
    with pytest.raises(errors.UserError, match="found:    trainable_token_indices"):
        settings(tokens)


def test_a_plan_takes_other_ids_in_place_of_texts():
    config = token_indices.with_any_ids(settings({"words": ("<s>", 0), "out": ("</s>", "<s>")}))
    first, zero, last, again = (i for own in config.trainable_token_indices.values() for i in own)
    assert zero == 0 and first == again and len({first, zero, last}) == 3


def test_linen_models_are_told_what_does_the_same():
    with pytest.raises(errors.UserError, match=r"(?s)words.*modules_to_save"):
        linen.adapt(nn.Embed(V, D), settings({"words": TOKENS}), IDS)
