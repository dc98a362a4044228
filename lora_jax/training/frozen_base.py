"""Whether a run has left the base model as it was."""

import jax
from jax.sharding import Mesh

from lora_jax import errors
from lora_jax.console import say
from lora_jax.lora.nnx import model_state
from lora_jax.parallel import mesh as sharding
from lora_jax.training import digests
from lora_jax.training.output import run_folder


class FrozenBase:
    """What the frozen arrays were like before the first step that this process trains."""

    def __init__(
        self,
        frozen: model_state.Frozen,
        mesh: Mesh,
        folder: run_folder.RunFolder,
        record: run_folder.Record,
    ):
        """record: gets the result. Raises: UserError if the base changed in an earlier part."""
        self._folder, self._record, self._mesh = folder, record, mesh
        self._refuse(record.checks.pop("changed_base", []))
        tree = {"base": frozen.base, "reference": frozen.reference}
        found = jax.tree_util.tree_leaves_with_path(tree)
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found]
        self._arrays = [array for _, array in found]
        self._before = digests.of_parts(self._arrays, mesh)

    def check(self) -> None:
        """Says that nothing has changed. All processes must call this.

        Raises: UserError that names the arrays that have changed, on any device.
        """
        own = (digests.of_parts(self._arrays, self._mesh) != self._before).any(0)
        changed = sharding.gather(own[None]).any(0)
        self._refuse([name for name, differs in zip(self._names, changed, strict=True) if differs])
        self._record.checks["changed_base"] = []
        say("check", "the base is unchanged")

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            self._record.checks["changed_base"] = changed
            raise errors.UserError(
                expected="a base model that training does not change",
                found=[f"{name} has changed" for name in changed],
                where=str(self._folder.path),
                do="do not use what this run has trained: its base was damaged; start a new run, "
                "on another device if it happens again, and report it",
            )
