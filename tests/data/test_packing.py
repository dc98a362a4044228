"""Packing: whole examples in few sequences, whose attention stays within an example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_models
import test_step
from flax import nnx

from lora_jax.data import batches, packing
from lora_jax.lora.nnx import model_state
from lora_jax.optim import loss as train_loss


def of_lengths(*lengths):
    return [(np.full(n, i, np.int32), np.ones(n, bool)) for i, n in enumerate(lengths)]


def test_sequences_hold_every_example_once_and_whole():
    rng = np.random.default_rng(0)
    examples = of_lengths(*np.minimum(rng.geometric(0.01, 2000), 256), 256, 1)
    sequences = packing.pack(examples, 256)
    assert sorted(int(ids[0]) for sequence in sequences for ids, _ in sequence) == list(
        range(len(examples))
    )
    assert all(ids is examples[ids[0]][0] for sequence in sequences for ids, _ in sequence)
    assert max(sum(len(ids) for ids, _ in sequence) for sequence in sequences) == 256
    fewest = -(-sum(len(ids) for ids, _ in examples) // 256)
    assert fewest <= len(sequences) <= 1.02 * fewest
    assert packing.pack(examples, 256) == sequences  # a resumed run has the same


def test_an_example_goes_where_it_leaves_the_least_room():
    sequences = packing.pack(of_lengths(3, 6, 7, 4, 1), 10)
    assert [[int(ids[0]) for ids, _ in sequence] for sequence in sequences] == [[2, 0], [1, 3], [4]]


def test_packed_examples_are_numbered_and_their_first_tokens_are_not_trained():
    padded = batches.pad(packing.pack(of_lengths(5, 4, 3), 12), 12)
    batch = {name: array[0].tolist() for name, array in padded.items()}
    assert batch["input_ids"] == [0] * 5 + [1] * 4 + [2] * 3
    assert batch["attention_mask"] == [1] * 5 + [2] * 4 + [3] * 3
    assert batch["labels"] == [-100, 0, 0, 0, 0, -100, 1, 1, 1, -100, 2, 2]


@pytest.mark.parametrize("name", ["llama", "qwen2_window", "llama_tied_hd16"])
def test_packed_examples_have_the_logits_of_hugging_face(name):
    """Each as if alone; with padding after the last example and within one."""
    prompts = test_models.prompts(name)
    ids = np.concatenate([*(ids for ids, _ in prompts), np.zeros(3, np.int32)])
    mask = np.concatenate(
        [*(np.full(len(ids), n) for n, (ids, _) in enumerate(prompts, 1)), np.zeros(3, np.int32)]
    )
    if name != "qwen2_window":  # whose windows count the padding in between
        ids, mask = (np.insert(array, 4, [fill, fill]) for array, fill in ((ids, 9), (mask, 0)))
    found = test_models.logits_of(name, ids[None], mask[None])[0]
    for number, (_, expected) in enumerate(prompts, 1):
        own = found[mask == number]
        np.testing.assert_allclose(own, expected, atol=test_models.TOLERANCE, rtol=0)


def test_a_packed_sequence_has_the_loss_and_gradient_of_its_examples():
    rng = np.random.default_rng(1)
    examples = [(rng.integers(3, test_step.VOCAB, n).astype(np.int32), rng.random(n) < 0.7)
                for n in (9, 17, 30, 4)]  # fmt: skip
    graphdef, trained, frozen = model_state.split(test_step.make_model(quantization="int4"))

    @jax.jit
    def of(trained, batch):
        def sums(trained):
            model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
            each = train_loss.losses(model, batch, remat="full")
            return each.sum(), (each, train_loss.objective(None)(each, None, batch).count)

        return jax.value_and_grad(sums, has_aux=True)(trained)

    def of_sequences(sequences, length):
        return of(
            trained, train_loss.Batch(**jax.tree.map(jnp.asarray, batches.pad(sequences, length)))
        )

    (packed, (each, count)), gradient = of_sequences([examples], 64)
    (alone, (own, same)), expected = of_sequences(packing.alone(examples), 32)
    assert count == same > 20
    np.testing.assert_allclose(packed, alone, rtol=1e-6)
    np.testing.assert_allclose(each[0, 9 : 9 + 17], own[1, :17], atol=1e-5)  # the second example's
    for found, wanted in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
