"""Writes benchmarks/quality.md: the loss in quality of two real models in each weight format.

    python benchmarks/quality.py

Every nnx.Linear except lm_head is rounded to the format, and the model computes in float32, so that
the result depends on the format, not on the kernels. About five minutes on two CPU cores.
"""

import functools
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "scripts"))

import demo_corpus
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import assets, tokenizer
from lora_jax.checkpoints import loader
from lora_jax.generation import config as generation_config
from lora_jax.generation import engine as engines
from lora_jax.kernels import packed as packing
from lora_jax.quant import formats

HERE = pathlib.Path(__file__).resolve().parent
STORIES = HERE.parent / "tests" / "golden" / "models" / "stories260K"
OUTPUT = HERE / "quality.md"
BATCHES = 16
INT4, NF4 = np.arange(-8.0, 8.0, dtype=np.float32), packing.NF4_CODE

HEAD = """\
# The quality of each weight format

Made by `python benchmarks/quality.py`. Every linear layer except lm_head is rounded to the format;
the other weights and the computation are in float32. The demo base reads {demo} tokens of new text
from the generator of its corpus, stories260K {stories} tokens of stories that the float32 model
sampled at temperature 1. Bits per weight include all arrays and the padding of K to whole groups:
first for a matrix of 4096 × 4096, then for the two models, whose matrices have only 192 and 512, or
64 and 172 rows. Error is ‖W − Ŵ‖ / ‖W‖. Δ loss, relative to float32 ({losses}), and the KL
divergence (float32 ‖ format) are in nats per token, × 1000. "Same" is the share of tokens at which
both predict the same most likely token.
"""
COLUMNS = ("format", "bits", *2 * ("bits", "error", "Δ loss", "KL", "same"))


class Scheme(NamedTuple):
    """A way to store a weight [K, N]: the rounded weight, and the bits per weight for a shape."""

    rounded: Callable[[jax.Array], jax.Array]
    bits: Callable[[int, int], float]


class Measured(NamedTuple):
    """A format on a model: bits per weight, ‖W−Ŵ‖/‖W‖, Δ loss, KL, share of equal argmax."""

    bits: float
    error: float
    loss: float
    divergence: float
    same: float


class Text(NamedTuple):
    """A model in float32, and the text to read."""

    graphdef: nnx.GraphDef
    state: dict[tuple, Any]
    ids: np.ndarray  # int32 [sequences, tokens]


def demo_text() -> Text:
    """Concatenated documents that the pretraining of the demo base has not seen."""
    reader = tokenizer.load(assets.FOLDER)
    # The first documents of the corpus are drills.
    first = demo_corpus.NUM_DRILLS
    documents = list(itertools.islice(demo_corpus.corpus(seed=1), first, first + 1000))
    encoded = [[*ids, reader.eos_token_id] for ids in tokenizer.encode(reader, documents)]
    stream = np.concatenate(encoded).astype(np.int32)
    length = 96  # of the sequences in pretraining
    count = len(stream) // length // BATCHES * BATCHES
    return _text(assets.FOLDER, stream[: count * length].reshape(-1, length))


def stories_text() -> Text:
    """Stories that the float32 model samples."""
    reader = tokenizer.load(STORIES)
    sampling = generation_config.Sampling(max_new_tokens=255, temperature=1.0, seed=0)
    model, count = loader.load(STORIES, dtype="float32"), 8 * BATCHES
    engine = engines.Engine(model, reader, eos_ids=(), slots=count, context=256)
    results = engine.generate([[reader.bos_token_id]] * count, sampling)
    ids = [[reader.bos_token_id, *result.tokens] for result in results]
    return _text(STORIES, np.array(ids, np.int32))


def _text(folder: pathlib.Path, ids: np.ndarray) -> Text:
    graphdef, state = nnx.split(loader.load(folder, dtype="float32"))
    return Text(graphdef, dict(nnx.to_flat_state(state)), ids)


