"""Held-out loss and exact match, with stand-ins for the jitted functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizer

from lora_jax import tokenizer
from lora_jax.data import encoding, packing
from lora_jax.generation import continuation
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


def echo(answers):
    """Stands for generation: each prompt's answer, the examples filled up with −1."""
    asked = []

    def continue_(trained, frozen, ids, mask, key):
        asked.append(ids.shape)
        assert ids.sharding.is_fully_replicated == (len(ids) % 4 != 0)
        ids, mask = np.asarray(ids), np.asarray(mask)
        out = np.full((len(ids), 12), -1, np.int32)
        for row, (prompt, real) in enumerate(zip(ids, mask, strict=True)):
            answer = answers[tuple(prompt[real == 1].tolist())]
            out[row, : len(answer)] = answer
        return jnp.asarray(out)

    return continue_, asked


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 64])
def test_each_prompt_gets_its_own_answer_in_batches_of_one_shape(reader, batch_size):
    prompts = [f"{word} is" for word in ("ab", "a b", "cd", "Tom", "x y z")]
    expected = [f" {word}!" for word in ("one", "two", "three", "four", "five")]
    ids = tokenizer.encode(reader, prompts)
    bodies = reader(expected, add_special_tokens=False).input_ids
    answers = {tuple(p): a[1:] for p, a in zip(ids, bodies, strict=True)}
    continue_, asked = echo(answers)
    pairs = [(np.array(i, np.int32), e) for i, e in zip(ids, expected, strict=True)]
    how = {"key": jax.random.key(0), "mesh": MESH, "batch_size": batch_size}
    found = evaluate.answers(continue_, None, FROZEN, pairs, reader, **how)
    assert [a.prompt for a in found] == prompts
    assert [a.expected for a in found] == expected
    assert [a.text.strip() for a in found] == [e.strip() for e in expected]
    assert evaluate.exact_match(found) == 1.0
    assert len(set(asked)) == 1 and asked[0][0] == min(batch_size, len(prompts))


def test_exact_match_is_the_share_of_equal_answers_apart_from_whitespace():
    found = [
        evaluate.Answer("q", " yes", "yes\n"),
        evaluate.Answer("q", "yes", "Yes"),
        evaluate.Answer("q", "yes", "yes."),
        evaluate.Answer("q", "two words", "two words"),
    ]
    assert evaluate.exact_match(found) == 0.5


def test_texts_keep_their_leading_space_and_end_at_the_padding(reader):
    (prompt,) = tokenizer.encode(reader, ["ab"])
    (whole,) = tokenizer.encode(reader, ["ab cd"])
    for answer, text in ((whole[len(prompt) :], " cd"), ([], "")):
        continue_, _ = echo({tuple(prompt): answer})
        how = {"key": jax.random.key(0), "mesh": MESH}
        found = continuation.continuations(continue_, None, FROZEN, [prompt], reader, **how)
        assert list(found) == [text]


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
