"""The report of `quantize`: error and bits per weight of the linear layers in each format."""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any, TypedDict

from lora_jax import console, errors
from lora_jax.cli import arguments
from lora_jax.models import config as model_config

NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)\.weight")  # lm_head and embeddings stay dense
DTYPES = ("F32", "F16", "BF16")
TABLE = 3  # formats next to each other, in 80 columns
WORST = 3  # modules listed for each format
RANGE, NUM_RANGES = 8, 4  # at least so many layers per table row, at most so many rows per kind


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a format for some weights: ‖W − Ŵ‖², ‖W‖², bits, and number of weights."""

    lost: float = 0.0
    total: float = 0.0
    bits: float = 0.0
    size: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(mine + theirs for mine, theirs in pairs))

    @property
    def error(self) -> float:
        """‖W − Ŵ‖ / ‖W‖; 0 for W = 0."""
        return math.sqrt(self.lost / self.total) if self.total else 0.0

    @property
    def bits_per_weight(self) -> float:
        return self.bits / self.size

    def as_json(self) -> dict[str, float]:
        return {"error": self.error, "bits_per_weight": self.bits_per_weight}


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer, and its cost in each format."""

    name: str
    layer: int
    kind: str
    shape: tuple[int, ...]
    costs: dict[str, Cost]


Costs = dict[str, dict[str, float]]  # {format: Cost.as_json()}


class ModuleReport(TypedDict):
    """A linear layer in the file that --json writes."""

    name: str
    shape: list[int]
    formats: Costs


class Report(TypedDict):
    """The content of the file that --json writes."""

    model: str | None
    revision: str | None
    fast: bool
    formats: Costs
    modules: list[ModuleReport]


def show(
    folder: pathlib.Path,
    settings: arguments.Given,
    chosen: tuple[str, ...],
    path: pathlib.Path | None,
) -> None:
    """Prints the report on the model in `folder`, and writes it to `path` if given.

    settings: the typed flags of `quantize`. chosen: the formats.
    """
    modules = list(measure(folder, chosen, search=not settings.get("fast")))
    for first in range(0, len(chosen), TABLE):
        print("\n".join(["", *table(modules, chosen[first : first + TABLE])]))
    print()
    for fmt in chosen:
        worst = sorted(modules, key=lambda module: -module.costs[fmt].error)[:WORST]
        named = (f"{module.name} {module.costs[fmt].error:.2%}" for module in worst)
        console.say("worst", f"{fmt}: {', '.join(named)}")
    if path:
        path.write_text(json.dumps(report(modules, settings, chosen), indent=1) + "\n")
        console.say("wrote", str(path))


def measure(folder: pathlib.Path, chosen: tuple[str, ...], *, search: bool) -> Iterator[Module]:
    """Yields the linear layers of the model, with one of them in memory at a time."""
    from lora_jax.checkpoints import safetensors_files, scaled

    if (folder / "config.json").exists() and (stored_as := model_config.load(folder).quantization):
        raise errors.UserError(
            expected="a model that is not quantized yet",
            found=str(stored_as),
            where=str(folder),
            do="name the model before it was quantized",
        )
    tensors = scaled.join(safetensors_files.tensors(folder), "float32", str(folder))
    stored = {
        match: tensor.widened()
        for name, tensor in tensors.items()
        if (match := NAME.fullmatch(name)) and len(tensor.shape) == 2
    }
    if not stored:
        raise errors.UserError(
            expected="tensors model.layers.N.….weight with two axes", found="none",
            where=str(folder), do="name a model in Hugging Face's layout",
        )  # fmt: skip
    unread = [f"{t.name} ({t.dtype})" for t in stored.values() if t.dtype not in DTYPES]
    if unread:
        raise errors.UserError(
            expected=f"weights in {', '.join(DTYPES)}", found=unread[:3], where=str(folder),
            do="name the model before it was quantized",
        )  # fmt: skip
    num_weights = sum(math.prod(tensor.shape) for tensor in stored.values())
    console.say("model", f"{folder}: {console.count(num_weights)} weights in linear layers")
    for match, tensor in console.tracked(stored.items(), len(stored), "tensor"):
        found = costs(tensor, chosen, search=search)
        if not all(math.isfinite(each.lost + each.total) for each in found.values()):
            raise errors.UserError(
                expected="finite weights", found=f"NaN or infinity in {tensor.name}",
                where=str(tensor.path), do="take another revision of the model",
            )  # fmt: skip
        layer, kind = match.groups()
        name = tensor.name.removesuffix(".weight")
        yield Module(name, int(layer), kind.split(".")[-1], tensor.shape, found)


def costs(tensor: Any, chosen: tuple[str, ...], *, search: bool) -> dict[str, Cost]:
    """{format: cost} of one tensor [out, in] of a checkpoint."""
    import jax

    from lora_jax.quant import formats

    weight = jax.device_put(tensor.value())
    found = {}
    for fmt in chosen:
        lost, total, packed = _squares()(weight, fmt=fmt, search=search)
        bits = formats.bits_per_weight(packed, weight.shape[1]) * weight.size
        found[fmt] = Cost(float(lost), float(total), bits, weight.size)
    return found


@functools.cache
def _squares():
    import jax

    from lora_jax.quant import formats

    def squares(weight, fmt, search):
        packed = formats.quantize(weight, fmt, search=search, transposed=True)
        return *formats.squares(weight.T, packed, fmt), packed

    return jax.jit(squares, static_argnames=("fmt", "search"))


def table(modules: list[Module], chosen: tuple[str, ...]) -> Iterator[str]:
    """Yields the lines of a table: a row per kind of module and range of layers, and a total."""
    num_layers = 1 + max(module.layer for module in modules)
    step = max(RANGE, -(-num_layers // NUM_RANGES))
    rows = collections.defaultdict(list)
    for module in modules:
        rows[module.kind, module.layer // step].append(module)
    yield f"{'':31}" + "".join(f"{fmt:>16}" for fmt in chosen)
    yield f"{'module':<12}{'layers':<8}{'in × out':<11}" + f"{'error':>9}{'bits':>7}" * len(chosen)
    for (kind, _), found in sorted(rows.items(), key=lambda row: _order(modules, row[0])):
        layers = sorted({module.layer for module in found})
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
        shapes = {module.shape for module in found}
        shape = "×".join(map(str, shapes.pop()[::-1])) if len(shapes) == 1 else "various"
        yield f"{kind:<12}{span:<8}{shape:<11}" + _cells(found, chosen)
    yield f"{'all':<31}" + _cells(modules, chosen)


def _order(modules: list[Module], row: tuple[str, int]) -> tuple[int, int]:
    kinds = list(dict.fromkeys(module.kind for module in modules))
    return kinds.index(row[0]), row[1]


def _cells(found: list[Module], chosen: tuple[str, ...]) -> str:
    sums = [sum((module.costs[fmt] for module in found), Cost()) for fmt in chosen]
    return "".join(f"{each.error:>9.2%}{each.bits_per_weight:>7.3f}" for each in sums)


def report(modules: list[Module], settings: arguments.Given, chosen: tuple[str, ...]) -> Report:
    """The content of the file that --json writes."""
    return {
        "model": settings.get("model"),
        "revision": settings.get("revision"),
        "fast": bool(settings.get("fast")),
        "formats": {
            fmt: sum((module.costs[fmt] for module in modules), Cost()).as_json() for fmt in chosen
        },
        "modules": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "formats": {fmt: module.costs[fmt].as_json() for fmt in chosen},
            }
            for module in modules
        ],
    }