def measure(text: Text, scheme: Scheme) -> Measured:
    bits = lost = size = total = 0.0
    rounded = dict(text.state)
    for path, variable in text.state.items():
        if path[-1] != "kernel" or path[-2] == "lm_head":
            continue
        weight = variable[...]
        found = jax.lax.map(scheme.rounded, weight)
        rounded[path] = variable.replace(found)
        lost += float(jnp.square(found - weight).sum())
        total += float(jnp.square(weight).sum())
        bits += weight.size * scheme.bits(*weight.shape[1:])
        size += weight.size
    states = [nnx.from_flat_state(state) for state in (text.state, rounded)]
    read = _reader(text.graphdef)
    sums = sum(np.array(read(*states, rows)) for rows in np.split(text.ids, BATCHES))
    return Measured(bits / size, (lost / total) ** 0.5, *sums / text.ids[:, 1:].size)


@functools.cache
def _reader(graphdef: nnx.GraphDef):
    @jax.jit
    def read(state, rounded, ids):
        """Sums over tokens: loss minus float32 loss, KL, and agreement on the most likely token."""
        plain, other = (
            jax.nn.log_softmax(nnx.merge(graphdef, s)(ids)[:, :-1]) for s in (state, rounded)
        )
        target = ids[:, 1:, None]
        loss = jnp.take_along_axis(plain - other, target, axis=-1).sum()
        divergence = (jnp.exp(plain) * (plain - other)).sum()
        return loss, divergence, (plain.argmax(axis=-1) == other.argmax(axis=-1)).sum()

    return read


def float_loss(text: Text) -> float:
    """Mean −log p of the text in float32."""
    model = jax.jit(lambda ids: nnx.merge(text.graphdef, nnx.from_flat_state(text.state))(ids))
    total = 0.0
    for rows in np.split(text.ids, BATCHES):
        log_p = jax.nn.log_softmax(model(rows)[:, :-1])
        total -= float(jnp.take_along_axis(log_p, rows[:, 1:, None], axis=-1).sum())
    return total / text.ids[:, 1:].size


def ours(fmt: str, search: bool = True) -> Scheme:
    """A format of this project."""
    pack = functools.partial(formats.quantize, fmt=fmt, search=search)

    def bits(rows, columns):
        shape = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        return formats.bits_per_weight(jax.eval_shape(pack, shape), rows)

    return Scheme(lambda weight: formats.dequantize(pack(weight), fmt, len(weight)), bits)


