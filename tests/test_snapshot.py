"""Checkpoints: what is saved comes back bit by bit, where it was, whole or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import sharding, snapshot, train

PATH = ("model", "layers", "self_attn", "q_proj")


def state_at(step, mesh, seed=0):
    """A state with the paths of a real one, sharded as a real one."""
    key_a, key_b = jax.random.split(jax.random.key(seed))
    lora = {
        "lora_A": jax.random.normal(key_a, (2, 16, 4)),
        "lora_B": jax.random.normal(key_b, (2, 4, 16)),
    }
    for name in reversed(PATH):
        lora = {name: lora}
    state = train.start(lora, optax.adamw(1e-3))
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


def test_a_state_comes_back_bit_by_bit_and_where_it_was(tmp_path, mesh):
    saved = state_at(7, mesh, seed=3)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        assert snapshots.latest() is None
        snapshots.save(saved)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        assert snapshots.latest() == 7
        restored, _ = snapshots.restore(state_at(0, mesh))
    equal(restored, saved)
    q_proj = restored.lora["model"]["layers"]["self_attn"]["q_proj"]
    assert "tensor" in str(q_proj["lora_B"].sharding.spec)


def test_another_mesh_takes_it_as_well(tmp_path, mesh):
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
        snapshots.save(state_at(6, mesh, seed=1))  # there already: nothing happens
    assert {path.name for path in tmp_path.iterdir()} == {"4", "6"}
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        equal(snapshots.restore(state_at(0, mesh))[0], state_at(6, mesh, seed=6))


def test_what_is_saved_is_the_state_at_that_moment(tmp_path, mesh):
    # The next step takes over the state's memory while the checkpoint is still being written.
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        state = state_at(5, mesh, seed=5)
        snapshots.save(state)
        spoiled = spoil(state)
        for _ in range(20):
            spoiled = spoil(spoiled)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        equal(snapshots.restore(state_at(0, mesh))[0], state_at(5, mesh, seed=5))


def test_a_half_written_checkpoint_does_not_count(tmp_path, mesh):
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        snapshots.save(state_at(2, mesh, seed=2))
    half = tmp_path / "4.orbax-checkpoint-tmp"
    (half / "default").mkdir(parents=True)
    with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
        assert snapshots.latest() == 2
        equal(snapshots.restore(state_at(0, mesh))[0], state_at(2, mesh, seed=2))
        snapshots.save(state_at(4, mesh, seed=4))
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}


def test_the_first_error_is_the_one_that_is_told(tmp_path, mesh, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="the first"):
        with snapshot.Snapshots(tmp_path, keep=2) as snapshots:
            monkeypatch.setattr(snapshots._manager, "close", full)
            raise ValueError("the first")
    with pytest.raises(OSError, match="No space left"):
        with snapshot.Snapshots(tmp_path / "b", keep=2) as snapshots:
            monkeypatch.setattr(snapshots._manager, "close", full)
