"""Checkpoints of the training state. A resumed run gives the same result as one without a stop."""

import contextlib
import logging
import math
import pathlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from lora_jax import errors
from lora_jax.optim import step as train_step
from lora_jax.parallel import processes
from lora_jax.training import digests

# The parts of a checkpoint.
_STATE = "state"  # A, B, the moments and the step
_SAVED = "saved"  # digests of the state's arrays, and the held-out loss if there is one


class _Saved(TypedDict):
    """What a checkpoint holds besides the arrays of the state."""

    digests: dict[str, int]
    eval_loss: float | None


class Snapshots:
    """The checkpoints of one run: A, B, the moments and the step, one folder a step (Orbax).

    A checkpoint gets its final name only when it is complete. The position in the data and the seed
    of the dropout masks are functions of the step. Each process reads a whole checkpoint; process 0
    decides which one.
    """

    def __init__(self, folder: pathlib.Path, keep: int, *, keep_best: bool = False):
        """Opens or creates `folder`, which keeps the newest `keep` checkpoints.

        keep_best: it also keeps the checkpoint with the lowest held-out loss.
        """
        # Orbax logs the traceback of a failed write, and also raises the exception.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._folder, self._keep_best = folder.resolve(), keep_best  # Orbax reads no path with ..
        self.losses: dict[int, float] = {}  # held-out losses by step, with keep_best
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, self.losses),
            # Removes what a killed run left incomplete.
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # else a damaged file raises here
        )
        handlers = {_STATE: _arrays_of_one_copy(), _SAVED: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        # Reads in this process alone. The manager's restore ends with a barrier, which a process
        # that cannot read would never reach.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(), multiprocessing_options=alone
        )
        for step in self._manager.all_steps() if keep_best else ():
            with contextlib.suppress(Exception):  # damaged: reported when it is restored
                self._note(step, self._saved(step)["eval_loss"])
        agreed = processes.broadcast([*self.losses.items()])
        self.losses.clear()
        self.losses.update((step, loss) for step, loss in agreed)

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # closing waits for the other processes, which may not get here
        try:
            self._manager.close()  # waits for pending writes
        except Exception:
            if kind is None:  # else the first error is the one to report
                raise

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: train_step.State, eval_loss: float | None = None) -> None:
        """Copies the state from its devices now, and writes it in the background."""
        step = int(state.step)
        if step == self.latest():
            return
        self._note(step, eval_loss)
        tree = state._asdict()
        saved = _Saved(digests=_digests(tree), eval_loss=eval_loss)
        parts = {_STATE: ocp.args.PyTreeSave(tree), _SAVED: ocp.args.JsonSave(saved)}
        self._manager.save(step, args=ocp.args.Composite(**parts))

    def restore(self, like: train_step.State) -> tuple[train_step.State, dict[int, str]]:
        """(the newest readable state, {step: problem} of the newer checkpoints).

        The state has the structure and the sharding of `like`, whichever mesh it was saved from.
        Raises: UserError if no checkpoint can be read.
        """
        return self._first(sorted(self._manager.all_steps(), reverse=True), like)

    def best(self, like: train_step.State) -> tuple[train_step.State, dict[int, str]]:
        """As `restore`, for the checkpoints with a held-out loss, from the lowest loss on."""
        return self._first(sorted(self.losses, key=self.losses.__getitem__), like)

    def drop(self, steps: Iterable[int]) -> None:
        """Deletes the checkpoints of `steps`."""
        for step in steps:
            self.losses.pop(step, None)
            self._manager.delete(step)
        self._manager.reload()

    def wait(self) -> None:
        """Waits until everything saved is on disk."""
        self._manager.wait_until_finished()

    def _first(
        self, steps: Sequence[int], like: train_step.State
    ) -> tuple[train_step.State, dict[int, str]]:
        """(the first readable state of `steps`, {step: problem} of the steps before it)."""
        self.wait()
        tree, damaged = like._asdict(), {}
        for step in processes.broadcast(steps):
            problem = None
            try:
                digests = self._saved(step)["digests"]
                read = self._read(step, tree)
            except MemoryError:
                raise
            except Exception as error:
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"
                problem = textwrap.shorten(text, 200, placeholder=" …")
            if found := processes.broadcast(problem):
                damaged[step] = found
                continue
            if problem:
                raise errors.UserError(
                    expected="a checkpoint that every process can read",
                    found=f"step {step}: {problem}",
                    where=str(self._folder),
                    do="check the disk that the processes share, and start all of them again",
                )
            state = jax.tree.map(_put, read, tree)
            found = _digests(state)
            wrong = [name for name in found if digests.get(name) != found[name]]
            if not wrong:
                return train_step.State(**state), damaged
            damaged[step] = f"other values than saved in {len(wrong)} of {len(found)} arrays"
        raise errors.UserError(
            expected="a checkpoint that can be read",
            found=[f"step {step}: {what}" for step, what in damaged.items()],
            where=str(self._folder),
            do="put the files back, or start a new run",
        )

    def _saved(self, step: int) -> "_Saved":
        part = ocp.args.Composite(**{_SAVED: ocp.args.JsonRestore()})
        return self._reader.restore(self._folder / str(step), args=part)[_SAVED]

    def _read(self, step: int, like: Any) -> Any:
        """The arrays of a checkpoint in this host's memory. Raises: anything, if it is damaged."""
        # Orbax reads all arrays at once. When one read fails, the others fail later, each with a
        # traceback on stderr. So this reads one by one first. Orbax also accepts any bytes in a
        # file that holds one value, which is what the digests are for.
        base = {"driver": "file", "path": f"{self._folder / str(step) / _STATE}/"}
        store = {"driver": "ocdbt", "base": base}
        names = [name.decode() for name in tensorstore.KvStore.open(store).result().list().result()]
        if not names:
            raise FileNotFoundError("no arrays in it")
        for name in (name for name in names if name.endswith(".zarray")):
            where = store | {"path": name.removesuffix(".zarray")}
            tensorstore.open({"driver": "zarr", "kvstore": where}).result().read().result()
        empty = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), like)
        part = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(empty)})
        return self._reader.restore(self._folder / str(step), args=part)[_STATE]

    def _note(self, step: int, loss: float | None) -> None:
        if self._keep_best and loss is not None and math.isfinite(loss):
            self.losses[step] = loss


class _NewestAndBest:
    """Orbax's preservation policy: keeps the newest `keep` and the one with the lowest loss."""

    def __init__(self, keep: int, losses: dict[int, float]):
        self._keep, self._losses = keep, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep :]}
        if self._losses:
            kept.add(min(self._losses, key=self._losses.__getitem__))
        for step in steps:
            if step not in kept:
                self._losses.pop(step, None)
        return [step in kept for step in steps]


def _arrays_of_one_copy() -> ocp.PyTreeCheckpointHandler:
    """Writes each array from one of its copies.

    By default Orbax has each device that holds a copy write a part. To cut it, jax compiles a
    program for each part of each array, which takes longer than to write an adapter.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _put(read: Any, like: jax.Array) -> jax.Array:
    read = np.asarray(read, like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: read[index])


def _digests(tree: Any) -> dict[str, int]:
    """{path: digest} of the arrays of `tree`, independent of their sharding."""
    found = jax.tree_util.tree_leaves_with_path(jax.device_get(_digests_of(tree)))
    return {jax.tree_util.keystr(path): int(digest) for path, digest in found}


@jax.jit
def _digests_of(tree: Any) -> Any:
    """One program for all arrays: one for each of them would take longer to compile."""
    return jax.tree.map(digests.of, tree)