def searched(levels: np.ndarray, group: int, stored: str = "int8") -> Scheme:
    """A table of 16 levels, with the best of 2 · 32 scales per group, then refitted."""
    middles = (levels[1:] + levels[:-1]) / 2

    def rounded(weight):
        grouped = _grouped(weight, group)

        def values(scale):
            scaled = grouped * jnp.where(scale == 0, 0, 1 / scale)
            return jnp.asarray(levels)[jnp.searchsorted(middles, scaled)]

        largest = jnp.abs(grouped).max(axis=1, keepdims=True) / levels.max()

        def try_scale(index, best):
            error, scale = best
            candidate = largest * (1.1 - (index // 2) / 64) * (1 - 2 * (index % 2))
            new = jnp.square(values(candidate) * candidate - grouped).sum(axis=1, keepdims=True)
            return jnp.where(new < error, new, error), jnp.where(new < error, candidate, scale)

        start = (jnp.full_like(largest, jnp.inf), largest)
        found = values(jax.lax.fori_loop(0, 64, try_scale, start)[1])
        norm = jnp.square(found).sum(axis=1, keepdims=True)
        scale = (grouped * found).sum(axis=1, keepdims=True) / jnp.where(norm == 0, 1, norm)
        scale = _kept(scale, stored)
        return (values(scale) * scale).reshape(-1, weight.shape[1])[: len(weight)]

    return Scheme(rounded, functools.partial(_bits, group=group, stored=stored))


def zero_points(group: int, stored: str = "int8") -> Scheme:
    """Unsigned codes: (code − zero) · scale with integer zeros of 4 bits; the range is searched."""

    def rounded(weight):
        grouped = _grouped(weight, group)
        most = jnp.maximum(grouped.max(axis=1, keepdims=True), 0)
        least = jnp.minimum(grouped.min(axis=1, keepdims=True), 0)

        def codes(scale, zero):
            each = jnp.rint(grouped * jnp.where(scale == 0, 0, 1 / scale)) + zero
            return jnp.clip(each, 0, 15) - zero

        def try_range(index, best):
            # 12 upper ends × 12 lower ends
            error, scale, zero = best
            high = most * (1.05 - (index % 12) / 24)
            low = least * (1.05 - (index // 12) / 24)
            new_scale = (high - low) / 15
            new_zero = jnp.clip(jnp.rint(-low * jnp.where(new_scale == 0, 0, 1 / new_scale)), 0, 15)
            off = codes(new_scale, new_zero) * new_scale - grouped
            new = jnp.square(off).sum(axis=1, keepdims=True)
            return tuple(
                jnp.where(new < error, a, b)
                for a, b in ((new, error), (new_scale, scale), (new_zero, zero))
            )

        start = (jnp.full_like(most, jnp.inf), most, jnp.zeros_like(most))
        _, scale, zero = jax.lax.fori_loop(0, 144, try_range, start)
        found = codes(scale, zero)
        norm = jnp.square(found).sum(axis=1, keepdims=True)
        scale = (grouped * found).sum(axis=1, keepdims=True) / jnp.where(norm == 0, 1, norm)
        scale = _kept(scale, stored)
        return (codes(scale, zero) * scale).reshape(-1, weight.shape[1])[: len(weight)]

    return Scheme(rounded, functools.partial(_bits, group=group, stored=stored, zero=4))


def _grouped(weight: jax.Array, group: int) -> jax.Array:
    padded = jnp.pad(weight, ((0, -len(weight) % group), (0, 0)))
    return padded.reshape(-1, group, weight.shape[1])


def _kept(scale: jax.Array, stored: str) -> jax.Array:
    """Scales [groups, 1, N] after storage; int8 and float8 have a float32 factor per column."""
    if stored == "bfloat16":
        return scale.astype(stored).astype(jnp.float32)
    column = jnp.abs(scale).max(axis=0, keepdims=True)
    column = jnp.where(column == 0, 1, column)
    if stored == "int8":
        return jnp.rint(scale / column * 127) * (column / 127)
    return (scale / column * 448).astype(jnp.float8_e4m3fn).astype(jnp.float32) * (column / 448)


def _bits(rows: int, columns: int, *, group: int, stored: str, zero: int = 0) -> float:
    """Bits per weight in groups, each with a scale and a zero point of `zero` bits."""
    groups = -(-rows // group)
    scale, column = (16, 0) if stored == "bfloat16" else (8, 32)
    return (groups * (4 * group + scale + zero) + column) / rows


OURS = {
    **{fmt: ours(fmt) for fmt in formats.FORMATS},
    **{f"{fmt}, fast": ours(fmt, search=False) for fmt in ("int4", "int4-g64", "int4-g128")},
}
OTHERS = {
    "int4 g32, bfloat16 scales": searched(INT4, 32, "bfloat16"),
    "int4 g32, float8 scales": searched(INT4, 32, "float8"),
    "int4 g16, int8 scales": searched(INT4, 16),
    "int4 g128, 4-bit zeros, int8 scales": zero_points(128),
    "int4 g64, 4-bit zeros, int8 scales": zero_points(64),
    "int4 g32, 4-bit zeros, int8 scales": zero_points(32),
    "nf4 g128, searched, int8 scales": searched(NF4, 128),
    "nf4 g64, searched, int8 scales": searched(NF4, 64),
    "nf4 g32, searched, int8 scales": searched(NF4, 32),
}


def main() -> None:
    texts = [demo_text(), stories_text()]
    losses = " and ".join(f"{float_loss(text):.3f}" for text in texts)
    read = [f"{text.ids.size:,}" for text in texts]
    lines = [HEAD.format(demo=read[0], stories=read[1], losses=losses)]
    lines += ["| | 4096² | demo base | | | | | stories260K | | | | |", "|" + "---|" * len(COLUMNS)]
    lines.append(f"| {' | '.join(COLUMNS)} |")
    for title, table in (("", OURS), ("**not formats of this project**", OTHERS)):
        if title:
            lines.append(f"| {title} |" + " |" * (len(COLUMNS) - 1))
        for name, scheme in table.items():
            cells = [f"{scheme.bits(4096, 4096):.2f}"]
            cells += [cell for text in texts for cell in _cells(measure(text, scheme))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    OUTPUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cells(found: Measured) -> list[str]:
    return [
        f"{found.bits:.2f}",
        f"{found.error:.2%}",
        f"{1000 * found.loss:.2f}",
        f"{1000 * found.divergence:.2f}",
        f"{found.same:.1%}",
    ]


if __name__ == "__main__":
    main()
