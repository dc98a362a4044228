"""Held-out loss and exact match, with stand-ins for the jitted functions."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizer

from lora_jax import tokenizer
from lora_jax.data import encoding, packing
from lora_jax.lora.nnx import model_state
from lora_jax.parallel import mesh as sharding
from lora_jax.training import evaluate


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return tokenizer.load(tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer")))


def examples(*lengths):
    """Rows of so many tokens, all trained but the first two."""
    made = [
        (np.arange(1, n + 1, dtype=np.int32), np.array([i > 1 for i in range(n)])) for n in lengths
    ]
    return made


def sum_of_labels(trained, frozen, batch):
    """Stands for the loss: Σ labels, and how many there are, as train.loss counts them."""
    shapes.append(batch.input_ids.shape)
    # Dealt out over data × fsdp where that is even, so that no device computes all examples.
    per_device = batch.input_ids.sharding.shard_shape(batch.input_ids.shape)[0]
    assert per_device == len(batch.input_ids) / (4 if len(batch.input_ids) % 4 == 0 else 1)
    kept = batch.labels[:, 1:] != encoding.IGNORED
    total = jnp.where(kept, batch.labels[:, 1:], 0).sum() * 1.0
    return {"eval_loss": total}, jnp.asarray(kept.sum())


FROZEN = model_state.Frozen(None, None)
MESH = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
shapes: list[tuple[int, ...]] = []


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_the_mean_loss_is_over_all_tokens_to_train_on(batch_size):
    shapes.clear()
    held_out = examples(4, 9, 17, 3, 6)
    found = evaluate.means(sum_of_labels, None, FROZEN, packing.alone(held_out), batch_size, MESH)
    tokens = [id_ for ids, trained in held_out for id_ in ids[trained]]
    assert found == {
        "eval_loss": pytest.approx(np.mean(tokens))
    }  # and not the mean of the batches' means
    assert set(shapes) == {(batch_size, 32)}  # one shape: one compilation


def test_answers_are_beside_their_prompts_and_what_was_expected(reader):
    prompts = [f"{word} is" for word in ("ab", "a b", "Tom")]
    ids = tokenizer.encode(reader, prompts)
    pairs = [(np.array(i, np.int32), f" {n}!") for n, i in enumerate(ids)]
    found = evaluate.answers((f"{n}!" for n in range(3)), pairs, reader)
    assert [a.prompt for a in found] == prompts
    assert [(a.expected, a.text) for a in found] == [(f" {n}!", f"{n}!") for n in range(3)]
    assert evaluate.exact_match(found) == 1.0


def test_exact_match_is_the_share_of_equal_answers_apart_from_whitespace():
    found = [
        evaluate.Answer("q", " yes", "yes\n"),
        evaluate.Answer("q", "yes", "Yes"),
        evaluate.Answer("q", "yes", "yes."),
        evaluate.Answer("q", "two words", "two words"),
    ]
    assert evaluate.exact_match(found) == 0.5


def test_agreement_is_the_share_of_equal_tokens_and_the_mean_kl():
    p, q = (
        np.log([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]),
        np.log([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]),
    )
    same, kl = evaluate.agreement([p[:1], p[1:]], [q[:1], q[1:]])
    assert same == 0.5
    assert kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
    assert evaluate.agreement([p], [p]) == (1.0, 0.0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_agreement_with_what_is_not_finite_is_nan(wrong):
    p = np.log([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    q = p.copy()
    q[1, 2] = wrong
    for expected, found in ((p, q), (q, p), (q, q)):
        assert np.isnan(evaluate.agreement([expected], [found])).all()
