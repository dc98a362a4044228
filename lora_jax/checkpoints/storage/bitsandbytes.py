"""NF4 and FP4 weights as bitsandbytes stores them: checked, read, packed and made.

  P.weight                 W [N, K] flat, two codes a byte, the first in the high half
  P.weight.absmax          one scale a block of W, float32 or 8-bit codes ("double quantization")
  P.weight.quant_map       the 16 values that the codes stand for
  P.weight.nested_…        scales and values of the 8-bit codes
  P.weight.quant_state.…   JSON: block sizes, shape, dtype

w = table[code] · scale. A block may reach from one row of W [N, K] into the next; such a weight
can only become dense.
Source: class QuantState in functional.py of https://github.com/bitsandbytes-foundation/bitsandbytes
"""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax.checkpoints import finite, safetensors_files
from lora_jax.checkpoints.safetensors_writer import TensorSpec
from lora_jax.checkpoints.storage import stored_linear
from lora_jax.checkpoints.storage.stored_linear import PackedSpec, Recipe, StoredLinear
from lora_jax.kernels import packed as packing
from lora_jax.quant import formats

BLOCK = 64  # the default block size
STATE = "weight.quant_state.bitsandbytes__"
NEEDED = ("weight", "weight.absmax", "weight.quant_map")
NAMES = frozenset(
    (
        *NEEDED,
        *("weight.nested_absmax", "weight.nested_quant_map"),
        *(STATE + codes for codes in packing.TABLES),
    )
)


def check(tensors, rows, columns, declared) -> tuple[StoredLinear | None, list[str]]:
    """See stored_linear.Format."""
    present = [codes for codes in packing.TABLES if STATE + codes in tensors]
    if len(present) != 1:
        return None, [f"{STATE}… is present {len(present)} times, expected once"]
    (codes,) = present
    name = STATE + codes
    if tensors[name].dtype != "U8":
        return None, [f"{name} has dtype {tensors[name].dtype}, expected U8"]
    try:
        state = json.loads(tensors[name].value().tobytes())
        problems = [f"{name}: {problem}" for problem in _check_state(state, codes, rows, columns)]
    except ValueError as error:
        return None, [f"{name} is not JSON: {error}"]
    if codes != declared.fmt.removesuffix("-dq"):
        problems.append(f"{name}, but config.json says bnb_4bit_quant_type {declared.fmt[:3]}")
    if problems:
        return None, problems
    problems = _check_shapes(tensors, name, state, rows * columns)
    if problems:
        return None, problems
    # Division may round the table's last bits differently; bitsandbytes reads the stored table.
    if not np.allclose(tensors["weight.quant_map"].value(), packing.TABLES[codes], atol=1e-6):
        return None, [f"weight.quant_map is not {codes}'s"]
    recipe = Recipe(
        *("bitsandbytes", rows, columns, codes, state["blocksize"]),
        _packed_spec(tensors, state, codes, rows),
    )
    return StoredLinear(recipe, tensors, state), []


def _check_state(state: Any, codes: str, rows: int, columns: int) -> list[str]:
    if not isinstance(state, dict):
        return ["expected an object"]

    def is_block(name):
        size = state.get(name)
        return isinstance(size, int) and not isinstance(size, bool) and size > 0 and size % 8 == 0

    problems = []
    if state.get("quant_type") != codes:
        problems.append(f"quant_type is {state.get('quant_type')!r}, expected {codes!r}")
    if state.get("shape") != [columns, rows]:
        problems.append(f"shape is {state.get('shape')}, expected {[columns, rows]}")
    if not is_block("blocksize"):
        problems.append(f"blocksize is {state.get('blocksize')!r}")
    if any(name.startswith("nested_") for name in state):
        if not is_block("nested_blocksize"):
            problems.append(f"nested_blocksize is {state.get('nested_blocksize')!r}")
        offset = state.get("nested_offset")
        if not isinstance(offset, float | int) or not math.isfinite(offset):
            problems.append(f"nested_offset is {offset!r}")
    return problems


