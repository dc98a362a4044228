"""Quantized linear layers as programs store them → our packed arrays, or dense ones, exactly.

  bitsandbytes  P.weight: W [N, K] flat, two codes a byte, the first in the high half;
                P.weight.absmax: a scale for each block of it, in float32 or as 8-bit codes;
                P.weight.quant_state.…: JSON. Source: class QuantState in functional.py of
                https://github.com/bitsandbytes-foundation/bitsandbytes.
  gptq          P.qweight int32 [K/8, N], nibble i of word j is row 8j+i; P.qzeros int32
                [groups, N/8], nibble i of word j is column 8j+i (in the first version less 1);
                P.scales [groups, N]; P.g_idx [K], the group of each row.
                Source: qlinear_cuda.py of https://github.com/AutoGPTQ/AutoGPTQ.
  awq           P.qweight int32 [K, N/8], nibble i of word j is column 8j + (0 2 4 6 1 3 5 7)[i];
                P.qzeros int32 [groups, N/8] alike; P.scales [groups, N]. Source: version "gemm",
                awq/modules/linear/gemm.py of https://github.com/casper-hansen/AutoAWQ.
  lora_jax      P.q, P.scale, P.column_scale, as kernels/packed.py has them

w = table[code] · scale in the first, (code − zero) · scale in the others. All regroup without loss,
but for blocks that reach from one row of W [N, K] into the next: such a weight becomes dense.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from lora_jax.checkpoints import safetensors_files
from lora_jax.checkpoints.safetensors_files import Stored
from lora_jax.kernels import packed as packing
from lora_jax.models import quantization_config as model_quantization
from lora_jax.quant import formats

STATE = "weight.quant_state.bitsandbytes__"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_LARGEST_GROUP = 128  # no kernel reads a larger one, and more would be padded: told in parts
_SYMMETRIC = 8  # the zero point of codes that stand for −8 … 7
BNB_BLOCK = 64  # unless a quant_state says otherwise


class Form(NamedTuple):
    """What a packed weight consists of.

    group: the rows that share a scale, which is float32 unless fmt is nested; None: everything is
    as formats.quantize makes it for fmt.
    """

    fmt: str
    group: int | None = None
    group_bias: bool = False
    order: bool = False

    @property
    def rows(self) -> int:
        """That share a scale."""
        return self.group or formats.FORMATS[self.fmt].group

    @property
    def nested(self) -> bool:
        return formats.FORMATS[self.fmt].nested

    def fitted(self, rows: int, multiple: int) -> "Form":
        """The form for an input axis cut into `multiple`: padded scales cannot stay nested."""
        if self.nested and rows % (self.rows * multiple):
            return self._replace(fmt=self.fmt.removesuffix("-dq"))
        return self

    def shapes(self, rows: int, columns: int, multiple: int) -> packing.Packed:
        """Of the arrays for a weight [rows, columns] whose input axis is cut into `multiple`."""
        if self.group is None:
            weight = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
            return jax.eval_shape(
                lambda w: formats.quantize(w, self.fmt, multiple, search=False), weight
            )
        groups = -(-rows // (self.group * multiple)) * multiple

        def array(there, dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype) if there else None

        return packing.Packed(
            array(True, jnp.uint32, groups * self.group // 8, columns),
            array(True, jnp.uint8 if self.nested else jnp.float32, groups, columns),
            group_bias=array(self.group_bias, jnp.float32, groups, columns),
            nested_scale=array(
                self.nested, jnp.float32, -(-groups * columns // packing.NESTED_BLOCK)
            ),
            nested_offset=array(self.nested, jnp.float32, 1),
            order=array(self.order, jnp.int32, rows),
        )


class Recipe(NamedTuple):
    """How a weight [rows, columns] is stored: all that decides the program that unpacks it.

    block: entries that share a scale on disk. form: what it becomes; None: it can only be dense.
    """

    method: str
    rows: int
    columns: int
    codes: str
    block: int
    form: Form | None
    zero_offset: int = 0


class Weight(NamedTuple):
    """A quantized weight on disk.

    tensors: by what follows the module's name. state: bitsandbytes' quant_state.
    """

    recipe: Recipe
    tensors: dict[str, Stored]
    state: dict[str, Any]

    def read(self, mesh: Mesh, axes: tuple[str | None, str | None]) -> dict[str, jax.Array]:
        """Its arrays as they are stored, cut over mesh axes (for K, for N) where possible."""
        return _LAYOUTS[self.recipe.method].read(self, mesh, axes)


class Unpack(NamedTuple):
    """raw → Packed, its input axis cut into `multiple`. Hashable, as jit wants it."""

    recipe: Recipe
    multiple: int

    def __call__(self, raw: dict[str, jax.Array]) -> packing.Packed:
        recipe = self.recipe
        packed = _LAYOUTS[recipe.method].packed(raw, recipe)
        return jax.tree.map(
            lambda array, shape: jnp.pad(
                array, [(0, size - had) for size, had in zip(shape.shape, array.shape, strict=True)]
            ),
            packed,
            recipe.form.shapes(recipe.rows, recipe.columns, self.multiple),
        )


class Dequantize(NamedTuple):
    """raw → the dense weight [K, N] in a dtype. Hashable, as jit wants it."""

    recipe: Recipe

    def __call__(self, raw: dict[str, jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
        recipe = self.recipe
        if recipe.form is None:
            return _flat(raw, recipe).T.astype(dtype)
        packed = _LAYOUTS[recipe.method].packed(raw, recipe)
        return formats.dequantize(packed, recipe.form.fmt, recipe.rows, dtype)


class Found(NamedTuple):
    """The quantized linear layers of a checkpoint.

    weights: {module: Weight}, of those as they should be. modules: all of them. claimed: names of
    the tensors that belong to them.
    """

    weights: dict[str, Weight]
    modules: set[str]
    claimed: set[str]
    problems: list[str]


def survey(
    told: model_quantization.Quantization,
    linears: Mapping[str, tuple[int, int]],
    biased: Iterable[str],
    stored: Mapping[str, Stored],
) -> Found:
    """The quantized weights among linear layers {module: (K, N)}, and what is wrong with them.

    biased: the modules that have a bias. Of the tensors only those are read that say what the
    others mean.
    """
    layout = _LAYOUTS[told.method]
    found = Found({}, set(), set(), [])
    for module, tensors in _by_module(stored, linears).items():
        mine = {name: tensor for name, tensor in tensors.items() if name in layout.names}
        if not mine.keys() - {"weight"}:
            continue  # a dense layer
        found.modules.add(module)
        found.claimed.update(f"{module}.{name}" for name in mine)
        lacking = [name for name in layout.needed if name not in mine]
        problems = [f"{name} is missing" for name in lacking]
        if "weight" in tensors and "weight" not in layout.names:
            problems.append("weight is there besides, dense")
        if not lacking:
            weight, others = layout.survey(mine, *linears[module], told)
            problems += others
            if not problems:
                found.weights[module] = weight
        if "bias" in tensors and module not in biased and not tensors["bias"].value().any():
            found.claimed.add(f"{module}.bias")  # some programs write one of zeros
        found.problems.extend(f"{module}.{problem}" for problem in problems)
    if not found.weights and not found.problems:
        found.problems.append(f"config.json says {told.method}, but every linear layer is dense")
    return found


def declared(
    told: model_quantization.Quantization, modules: Iterable[str], rows: int
) -> Form | None:
    """The form of a stack of linear layers with K = rows, as config.json alone tells it."""
    if any(map(told.skips, modules)) or (told.method == "bitsandbytes" and rows % BNB_BLOCK):
        return None
    if told.method in ("gptq", "awq"):
        group = _part(rows if told.group == -1 else told.group)
        return Form("int4", group, told.zero_points, told.act_order)
    return Form(told.fmt)


def join(forms: Iterable[Form | None]) -> Form | None:
    """The form that all layers of a stack can have; None: they have none in common but dense."""
    forms = list(forms)
    if None in forms or len({(f.fmt.removesuffix("-dq"), f.group) for f in forms}) > 1:
        return None
    return Form(
        min(f.fmt for f in forms),  # without -dq, where one is
        forms[0].group,
        any(f.group_bias for f in forms),
        any(f.order for f in forms),
    )


def _by_module(stored, linears) -> dict[str, dict[str, Stored]]:
    """{module: {what follows its name: tensor}}"""
    found: dict[str, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:cut])
            if module in linears:
                found.setdefault(module, {})[".".join(parts[cut:])] = tensor
                break
    return found


def _part(group: int) -> int:
    """The rows of a part of a group, all of it where that is small."""
    return group if group <= _LARGEST_GROUP else math.gcd(group, _LARGEST_GROUP)


def _unlike(tensor: Stored, name: str, dtypes: Iterable[str], shape: tuple[int, ...]) -> list[str]:
    """What is wrong with a tensor's dtype and shape."""
    problems = []
    if tensor.dtype not in dtypes:
        problems.append(f"{name} has dtype {tensor.dtype}, expected {' or '.join(sorted(dtypes))}")
    if tensor.shape != shape:
        problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    return problems


