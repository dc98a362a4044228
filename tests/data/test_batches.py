"""Batches: which rows a step shows, and rows packed side by side that do not see each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_models
import test_step
from flax import nnx

from lora_jax.data import batches
from lora_jax.lora.nnx import model_state
from lora_jax.optim import loss as train_loss


def numbered(count):
    rows = [(np.full(2 + i % 5, i, np.int32), np.arange(2 + i % 5) > 0) for i in range(count)]
    return batches.alone(rows)


def of(lines, *, seed, seq_len, **how):
    """Batches of shuffled lines."""
    length = min(seq_len, batches.longest(lines))
    return batches.Batches(batches.Shuffled(lines, seed), length=length, **how)


def test_batches_have_labels_and_masks():
    made = of(numbered(20), batch_size=3, grad_accum=2, seed=0, seq_len=512)
    batch = made.batch(0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), ((2, 3, 16), np.dtype(np.int32))
    )
    flat = (batch[name].reshape(6, 16) for name in ("input_ids", "labels", "attention_mask"))
    for ids, labels, mask in zip(*flat, strict=True):
        row, length = ids[0], mask.sum()
        assert length == 2 + row % 5
        assert mask.tolist() == [1] * length + [0] * (16 - length)
        assert ids.tolist() == [row] * length + [0] * (16 - length)
        assert labels.tolist() == [-100] + [row] * (length - 1) + [-100] * (16 - length)


def test_the_static_length():
    def length(longest, seq_len):
        lines = batches.alone([(np.ones(longest, np.int32), np.ones(longest, bool))])
        return of(lines, batch_size=1, grad_accum=1, seed=0, seq_len=seq_len).length

    assert [length(1, 512), length(16, 512), length(17, 512)] == [16, 16, 32]
    assert length(100, 100) == 100


def order(made, steps):
    return [i for step in steps for i in made.batch(step)["input_ids"][..., 0].ravel().tolist()]


def test_every_epoch_is_another_permutation_of_all_rows():
    made = of(numbered(10), batch_size=2, grad_accum=2, seed=5, seq_len=64)
    shown = order(made, range(made.num_steps(4)))
    assert made.num_steps(4) == 10
    epochs = [tuple(shown[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_what_each_process_makes_is_its_rows_of_the_same_batch(processes):
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
    # More rows in a batch than in the data: rows repeat, none is lost.
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
    """Rows of 4 to 250 tokens, most of them short; a row's tokens are its number."""
    lengths = np.minimum(np.random.default_rng(seed).geometric(0.02, count) + 3, 250)
    return batches.alone([(np.full(n, i, np.int32), np.ones(n, bool))
                          for i, n in enumerate(lengths)])  # fmt: skip


def test_by_length_a_run_shows_the_same_rows_in_few_shapes():
    plain = of(uneven(300), batch_size=4, grad_accum=2, seed=3, seq_len=256)
    steps = plain.num_steps(2)
    made = batches.ByLength(plain, steps, 3)
    shown = {name: [b.batch(step)["input_ids"] for step in range(steps)]
             for name, b in (("plain", plain), ("grouped", made))}  # fmt: skip
    rows = {name: sorted(np.concatenate([ids[..., 0].ravel() for ids in each]).tolist())
            for name, each in shown.items()}  # fmt: skip
    assert rows["grouped"] == rows["plain"]  # also in the last window, which is shorter
    lengths = {ids.shape[-1] for ids in shown["grouped"]}
    assert 4 <= len(lengths) <= 8 and sorted(lengths) == made.used
    assert [ids.shape for ids in shown["grouped"]] == [made.shape(step) for step in range(steps)]
    assert made.filled > 0.75 > 2 * batches.filled(uneven(300), 256)
    real = sum((b["attention_mask"] != 0).sum() for b in map(made.batch, range(steps)))
    assert made.filled == real / sum(ids.size for ids in shown["grouped"])
    sizes = [ids.shape[-1] for ids in shown["grouped"][: made.WINDOW]]
    assert sizes != sorted(sizes)  # the steps' order is not that of their lengths


