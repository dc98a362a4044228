"""The parts of `doctor` that need a working JAX: what its device computes with."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax.cli import doctor_cases, timing
from lora_jax.generation import weights
from lora_jax.kernels import attention, int4_matmul
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips
from lora_jax.quant import formats
from lora_jax.selftest import case

_TOKENS = (2048, 8192, 32768)
_COLUMNS = "{:<38}{:<12}{:>9}{:>9}{:>9}"
HEADER = _COLUMNS.format("kernels", "form", "error", "ms", "of peak")


class Row(NamedTuple):
    """A kernel, checked and timed. problem: what is wrong with it. error: relative to the float32
    reference. share: of the chip's roofline; None: its peaks are not known.
    """

    operation: str
    shapes: str
    implementation: str
    problem: str | None
    error: float | None
    seconds: float | None
    share: float | None

    def line(self) -> str:
        """In the columns of HEADER."""
        error = "–" if self.error is None else f"{self.error:.1e}"
        time = "–" if self.seconds is None else f"{1e3 * self.seconds:.3g}"
        share = "–" if self.share is None else f"{self.share:.0%}"
        name = f"  {self.operation}, {self.shapes}"
        return _COLUMNS.format(name, self.implementation, error, time, share)


def rows(sizes: doctor_cases.Sizes | None = None) -> Iterator[Row]:
    """The operations on the first device, one after the other. sizes: None: those for it."""
    device = jax.local_devices()[0]
    sizes = sizes or (doctor_cases.SMALL if device.platform == "cpu" else doctor_cases.FULL)
    peaks = chips.of_kind(device.platform, device.device_kind, 1).peaks
    with jax.set_mesh(_mesh(device)):
        cases = doctor_cases.cases(device, sizes)
        while True:
            try:
                named = next(cases, None)
            except Exception as failure:  # there is no memory for the weights
                yield Row("the others", "not made", "–", _one_line(failure), None, None, None)
                return
            if named is None:
                return
            yield _checked(named, peaks)


def _checked(named: doctor_cases.Case, peaks: chips.Peaks | None) -> Row:
    of = named.of
    row = Row(named.operation, named.shapes, _short(of.kernel), None, None, None, None)
    found = case.check(of)
    if found.problem:
        return row._replace(problem=found.problem)
    try:
        inputs = jax.jit(of.inputs)()
        seconds = timing.Calls(
            lambda number, weights, inputs: of.compute(weights, inputs, number), of.weights, inputs
        ).seconds()
    except Exception as failure:  # of the compiler or the device: the others may still work
        return row._replace(problem=_one_line(failure))
    least = peaks and max(of.flops / peaks.flops, of.num_bytes / peaks.bandwidth)
    return row._replace(
        error=float(found.distance.whole), seconds=seconds, share=least and least / seconds
    )


def _one_line(failure: Exception) -> str:
    return " ".join(str(failure).split())[:200] or type(failure).__name__


def _short(kernel: str) -> str:
    return kernel.rpartition("/")[2]


def _mesh(device: jax.Device) -> Mesh:
    return sharding.make_mesh(sharding.ONE, [device])


Choices = dict[str, list[dict[str, Any]]]


def choices() -> Choices:
    """What the operations choose on the first device by themselves."""
    device = jax.local_devices()[0]
    with jax.set_mesh(_mesh(device)):
        return {
            "attention": [
                {"tokens": tokens, "packed": packed, "implementation": _attention(tokens, packed)}
                for packed in (False, True)
                for tokens in _TOKENS
            ],
            "int4": [
                {
                    "rows": rows,
                    "backward": backward,
                    "implementation": _int4(rows, backward),
                }
                for backward in (False, True)
                for rows in doctor_cases.FULL.rows[0]
            ],
            "decoding": [{"weights": weights.best(device) or "as they are"}],
        }


def _attention(tokens: int, packed: bool) -> str:
    heads, groups, width = doctor_cases.FULL.heads
    q, k = (jax.ShapeDtypeStruct((1, tokens, n, width), jnp.bfloat16) for n in (heads, groups))
    return _short(attention.kernel_of(q, k, k, packed=packed))


def _int4(rows: int, backward: bool) -> str:
    d_in, d_out = doctor_cases.FULL.matmuls[-1]
    dense = jax.ShapeDtypeStruct((d_in, d_out), jnp.bfloat16)
    weight = jax.eval_shape(functools.partial(formats.quantize, fmt="int4"), dense)
    x = jax.ShapeDtypeStruct((rows, d_out if backward else d_in), jnp.bfloat16)
    return _short(int4_matmul.kernel_of(x, weight, transpose=backward))


def sentences(found: Choices) -> Iterator[tuple[str, str]]:
    """(label, text) of each of `choices`."""
    alone, packed = _by(found["attention"], "packed", "tokens")
    yield "attention", f"{alone}; with packing {packed}"
    forward, backward = _by(found["int4"], "backward", "rows")
    yield "int4", f"{forward}; backward {backward}"
    yield "decoding", f"weights {found['decoding'][0]['weights']}"


def _by(found: list[dict[str, Any]], switch: str, unit: str) -> Iterator[str]:
    """For the rows of `choices` without and with `switch`: "blocked (1, 8 rows), xla (64 rows)"."""
    for on in (False, True):
        rows = [each for each in found if each[switch] == on]
        forms = itertools.groupby(rows, key=lambda each: each["implementation"])
        sizes = {form: ", ".join(str(each[unit]) for each in group) for form, group in forms}
        parts = [f"{form} ({sizes[form]} {unit})" for form in sizes]
        yield ", ".join(parts) if len(parts) > 1 else "".join(sizes)
