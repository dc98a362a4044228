"""Training state on disk, so that a run that was stopped at any moment goes on exactly."""

import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax import train


class Snapshots:
    """The checkpoints of one run: A, B, the moments and the step, one folder a step (Orbax).

    A checkpoint appears under its name only when it is whole. The step is also the position in the
    data and the seed of the dropout masks, which are functions of it.
    """

    def __init__(self, folder: pathlib.Path, keep: int):
        # Orbax logs a failed write with its traceback, and raises it as well: once is enough.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        # What a killed run left half written goes, else it would stay for ever.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # to close is to wait for the others, who may have come elsewhere
        try:
            self._manager.close()  # waits for what is being written
        except Exception:
            if kind is None:  # else the first error is the one to tell
                raise

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: train.State) -> None:
        """Copies the state off its devices now and writes it in the background."""
        step = int(state.step)
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state._asdict()))

    def restore(self, like: train.State) -> train.State:
        """The newest state, with the structure and on the devices of `like`."""
        shapes = jax.tree.map(_abstract, like._asdict())
        restored = self._manager.restore(self.latest(), args=ocp.args.StandardRestore(shapes))
        return train.State(**restored)

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        self._manager.wait_until_finished()


def _abstract(array: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