def test_by_length_a_step_is_the_same_after_a_restart_and_split_otherwise():
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


# ------------------------------------------------------------------------- packing


def of_lengths(*lengths):
    return [(np.full(n, i, np.int32), np.ones(n, bool)) for i, n in enumerate(lengths)]


def test_lines_hold_every_row_once_and_whole():
    rng = np.random.default_rng(0)
    rows = of_lengths(*np.minimum(rng.geometric(0.01, 2000), 256), 256, 1)
    lines = batches.pack(rows, 256)
    assert sorted(int(ids[0]) for line in lines for ids, _ in line) == list(range(len(rows)))
    assert all(ids is rows[ids[0]][0] for line in lines for ids, _ in line)
    assert max(sum(len(ids) for ids, _ in line) for line in lines) == 256
    fewest = -(-sum(len(ids) for ids, _ in rows) // 256)
    assert fewest <= len(lines) <= 1.02 * fewest
    assert batches.pack(rows, 256) == lines  # a resumed run has the same


def test_a_row_goes_where_it_leaves_least_room():
    lines = batches.pack(of_lengths(3, 6, 7, 4, 1), 10)
    assert [[int(ids[0]) for ids, _ in line] for line in lines] == [[2, 0], [1, 3], [4]]


def test_packed_rows_are_numbered_and_begin_untrained():
    made = of(batches.pack(of_lengths(5, 4, 3), 12), batch_size=1, grad_accum=1, seed=0, seq_len=12)
    batch = {name: array[0, 0].tolist() for name, array in made.batch(0).items()}
    assert batch["input_ids"] == [0] * 5 + [1] * 4 + [2] * 3
    assert batch["attention_mask"] == [1] * 5 + [2] * 4 + [3] * 3
    assert batch["labels"] == [-100, 0, 0, 0, 0, -100, 1, 1, 1, -100, 2, 2]


@pytest.mark.parametrize("name", ["llama", "qwen2_window", "llama_tied_hd16"])
def test_packed_rows_have_the_logits_of_hugging_face(name):
    """Each as if alone, with padding behind the last, and one with padding within."""
    prompts = test_models.prompts(name)
    ids = np.concatenate([*(ids for ids, _ in prompts), np.zeros(3, np.int32)])
    mask = np.concatenate(
        [*(np.full(len(ids), n) for n, (ids, _) in enumerate(prompts, 1)), np.zeros(3, np.int32)]
    )
    if name != "qwen2_window":  # whose windows count what stands between
        ids, mask = (np.insert(array, 4, [fill, fill]) for array, fill in ((ids, 9), (mask, 0)))
    found = test_models.logits_of(name, ids[None], mask[None])[0]
    for number, (_, expected) in enumerate(prompts, 1):
        own = found[mask == number]
        np.testing.assert_allclose(own, expected, atol=test_models.TOLERANCE, rtol=0)


def test_a_packed_line_has_the_loss_and_gradient_of_its_rows():
    rng = np.random.default_rng(1)
    rows = [(rng.integers(3, test_step.VOCAB, n).astype(np.int32), rng.random(n) < 0.7)
            for n in (9, 17, 30, 4)]  # fmt: skip
    graphdef, trained, frozen = model_state.split(test_step.make_model(quantization="int4"))

    @jax.jit
    def of(trained, batch):
        def sums(trained):
            model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
            each = train_loss.losses(model, batch, remat="full")
            return each.sum(), (each, train_loss.loss(model, batch)[1])

        return jax.value_and_grad(sums, has_aux=True)(trained)

    def on_lines(lines, length):
        return of(
            trained, train_loss.Batch(**jax.tree.map(jnp.asarray, batches.pad(lines, length)))
        )

    (packed, (each, count)), gradient = on_lines([rows], 64)
    (alone, (own, same)), expected = on_lines(batches.alone(rows), 32)
    assert count == same > 20
    np.testing.assert_allclose(packed, alone, rtol=1e-6)
    np.testing.assert_allclose(each[0, 9 : 9 + 17], own[1, :17], atol=1e-5)  # the second row's
    for found, wanted in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
