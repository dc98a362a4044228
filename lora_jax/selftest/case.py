"""A kernel at one set of shapes, compared with the same operation by XLA in float32."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_jax.kernels import partitioning

Arrays = dict[str, jax.Array]


class Case(NamedTuple):
    """An operation and its reference, both (weights, inputs, number) → {name: array}.

    The arrays of both have the same shapes; only some rows need be in them. number: of the call, by
    which a stack's layers take turns, beginning with the last. kernel: one of choice.KERNELS, or
    choice.XLA. operation, shapes: as a reader sees them; together they name the case. inputs: makes
    the inputs. flops, num_bytes: of `compute`, at the least.
    """

    kernel: str
    operation: str
    shapes: str
    weights: Any
    inputs: Callable[[], Any]
    compute: Callable[[Any, Any, Any], Arrays]
    reference: Callable[[Any, Any, Any], Arrays]
    flops: float
    num_bytes: float

    @property
    def name(self) -> str:
        return f"{self.operation} by {self.kernel}: {self.shapes}"


def bytes_of(weights: Any, layer: int | None) -> int:
    """Of packed weights, or of a layer of stacks."""
    arrays = jax.tree.leaves(weights)
    return sum(a.nbytes if layer is None else a.nbytes // len(a) for a in arrays)


def of_soft_cap(soft_cap: float | None) -> str:
    """The soft cap of logits, as part of a case's shapes."""
    return "" if soft_cap is None else f", soft cap {soft_cap:g}"


def of_mesh(partition: partitioning.Partition) -> str:
    """How the ambient mesh splits an operation, as part of a case's shapes."""
    axes = {axis: size for axis, size in partitioning.open_axes().items() if size > 1}
    if partition == partitioning.WHOLE or not axes:
        return ""
    rows, *_ = partition.computed(0)
    split = {"rows": "·".join(rows), **dict(zip(("K", "N"), partition.stored(), strict=True))}
    return (
        ", on "
        + " × ".join(f"{axis}={size}" for axis, size in axes.items())
        + "".join(f", {name} over {axis}" for name, axis in split.items() if axis)
    )


class Distance(NamedTuple):
    """How far an array is from its reference: relative to all of it, in its worst row (the last
    axis) relative to that row, and in its worst element relative to its row's RMS."""

    whole: Float[Array, ""] | float
    row: Float[Array, ""] | float
    element: Float[Array, ""] | float


# The first is what the tests of the kernels allow for bfloat16, to which some devices round the
# operands of products of float32. A missing tile of 128 of 4,096 summands makes 0.18 in its rows.
LIMITS = Distance(whole=2e-2, row=8e-2, element=0.5)
# Of the RMS of all rows: a row that is smaller is compared with that. A query that sees almost one
# key alone has hardly a gradient, and rounding the output of attention to bfloat16, as all kernels
# do, makes errors of 0.01 of the RMS there.
_FLOOR = 0.5
# A stack's last and first layer; and a kernel that leaves something behind is wrong in the second.
_CALLS = 2


# XLA's O0 (https://openxla.org/xla/effort_levels), as jax 0.9 and 0.12 both take it: a case runs
# twice. For a TPU, XLA's usual effort takes three to five times as long.
_LITTLE_EFFORT = {"optimization_level": 9}


class Finding(NamedTuple):
    """What became of a case. problem: None if the kernel is right; else what is wrong."""

    kernel: str
    name: str
    problem: str | None = None
    distance: Distance | None = None
    failed_to_run: bool = False


def start(case: Case) -> jax.stages.Lowered:
    """The program that `finish` runs, not compiled."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(functools.partial(_measure, case)).lower(case.weights, number)


def compiled(program: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program of `start`, for few runs: XLA does not look for the fastest form of it.

    The job's program may schedule the instructions of the same kernel in another order.
    """
    return program.compile(compiler_options=_LITTLE_EFFORT)


def finish(case: Case, program: jax.stages.Compiled) -> Finding:
    """What is found when the program of `compiled` runs more than once.

    Raises: what jax raises if it cannot run.
    """
    calls = [jax.device_get(program(case.weights, np.int32(n))) for n in range(_CALLS)]
    found = [each for call in calls for each in call.items()]
    distances = (distance for _, distance in found)
    worst = Distance(*(max(map(float, each), key=_order) for each in zip(*distances, strict=True)))
    wrong = [
        f"{name} off by {float(value):.2g} in {part}, of at most {limit:g}"
        for name, distance in found
        for part, value, limit in zip(("all", "a row", "an element"), distance, LIMITS, strict=True)
        if not value <= limit  # also NaN
    ]
    return Finding(case.kernel, case.name, wrong[0] if wrong else None, worst)


def check(case: Case) -> Finding:
    """What is found when the case runs; an exception of the compiler or the device is a problem."""
    try:
        return finish(case, compiled(start(case)))
    except Exception as error:
        return failure(case, error)


def failure(case: Case, error: Exception) -> Finding:
    """The finding of a case that could not run."""
    text = str(error).strip() or type(error).__name__
    return Finding(case.kernel, case.name, text.splitlines()[0][:300], failed_to_run=True)


def _order(value: float) -> float:
    return float("inf") if value != value else value  # NaN is the worst


def _measure(case: Case, weights: Any, number: Any) -> dict[str, Distance]:
    # In the device's default precision: on a TPU, products of float32 that are exact take ten times
    # as long to compile. Without the barrier, XLA could compute both from common parts.
    inputs = case.inputs()
    found = case.compute(weights, inputs, number)
    expected = case.reference(weights, jax.lax.optimization_barrier(inputs), number)
    return {name: distance(found[name], expected[name]) for name in expected}


def distance(found: Float[Array, "... N"], expected: Float[Array, "... N"]) -> Distance:
    """See Distance."""
    found, wide = found.astype(jnp.float32), expected.astype(jnp.float32)
    # A weight that is not finite makes what is not, by the kernel and by the reference.
    error = jnp.where(jnp.isfinite(wide) | jnp.isfinite(found), found - wide, 0)
    wide = jnp.where(jnp.isfinite(wide), wide, 0)
    size = jnp.sqrt(jnp.mean(wide**2, axis=-1))
    size = jnp.maximum(size, _FLOOR * jnp.sqrt(jnp.mean(wide**2)))
    size = jnp.maximum(size, jnp.finfo(jnp.float32).tiny)
    return Distance(
        jnp.sqrt(jnp.mean(error**2) / jnp.maximum(jnp.mean(wide**2), 1e-30)),
        jnp.max(jnp.sqrt(jnp.mean(error**2, axis=-1)) / size),
        jnp.max(jnp.abs(error).max(axis=-1) / size),
    )