# bitsandbytes


def _survey_bitsandbytes(tensors, rows, columns, told) -> tuple[Weight | None, list[str]]:
    kinds = [kind for kind in packing.TABLES if STATE + kind in tensors]
    if len(kinds) != 1:
        return None, [f"{STATE}… is there {len(kinds)} times, expected once"]
    (kind,) = kinds
    name = STATE + kind
    if tensors[name].dtype != "U8":
        return None, [f"{name} has dtype {tensors[name].dtype}, expected U8"]
    try:
        state = json.loads(tensors[name].value().tobytes())
        problems = [f"{name}: {problem}" for problem in _wrong_state(state, kind, rows, columns)]
    except ValueError as error:
        return None, [f"{name} is no JSON: {error}"]
    if kind != told.fmt.removesuffix("-dq"):
        problems.append(f"{name}, but config.json says bnb_4bit_quant_type {told.fmt[:3]}")
    if problems:
        return None, problems
    block, size, nested = state["blocksize"], rows * columns, "nested_blocksize" in state
    count = -(-size // block)
    item = safetensors_files.DTYPES.get(tensors["weight"].dtype, 1)  # any quant_storage: bytes
    packed = (-(-size // (2 * item)), 1)
    problems += _unlike(tensors["weight"], "weight", safetensors_files.DTYPES, packed)
    absmax = ("U8",) if nested else ("F32",)
    problems += _unlike(tensors["weight.absmax"], "weight.absmax", absmax, (count,))
    problems += _unlike(tensors["weight.quant_map"], "weight.quant_map", ("F32",), (16,))
    for part, number in (("absmax", -(-count // state.get("nested_blocksize", 1))),
                         ("quant_map", 256)):  # fmt: skip
        part = f"weight.nested_{part}"
        if nested and part in tensors:
            problems += _unlike(tensors[part], part, ("F32",), (number,))
        elif nested or part in tensors:
            said = "has nested_blocksize" if nested else "has no nested_blocksize"
            problems.append(f"{part} is {'missing' if nested else 'there'}, but {name} {said}")
    if problems:
        return None, problems
    # Division may have rounded the table's last bits otherwise; bitsandbytes itself reads its own.
    if not np.allclose(tensors["weight.quant_map"].value(), packing.TABLES[kind], atol=1e-6):
        return None, [f"weight.quant_map is not {kind}'s"]
    form = None
    if rows % block == 0:
        keeps = nested and state["nested_blocksize"] == packing.NESTED_BLOCK
        keeps = keeps and block <= _LARGEST_GROUP and np.array_equal(
            tensors["weight.nested_quant_map"].value(), packing.dynamic_map()
        )  # fmt: skip
        group = None if block == BNB_BLOCK else _part(block)
        form = Form(kind + "-dq" * keeps, group)
    recipe = Recipe("bitsandbytes", rows, columns, kind, block, form)
    return Weight(recipe, tensors, state), []


def _wrong_state(state: Any, kind: str, rows: int, columns: int) -> list[str]:
    if not isinstance(state, dict):
        return ["expected an object"]

    def block(name):
        size = state.get(name)
        return isinstance(size, int) and not isinstance(size, bool) and size > 0 and size % 8 == 0

    problems = []
    if state.get("quant_type") != kind:
        problems.append(f"quant_type is {state.get('quant_type')!r}, expected {kind!r}")
    if state.get("shape") != [columns, rows]:
        problems.append(f"shape is {state.get('shape')}, expected {[columns, rows]}")
    if not block("blocksize"):
        problems.append(f"blocksize is {state.get('blocksize')!r}")
    if any(name.startswith("nested_") for name in state):
        if not block("nested_blocksize"):
            problems.append(f"nested_blocksize is {state.get('nested_blocksize')!r}")
        offset = state.get("nested_offset")
        if not isinstance(offset, float | int) or not math.isfinite(offset):
            problems.append(f"nested_offset is {offset!r}")
    return problems


def _read_bitsandbytes(weight: Weight, mesh: Mesh, axes) -> dict[str, jax.Array]:
    recipe, (axis_in, axis_out) = weight.recipe, axes
    rows, columns, block = recipe.rows, recipe.columns, recipe.block
    with safetensors_files.opened(weight.tensors["weight"]) as part:

        def stored_bytes(start: int, stop: int) -> np.ndarray:
            item = safetensors_files.DTYPES[weight.tensors["weight"].dtype]
            return part[start // item : -(-stop // item)].reshape(-1).view(np.uint8)

        if recipe.form is None:
            everything = (0, -(-rows * columns // 2))
            whole = {
                "pairs": stored_bytes(*everything),
                "scale": _absmax(weight, 0, -(-rows * columns // block)),
            }
            return {name: _everywhere(array, mesh) for name, array in whole.items()}

        # A part of N is a run of bytes; of K it is cut from the run.
        def words(n, k):
            run = stored_bytes(n[0] * rows // 2, n[1] * rows // 2)
            return run.view("<u4").reshape(n[1] - n[0], -1)[:, slice(*k)]

        raw = {
            "words": safetensors_files.place((columns, rows // 8), mesh, (axis_out, axis_in), words)
        }
    groups = rows // block
    nested = recipe.form.nested

    def scales(n, k):
        run = _absmax(weight, n[0] * groups, n[1] * groups, expand=not nested)
        return run.reshape(n[1] - n[0], groups)[:, slice(*k)]

    raw["scale"] = safetensors_files.place((columns, groups), mesh, (axis_out, axis_in), scales)
    if nested:
        offset = np.asarray([weight.state["nested_offset"]], np.float32)
        raw["nested_scale"] = _everywhere(weight.tensors["weight.nested_absmax"].value(), mesh)
        raw["nested_offset"] = _everywhere(offset, mesh)
    return raw


def _absmax(weight: Weight, start: int, stop: int, *, expand: bool = True) -> np.ndarray:
    """The scales of blocks from start to stop, or with expand=False what is stored of them."""
    with safetensors_files.opened(weight.tensors["weight.absmax"]) as part:
        stored = part[start:stop]
    if not expand or "nested_blocksize" not in weight.state:
        return stored
    values = weight.tensors["weight.nested_quant_map"].value()[stored]
    block = np.arange(start, stop) // weight.state["nested_blocksize"]
    values = values * weight.tensors["weight.nested_absmax"].value()[block]
    return values + np.float32(weight.state["nested_offset"])


def _packed_bitsandbytes(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    words = raw["words"]
    words = ((words & 0x0F0F0F0F) << 4) | ((words >> 4) & 0x0F0F0F0F)
    scale = jnp.repeat(raw["scale"].T, recipe.block // recipe.form.rows, axis=0)
    nested = {name: raw[name] for name in ("nested_scale", "nested_offset") if name in raw}
    return packing.Packed(words.T, scale, **nested)


def _flat(raw: dict[str, jax.Array], recipe: Recipe) -> jax.Array:
    """The dense weight [N, K] of blocks that need not lie in one row, in float32."""
    pairs, size = raw["pairs"], recipe.rows * recipe.columns
    codes = jnp.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[:size]
    values = jnp.asarray(packing.TABLES[recipe.codes])[codes.astype(jnp.int32)]
    scale = jnp.repeat(raw["scale"], recipe.block)[:size]
    return (values * scale).reshape(recipe.columns, recipe.rows)


# GPTQ and AWQ: groups along K, with zero points


def _survey_gptq(tensors, rows, columns, told) -> tuple[Weight | None, list[str]]:
    words = (rows // 8, columns)
    group, problems = _wrong_groups(tensors, rows, columns, told, words)
    if "g_idx" in tensors:
        problems += _unlike(tensors["g_idx"], "g_idx", ("I32",), (rows,))
    if problems:
        return None, problems
    order = False
    if "g_idx" in tensors:
        index = tensors["g_idx"].value()
        order = not np.array_equal(index, np.arange(rows) // group)
        sizes = np.bincount(index[(index >= 0) & (index < -(-rows // group))])
        if sizes.sum() != rows or not np.array_equal(sizes, np.bincount(np.arange(rows) // group)):
            return None, [f"g_idx does not deal {rows} rows out into groups of {group}"]
    return _with_zero_points(tensors, rows, columns, told, group, order, "gptq")


def _survey_awq(tensors, rows, columns, told) -> tuple[Weight | None, list[str]]:
    words = (rows, columns // 8)
    group, problems = _wrong_groups(tensors, rows, columns, told, words)
    if problems:
        return None, problems
    return _with_zero_points(tensors, rows, columns, told, group, False, "awq")


def _wrong_groups(tensors, rows, columns, told, words) -> tuple[int, list[str]]:
    """(rows of a group, what is wrong with the tensors' shapes)."""
    group = rows if told.group == -1 else told.group
    groups = -(-rows // group)
    problems = []
    if rows % 8 or columns % 8:
        problems.append(f"qweight: a weight [{columns}, {rows}] is not made of whole words")
    problems += _unlike(tensors["qweight"], "qweight", ("I32",), words)
    problems += _unlike(tensors["qzeros"], "qzeros", ("I32",), (groups, columns // 8))
    problems += _unlike(tensors["scales"], "scales", ("F16", "BF16"), (groups, columns))
    return group, problems


def _with_zero_points(tensors, rows, columns, told, group, order, method):
    zeros = tensors["qzeros"].value().view(np.uint32)
    same = zeros == 0x11111111 * (_SYMMETRIC - told.zero_offset)
    if not told.zero_points and not same.all():
        hint = ""
        if told.zero_offset and (zeros == 0x11111111 * _SYMMETRIC).all():
            hint = '; they are those of "checkpoint_format": "gptq_v2"'
        return None, [f"qzeros are not {_SYMMETRIC}, but config.json says sym{hint}"]
    form = Form("int4", _part(group), not same.all(), order)
    recipe = Recipe(method, rows, columns, "int4", group, form, told.zero_offset)
    return Weight(recipe, tensors, {}), []


def _read_gptq(weight: Weight, mesh: Mesh, axes) -> dict[str, jax.Array]:
    axis_in, axis_out = axes
    order = weight.recipe.form.order
    raw = _read_groups(weight, mesh, axes)
    # Rows that lie anywhere are read whole.
    words = (None if order else axis_in, axis_out)
    raw["words"] = safetensors_files.read(weight.tensors["qweight"], mesh, words)
    if order:
        index = np.arange(weight.recipe.rows)
        if "g_idx" in weight.tensors:
            index = np.argsort(weight.tensors["g_idx"].value(), kind="stable")
        raw["order"] = _everywhere(index.astype(np.int32), mesh)
    return raw


def _read_awq(weight: Weight, mesh: Mesh, axes) -> dict[str, jax.Array]:
    words = safetensors_files.read(weight.tensors["qweight"], mesh, axes)
    return _read_groups(weight, mesh, axes) | {"words": words}


def _read_groups(weight: Weight, mesh: Mesh, axes) -> dict[str, jax.Array]:
    raw = {"scale": safetensors_files.read(weight.tensors["scales"], mesh, axes)}
    if weight.recipe.form.group_bias:
        raw["zeros"] = safetensors_files.read(weight.tensors["qzeros"], mesh, axes)
    return raw


def _packed_gptq(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    words = lax.bitcast_convert_type(raw["words"], jnp.uint32)
    order = raw.get("order")
    if order is not None:
        rows = order.reshape(-1, 8)
        words = _nibbles_joined(
            lambda i: words[rows[:, i] // 8] >> (rows[:, i, None] % 8 * 4).astype(jnp.uint32)
        )
    return _grouped(words, raw, recipe, range(8))._replace(order=order)


def _packed_awq(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    words = lax.bitcast_convert_type(raw["words"], jnp.uint32)  # [K, N/8]
    words = words.reshape(-1, 8, words.shape[1])

    def column(n: int) -> jax.Array:
        """Column n of every eight."""
        shift = 4 * AWQ_ORDER.index(n)
        return _nibbles_joined(lambda i: words[:, i] >> shift)

    columns = [column(n) for n in range(8)]
    return _grouped(jnp.stack(columns, axis=2).reshape(len(words), -1), raw, recipe, AWQ_ORDER)


def _nibbles_joined(nibble: Callable[[int], jax.Array]) -> jax.Array:
    """Words whose nibble i is the lowest of nibble(i)."""
    return sum((nibble(i) & 15) << (4 * i) for i in range(8))


def _grouped(words: jax.Array, raw, recipe: Recipe, order: Sequence[int]) -> packing.Packed:
    """Codes 0 … 15 [K/8, N] less 8, and what makes them (code − zero) · scale.

    order: nibble i of a word of zero points is that of column order[i].
    """
    form, groups = recipe.form, len(raw["scale"])
    words = words ^ np.uint32(0x11111111 * _SYMMETRIC)
    words = jnp.pad(words, ((0, groups * recipe.block // 8 - len(words)), (0, 0)))
    parts = recipe.block // form.rows
    scale = raw["scale"].astype(jnp.float32)
    bias = None
    if form.group_bias:
        stored = lax.bitcast_convert_type(raw["zeros"], jnp.uint32)
        each = [(stored >> (4 * order.index(n))) & 15 for n in range(8)]
        zeros = jnp.stack(each, axis=2).reshape(scale.shape).astype(jnp.float32)
        zeros = zeros + recipe.zero_offset
        bias = jnp.repeat((_SYMMETRIC - zeros) * scale, parts, axis=0)
    return packing.Packed(words, jnp.repeat(scale, parts, axis=0), group_bias=bias)


# Our own


def _survey_own(tensors, rows, columns, told) -> tuple[Weight | None, list[str]]:
    names = {"int8": "I8", "uint32": "U32", "float32": "F32"}
    form = Form(told.fmt)
    problems = []
    for name, shape in form.shapes(rows, columns, 1)._asdict().items():
        if shape is not None and name in tensors:
            problems += _unlike(tensors[name], name, (names[str(shape.dtype)],), shape.shape)
        elif shape is not None or name in tensors:
            problems.append(f"{name} is {'there' if name in tensors else 'missing'}")
    codes = formats.codes(told.fmt)
    return Weight(Recipe("lora_jax", rows, columns, codes, form.rows, form), tensors, {}), problems


def _read_own(weight: Weight, mesh: Mesh, axes) -> dict[str, jax.Array]:
    where = {"column_scale": (None, axes[1])}
    return {
        name: safetensors_files.read(tensor, mesh, where.get(name, axes))
        for name, tensor in weight.tensors.items()
    }


def _packed_own(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    return packing.Packed(**raw)


# The other way: what a dense weight [N, K] is stored as


def kinds(fmt: str, rows: int, columns: int) -> dict[str, safetensors_files.Kind | None]:
    """{what follows the module's name: the tensor}; None where its length depends on values."""
    if fmt in model_quantization.OWN:
        shapes = Form(fmt).shapes(rows, columns, 1)._asdict()
        return {name: safetensors_files.kind(s) for name, s in shapes.items() if s is not None}
    form = formats.FORMATS[fmt]
    size = rows * columns
    count = -(-size // form.group)
    found = {
        "weight": safetensors_files.Kind("U8", (-(-size // 2), 1)),
        "weight.absmax": safetensors_files.Kind("U8" if form.nested else "F32", (count,)),
        "weight.quant_map": safetensors_files.Kind("F32", (16,)),
    }
    if form.nested:
        blocks = -(-count // packing.NESTED_BLOCK)
        found["weight.nested_absmax"] = safetensors_files.Kind("F32", (blocks,))
        found["weight.nested_quant_map"] = safetensors_files.Kind("F32", (256,))
    return {**found, STATE + form.codes: None}


def store(fmt: str, weight: np.ndarray, *, search: bool = True) -> dict[str, np.ndarray]:
    """The tensors of `kinds` for a dense weight [N, K].

    NF4 and FP4 as bitsandbytes stores them, also where its blocks reach from one row into the next.
    """
    columns, rows = weight.shape
    if fmt in model_quantization.OWN:
        packed = formats.quantize(jax.device_put(weight), fmt, search=search, transposed=True)
        return {name: np.asarray(array) for name, array in packed._asdict().items()
                if array is not None}  # fmt: skip
    form = formats.FORMATS[fmt]
    if rows % form.group:
        flat = weight.reshape(-1)
        weight = np.pad(flat, (0, -flat.size % form.group)).reshape(-1, form.group)
    packed = formats.quantize(jax.device_put(weight), fmt, transposed=True)
    words = np.ascontiguousarray(np.asarray(packed.q).T)
    words = ((words & 0x0F0F0F0F) << 4) | ((words >> 4) & 0x0F0F0F0F)
    state: dict[str, Any] = {"quant_type": form.codes, "blocksize": form.group}
    state |= {"dtype": str(weight.dtype), "shape": [columns, rows]}
    found = {
        "weight": words.reshape(-1).view(np.uint8)[: -(-rows * columns // 2), None],
        "weight.absmax": np.ascontiguousarray(np.asarray(packed.scale).T).reshape(-1),
        "weight.quant_map": packing.TABLES[form.codes],
    }
    if form.nested:
        found["weight.nested_absmax"] = np.asarray(packed.nested_scale)
        found["weight.nested_quant_map"] = packing.dynamic_map()
        state |= {"nested_blocksize": packing.NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = packed.nested_offset.item()
    return found | {STATE + form.codes: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def _everywhere(array: np.ndarray, mesh: Mesh) -> jax.Array:
    return safetensors_files.place(array.shape, mesh, (), lambda *_: array)


class _Layout(NamedTuple):
    """needed: tensors without which there is none of it; names: all that may be."""

    survey: Callable
    read: Callable
    packed: Callable
    needed: tuple[str, ...]
    names: frozenset[str]


_BNB = ("weight", "weight.absmax", "weight.quant_map")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_GROUPED = ("qweight", "qzeros", "scales")
_LAYOUTS = {
    "bitsandbytes": _Layout(
        *(_survey_bitsandbytes, _read_bitsandbytes, _packed_bitsandbytes, _BNB),
        frozenset((*_BNB, *_NESTED, *(STATE + kind for kind in packing.TABLES))),
    ),
    "gptq": _Layout(
        _survey_gptq, _read_gptq, _packed_gptq, _GROUPED, frozenset((*_GROUPED, "g_idx"))
    ),
    "awq": _Layout(_survey_awq, _read_awq, _packed_awq, _GROUPED, frozenset(_GROUPED)),
    "lora_jax": _Layout(
        *(_survey_own, _read_own, _packed_own, ("q", "column_scale")),
        frozenset(("q", "scale", "column_scale")),
    ),
}
