"""Checkpoints are restored exactly and with their sharding, or reported as damaged."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import errors
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding
from lora_jax.training import digests
from lora_jax.training.output import snapshots as snapshot

PATH = ("model", "layers", "self_attn", "q_proj")


def state_at(step, mesh, seed=0, size=16):
    """A state with the paths and the sharding of a real one."""
    key_a, key_b = jax.random.split(jax.random.key(seed))
    lora = {
        "lora_A": jax.random.normal(key_a, (2, size, 4 if size < 32 else size)),
        "lora_B": jax.random.normal(key_b, (2, 4 if size < 32 else size, size)),
    }
    for name in reversed(PATH):
        lora = {name: lora}
    state = train_step.start(lora, optax.adamw(1e-3))
    moments = jax.tree.map(lambda m: m + seed + 1 if m.ndim else m, state.opt_state)
    return sharding.place(state._replace(opt_state=moments, step=jnp.int32(step)), mesh)


def equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_a_state_is_restored_exactly_with_its_sharding(tmp_path, mesh):
    saved = state_at(7, mesh, seed=3)
    tmp_path = tmp_path / "a b #1%20?" / ".." / "a b #1%20?"  # as people name folders
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        assert snapshots.latest() is None
        snapshots.save(saved)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        assert snapshots.latest() == 7
        restored, _ = snapshots.restore(state_at(0, mesh))
    equal(restored, saved)
    q_proj = restored.lora["model"]["layers"]["self_attn"]["q_proj"]
    assert "tensor" in str(q_proj["lora_B"].sharding.spec)


def test_a_state_is_restored_on_another_mesh(tmp_path, mesh):
    saved = state_at(7, mesh, seed=3)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        snapshots.save(saved)
        snapshots.wait()
        like = state_at(0, sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1}))
        restored, _ = snapshots.restore(like)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_newest_are_kept(tmp_path, mesh):
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        for step in (2, 4, 6):
            snapshots.save(state_at(step, mesh, seed=step))
        snapshots.save(state_at(6, mesh, seed=1))  # exists already: not saved again
    assert {path.name for path in tmp_path.iterdir()} == {"4", "6"}
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        equal(snapshots.restore(state_at(0, mesh))[0], state_at(6, mesh, seed=6))


def test_the_saved_state_is_the_one_at_the_call(tmp_path, mesh):
    # The next step reuses the memory of the state while the checkpoint is still being written.
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        state = state_at(5, mesh, seed=5)
        snapshots.save(state)
        spoiled = spoil(state)
        for _ in range(20):
            spoiled = spoil(spoiled)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        equal(snapshots.restore(state_at(0, mesh))[0], state_at(5, mesh, seed=5))


def test_an_incomplete_checkpoint_is_ignored(tmp_path, mesh):
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        snapshots.save(state_at(2, mesh, seed=2))
    half = tmp_path / "4.orbax-checkpoint-tmp"
    (half / "default").mkdir(parents=True)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        assert snapshots.latest() == 2
        equal(snapshots.restore(state_at(0, mesh))[0], state_at(2, mesh, seed=2))
        snapshots.save(state_at(4, mesh, seed=4))
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}


def test_the_first_error_is_the_one_that_is_raised(tmp_path, mesh, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="the first"):
        with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
            monkeypatch.setattr(snapshots._manager, "close", full)
            raise ValueError("the first")
    with pytest.raises(OSError, match="No space left"):
        with snapshot.Snapshots(tmp_path / "b", keep=2) as snapshots:
            monkeypatch.setattr(snapshots._manager, "close", full)


# ------------------------------------------------------------------------- damage


def truncated(folder):
    path = max((folder / "state").glob("**/d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(folder):
    """Flips one bit of a value, which Orbax 0.12.8 does not notice."""
    path = max((folder / "state").glob("**/d/*"), key=lambda path: path.stat().st_size)
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


DAMAGE = {
    "truncated": truncated,
    "a flipped bit": flipped,
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "no manifest": lambda folder: (folder / "state/manifest.ocdbt").unlink(),
    "no names": lambda folder: (folder / "state/_METADATA").unlink(),
    "no digests": lambda folder: (folder / "saved/metadata").write_text('{"digests": '),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


def save(tmp_path, mesh, *steps):
    with snapshot.Snapshots(tmp_path, keep=3) as snapshots:
        for step in steps:
            snapshots.save(state_at(step, mesh, seed=step, size=64))


@pytest.mark.parametrize(
    "damage",
    [pytest.param(damage, id=name, marks=[pytest.mark.long] * name.startswith("no "))
     for name, damage in DAMAGE.items()],
)  # fmt: skip
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_restored(
    tmp_path, mesh, damage, capfd
):
    save(tmp_path, mesh, 2, 4)
    damage(tmp_path / "4")
    like = state_at(0, mesh, size=64)
    with snapshot.Snapshots(tmp_path, keep=3) as snapshots:
        restored, damaged = snapshots.restore(like)
        equal(restored, state_at(2, mesh, seed=2, size=64))
        assert list(damaged) == [4] and len(damaged[4]) > 20
        assert (tmp_path / "4").exists()
        snapshots.drop(damaged)
        assert snapshots.latest() == 2 and not (tmp_path / "4").exists()
        snapshots.save(state_at(4, mesh, seed=5, size=64))
        snapshots.wait()
        restored, damaged = snapshots.restore(like)
        equal(restored, state_at(4, mesh, seed=5, size=64))
        assert not damaged
    assert "Traceback" not in capfd.readouterr().err


def test_if_no_checkpoint_is_readable_all_are_reported_and_kept(tmp_path, mesh):
    save(tmp_path, mesh, 2, 4)
    flipped(tmp_path / "4")
    truncated(tmp_path / "2")
    with snapshot.Snapshots(tmp_path, keep=3) as snapshots:
        with pytest.raises(errors.UserError, match=r"(?s)step 4: other values.*step 2: "):
            snapshots.restore(state_at(0, mesh, size=64))
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}


def test_the_digest_depends_on_every_bit_and_not_on_the_sharding(mesh):
    state = state_at(3, mesh, seed=3)
    found = snapshot._digests(state)
    other = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    assert snapshot._digests(state_at(3, other, seed=3)) == found
    values = np.asarray(jax.tree.leaves(state.lora)[0])
    for bit in (0, 31):
        for position in (0, values.size - 1):
            words = values.copy().view(np.uint32)
            words.reshape(-1)[position] ^= np.uint32(1 << bit)
            assert digests.of(words.view(np.float32)) != digests.of(values)
    swapped = values.copy()
    swapped[0], swapped[1] = values[1], values[0]
    assert digests.of(swapped) != digests.of(values)
    for dtype in ("bfloat16", "int32", "float16"):
        ones = jnp.ones((3, 5), dtype)
        assert digests.of(ones) != digests.of(ones.at[2, 1].set(2))


# ------------------------------------------------------------------------- the best one


def test_the_best_and_the_newest_checkpoints_are_kept(tmp_path, mesh):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: None, 10: float("nan"), 12: 1.5}
    like = state_at(0, mesh)
    with snapshot.Snapshots(tmp_path, keep=1, keep_best=True) as snapshots:
        for step, loss in losses.items():
            snapshots.save(state_at(step, mesh, seed=step), loss)
        equal(snapshots.best(like)[0], state_at(4, mesh, seed=4))
    assert {path.name for path in tmp_path.iterdir()} == {"4", "12"}
    with snapshot.Snapshots(tmp_path, keep=1, keep_best=True) as snapshots:
        assert snapshots.latest() == 12 and snapshots.losses == {4: 1.0, 12: 1.5}
        equal(snapshots.restore(like)[0], state_at(12, mesh, seed=12))
        snapshots.save(state_at(14, mesh, seed=14), 0.5)
        equal(snapshots.best(like)[0], state_at(14, mesh, seed=14))
    assert {path.name for path in tmp_path.iterdir()} == {"14"}


def test_a_damaged_best_checkpoint_is_reported_and_the_next_best_is_restored(tmp_path, mesh):
    with snapshot.Snapshots(tmp_path, keep=2, keep_best=True) as snapshots:
        for step, loss in ((2, 1.0), (4, 3.0), (6, 2.0)):
            snapshots.save(state_at(step, mesh, seed=step, size=64), loss)
        snapshots.wait()
        truncated(tmp_path / "2")
        best, damaged = snapshots.best(state_at(0, mesh, size=64))
    equal(best, state_at(6, mesh, seed=6, size=64))
    assert list(damaged) == [2]
