"""Flax modules that change the weights of the layer in them, before each call of it."""

from collections.abc import Collection

from flax import nnx

from lora_jax import errors

_SCALING = (nnx.WeightNorm, nnx.SpectralNorm)


def refuse(model: nnx.Module, paths: Collection[tuple[str | int, ...]]) -> None:
    """Raises: UserError if a module at one of `paths`, which is to be adapted, is in a wrapper.

    The wrapper scales the weight without the adapter. After a merge it scales their sum.
    """
    found = [
        f"{'.'.join(map(str, path))} is in a {type(node).__name__}, which scales its weight"
        for outer, node in nnx.iter_graph(model) if isinstance(node, _SCALING)
        for path in paths if path[: len(outer)] == outer and path != outer
    ]  # fmt: skip
    if found:
        raise errors.UserError(
            expected="layers whose weights are used as they are, so that merging changes nothing",
            found=found,
            do="leave these layers out of the targets and modules_to_save, or put the norm into "
            "the weight first",
        )
