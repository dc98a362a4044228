"""Batches: which sequences a step shows, in arrays of few shapes."""

import numpy as np
import pytest

from lora_jax.data import batches, packing


def numbered(count):
    examples = [(np.full(2 + i % 5, i, np.int32), np.arange(2 + i % 5) > 0) for i in range(count)]
    return packing.alone(examples)


def of(sequences, *, seed, seq_len, **how):
    """Batches of shuffled sequences."""
    length = min(seq_len, packing.longest(sequences))
    return batches.Batches(batches.Shuffled(sequences, seed), length=length, **how)


def test_batches_have_labels_and_masks():
    made = of(numbered(20), batch_size=3, grad_accum=2, seed=0, seq_len=512)
    batch = made.batch(0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), ((2, 3, 16), np.dtype(np.int32))
    )
    flat = (batch[name].reshape(6, 16) for name in ("input_ids", "labels", "attention_mask"))
    for ids, labels, mask in zip(*flat, strict=True):
        number, length = ids[0], mask.sum()
        assert length == 2 + number % 5
        assert mask.tolist() == [1] * length + [0] * (16 - length)
        assert ids.tolist() == [number] * length + [0] * (16 - length)
        assert labels.tolist() == [-100] + [number] * (length - 1) + [-100] * (16 - length)


def test_the_static_length():
    def length(longest, seq_len):
        sequences = packing.alone([(np.ones(longest, np.int32), np.ones(longest, bool))])
        return of(sequences, batch_size=1, grad_accum=1, seed=0, seq_len=seq_len).length

    assert [length(1, 512), length(16, 512), length(17, 512)] == [16, 16, 32]
    assert length(100, 100) == 100


def order(made, steps):
    return [i for step in steps for i in made.batch(step)["input_ids"][..., 0].ravel().tolist()]


def test_every_epoch_is_another_permutation_of_all_examples():
    made = of(numbered(10), batch_size=2, grad_accum=2, seed=5, seq_len=64)
    shown = order(made, range(made.num_steps(4)))
    assert made.num_steps(4) == 10
    epochs = [tuple(shown[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_process_makes_its_part_of_the_same_batch(processes):
    made = of(numbered(10), batch_size=8, grad_accum=3, seed=5, seq_len=64)
    share = 8 // processes
    for step in (0, 3):
        whole = made.batch(step)
        parts = [made.batch(step, slice(first, first + share)) for first in range(0, 8, share)]
        for name, array in whole.items():
            assert array.shape == made.shape(step) and parts[0][name].shape == (3, share, 16)
            joined = np.concatenate([part[name] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, array)


def test_num_steps_rounds_up():
    made = of(numbered(10), batch_size=2, grad_accum=2, seed=5, seq_len=64)
    assert [made.num_steps(epochs) for epochs in (1, 2, 0.5, 0.1)] == [3, 5, 2, 1]
    # More sequences in a batch than in the data: examples repeat, none is lost.
    large = of(numbered(3), batch_size=8, grad_accum=1, seed=5, seq_len=64)
    assert sorted(order(large, [0])[:6]) == [0, 0, 1, 1, 2, 2]


def test_a_step_is_the_same_after_a_restart_and_in_any_order():
    def fresh(seed):
        return of(numbered(10), batch_size=3, grad_accum=1, seed=seed, seq_len=64)

    straight = [fresh(1).batch(step) for step in range(8)]
    resumed = fresh(1)
    for step in (7, 3, 5):
        for name, array in resumed.batch(step).items():
            np.testing.assert_array_equal(array, straight[step][name])
    assert order(fresh(1), range(4)) != order(fresh(2), range(4))


def test_the_order_is_pinned():
    # A change of this order would silently change every resumed run.
    made = of(numbered(10), batch_size=10, grad_accum=1, seed=0, seq_len=64)
    assert order(made, [0]) == np.random.default_rng([0, 0]).permutation(10).tolist()
    assert order(made, [1]) == np.random.default_rng([0, 1]).permutation(10).tolist()


# ------------------------------------------------------------------------- by length


def uneven(count, seed=0):
    """Examples of 4 to 250 tokens, most of them short; the tokens are the example's number."""
    lengths = np.minimum(np.random.default_rng(seed).geometric(0.02, count) + 3, 250)
    return packing.alone([(np.full(n, i, np.int32), np.ones(n, bool))
                          for i, n in enumerate(lengths)])  # fmt: skip


def test_by_length_a_run_shows_the_same_examples_in_few_shapes():
    plain = of(uneven(300), batch_size=4, grad_accum=2, seed=3, seq_len=256)
    steps = plain.num_steps(2)
    made = batches.ByLength(plain, steps, 3)
    shown = {name: [b.batch(step)["input_ids"] for step in range(steps)]
             for name, b in (("plain", plain), ("grouped", made))}  # fmt: skip
    numbers = {name: sorted(np.concatenate([ids[..., 0].ravel() for ids in each]).tolist())
            for name, each in shown.items()}  # fmt: skip
    assert numbers["grouped"] == numbers["plain"]  # also in the last window, which is shorter
    lengths = {ids.shape[-1] for ids in shown["grouped"]}
    assert 4 <= len(lengths) <= 8 and sorted(lengths) == made.used
    assert [ids.shape for ids in shown["grouped"]] == [made.shape(step) for step in range(steps)]
    assert made.filled > 0.75 > 2 * packing.filled(uneven(300), 256)
    real = sum((b["attention_mask"] != 0).sum() for b in map(made.batch, range(steps)))
    assert made.filled == real / sum(ids.size for ids in shown["grouped"])
    sizes = [ids.shape[-1] for ids in shown["grouped"][: made.WINDOW]]
    assert sizes != sorted(sizes)  # the order of the steps is not that of their lengths


def test_by_length_a_step_is_the_same_after_a_restart_and_for_another_split():
    def fresh(batch_size, grad_accum):
        how = {"batch_size": batch_size, "grad_accum": grad_accum, "seed": 1, "seq_len": 256}
        return batches.ByLength(of(uneven(100), **how), 40, 1)

    made, other = fresh(4, 2), fresh(8, 1)
    for step in (39, 0, 33):
        again = fresh(4, 2).batch(step)
        for name, array in made.batch(step).items():
            np.testing.assert_array_equal(array, again[name])
            np.testing.assert_array_equal(array.reshape(1, 8, -1), other.batch(step)[name])
            np.testing.assert_array_equal(array[:, 1:3], made.batch(step, slice(1, 3))[name])