def _check_shapes(tensors, name: str, state: dict[str, Any], size: int) -> list[str]:
    """What is wrong with the tensors of a weight with `size` entries. name: of its quant_state."""
    nested = "nested_blocksize" in state
    count = -(-size // state["blocksize"])
    item = safetensors_files.DTYPES.get(tensors["weight"].dtype, 1)  # quant_storage: any dtype
    packed = (-(-size // (2 * item)), 1)
    absmax = ("U8",) if nested else ("F32",)
    problems = [
        *stored_linear.mismatches(tensors["weight"], "weight", safetensors_files.DTYPES, packed),
        *stored_linear.mismatches(tensors["weight.absmax"], "weight.absmax", absmax, (count,)),
        *stored_linear.mismatches(tensors["weight.quant_map"], "weight.quant_map", ("F32",), (16,)),
    ]
    for part, number in (("absmax", -(-count // state.get("nested_blocksize", 1))),
                         ("quant_map", 256)):  # fmt: skip
        part = f"weight.nested_{part}"
        if nested and part in tensors:
            problems += stored_linear.mismatches(tensors[part], part, ("F32",), (number,))
        elif nested:
            problems.append(f"{part} is missing, but {name} has nested_blocksize")
        elif part in tensors:
            problems.append(f"{part} is present, but {name} has no nested_blocksize")
    return problems


def _packed_spec(tensors, state: dict[str, Any], codes: str, rows: int) -> PackedSpec | None:
    """What the weight becomes in memory; None: only dense."""
    block = state["blocksize"]
    if rows % block:
        return None
    stays_nested = (
        state.get("nested_blocksize") == packing.NESTED_BLOCK
        and stored_linear.split_group(block) == block
        and np.array_equal(tensors["weight.nested_quant_map"].value(), packing.dynamic_map())
    )
    group = None if block == BLOCK else stored_linear.split_group(block)
    return PackedSpec(codes + "-dq" * stays_nested, group)


def read(linear: StoredLinear, mesh: Mesh, axes) -> dict[str, jax.Array]:
    """See stored_linear.Format."""
    recipe, (axis_in, axis_out) = linear.recipe, axes
    rows, columns, block = recipe.rows, recipe.columns, recipe.block
    with safetensors_files.opened(linear.tensors["weight"]) as part:

        def stored_bytes(start: int, stop: int) -> np.ndarray:
            item = safetensors_files.DTYPES[linear.tensors["weight"].dtype]
            return part[start // item : -(-stop // item)].reshape(-1).view(np.uint8)

        if recipe.packed is None:
            whole = {
                "pairs": stored_bytes(0, -(-rows * columns // 2)),
                "scale": _absmax(linear, 0, -(-rows * columns // block)),
            }
            return {name: stored_linear.replicated(array, mesh) for name, array in whole.items()}

        # Part of N is a contiguous run of bytes; part of K is cut from that run.
        def words(n, k):
            run = stored_bytes(n[0] * rows // 2, n[1] * rows // 2)
            return run.view("<u4").reshape(n[1] - n[0], -1)[:, slice(*k)]

        raw = {
            "words": safetensors_files.place((columns, rows // 8), mesh, (axis_out, axis_in), words)
        }
    groups = rows // block
    nested = recipe.packed.nested

    def scales(n, k):
        run = _absmax(linear, n[0] * groups, n[1] * groups, expand=not nested)
        return run.reshape(n[1] - n[0], groups)[:, slice(*k)]

    raw["scale"] = safetensors_files.place((columns, groups), mesh, (axis_out, axis_in), scales)
    if nested:
        offset = np.asarray([linear.state["nested_offset"]], np.float32)
        stored = linear.tensors["weight.nested_absmax"]
        nested_scale = finite.check(stored.value(), stored)
        raw["nested_scale"] = stored_linear.replicated(nested_scale, mesh)
        raw["nested_offset"] = stored_linear.replicated(offset, mesh)
    return raw


def _absmax(linear: StoredLinear, start: int, stop: int, *, expand: bool = True) -> np.ndarray:
    """The scales of blocks from start to stop; with expand=False, nested ones stay codes."""
    with safetensors_files.opened(linear.tensors["weight.absmax"]) as part:
        stored = finite.check(part[start:stop], linear.tensors["weight.absmax"])
    if not expand or "nested_blocksize" not in linear.state:
        return stored
    table, scale = (linear.tensors[f"weight.nested_{part}"] for part in ("quant_map", "absmax"))
    values = finite.check(table.value(), table)[stored]
    block = np.arange(start, stop) // linear.state["nested_blocksize"]
    values = values * finite.check(scale.value(), scale)[block]
    return values + np.float32(linear.state["nested_offset"])


def pack(raw: dict[str, jax.Array], recipe: Recipe) -> packing.Packed:
    """See stored_linear.Format."""
    words = _swap_halves(raw["words"])
    scale = jnp.repeat(raw["scale"].T, recipe.block // recipe.packed.group_size, axis=0)
    nested = {name: raw[name] for name in ("nested_scale", "nested_offset") if name in raw}
    return packing.Packed(words.T, scale, **nested)


def dense(raw: dict[str, jax.Array], recipe: Recipe) -> jax.Array:
    """The dense weight [N, K] in float32, whose blocks may reach across rows."""
    pairs, size = raw["pairs"], recipe.rows * recipe.columns
    codes = jnp.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[:size]
    values = jnp.asarray(packing.TABLES[recipe.codes])[codes.astype(jnp.int32)]
    scale = jnp.repeat(raw["scale"], recipe.block)[:size]
    return (values * scale).reshape(recipe.columns, recipe.rows)


def tensor_specs(fmt: str, rows: int, columns: int) -> dict[str, TensorSpec | None]:
    """{name: dtype and shape} of what `tensors` returns; None where the length is not known."""
    form = formats.FORMATS[fmt]
    size = rows * columns
    count = -(-size // form.group)
    specs: dict[str, TensorSpec | None] = {
        "weight": TensorSpec("U8", (-(-size // 2), 1)),
        "weight.absmax": TensorSpec("U8" if form.nested else "F32", (count,)),
        "weight.quant_map": TensorSpec("F32", (16,)),
    }
    if form.nested:
        blocks = -(-count // packing.NESTED_BLOCK)
        specs["weight.nested_absmax"] = TensorSpec("F32", (blocks,))
        specs["weight.nested_quant_map"] = TensorSpec("F32", (256,))
    return {**specs, STATE + form.codes: None}


def tensors(fmt: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """A dense weight [N, K], quantized, as the tensors that bitsandbytes stores.

    Blocks may reach from one row into the next, as in bitsandbytes.
    """
    columns, rows = weight.shape
    form = formats.FORMATS[fmt]
    if rows % form.group:
        flat = weight.reshape(-1)
        weight = np.pad(flat, (0, -flat.size % form.group)).reshape(-1, form.group)
    packed = formats.quantize(jax.device_put(weight), fmt, transposed=True)
    words = _swap_halves(np.ascontiguousarray(np.asarray(packed.q).T))
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


def _swap_halves(words):
    """Words in which the two nibbles of each byte have changed places."""
    return ((words & 0x0F0F0F0F) << 4) | ((words >> 4) & 0x0F0F0F0F)
