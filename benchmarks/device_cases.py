"""What device.py measures, the most valuable first, and the formulas for what it derives from it.

A case is a NamedTuple of its settings. Every field may differ between two cases; the name of a case
has them all.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import architectures

# "tiny" rehearses.
MODELS = architectures.MODELS | {"tiny": (256, 128, 256, 2, 4, 4, False)}
LLAMA_8B, LLAMA_7B = "Llama-3.1-8B", "Llama-2-7B"
EXAMPLES = 4  # of a packed sequence
NEAR = 0.02  # two lengths are as good as the same if they differ by this share of the longer one
QV = ("q_proj", "v_proj")
EXPECTED = 50  # seconds of a case, an estimate
REST, AT_ONCE = 8, 9  # the first part with the rest of `grid`, and the cases in such a part


class Doctor(NamedTuple):
    """What `lora-jax doctor` says of the installation."""

    @property
    def name(self) -> str:
        return "doctor"


class Tests(NamedTuple):
    """The tests of the device tier. chosen: more arguments of pytest."""

    chosen: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(["pytest -m device", *self.chosen])


class Train(NamedTuple):
    """A training step on `rows` sequences of `length` tokens.

    packed: each sequence is of EXAMPLES examples. peer: PEFT with bitsandbytes, where remat "full"
    is gradient checkpointing.
    """

    model: str
    quant: str = "int4"
    rank: int = 8
    targets: str | tuple[str, ...] = QV
    rows: int = 4
    length: int = 2048
    remat: str = "full"
    packed: bool = False
    peer: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def name(self) -> str:
        packed = f" packed ({EXAMPLES} examples each)" if self.packed else ""
        return (f"{_of(self)}, {adapter(self)}, {self.rows} × {self.length:,}{packed}, "
                f"remat {self.remat}")  # fmt: skip


class Decode(NamedTuple):
    """Greedy steps of `rows` sequences, from the end of prompts, with an adapter of rank 8 on q, v.

    form: of the weights, "best" as the engine chooses, or "stored".
    """

    model: str
    quant: str = "int4"
    rows: int = 1
    prompt: int = 128
    new: int = 128
    form: str = "best"
    peer: bool = False

    @property
    def name(self) -> str:
        form = "" if self.peer else f", {self.form} form of the weights"
        return f"decode {_of(self)}, {self.rows} × ({self.prompt} + {self.new}){form}"


class Longest(NamedTuple):
    """The longest sequence that a training step takes. most: none longer is tried."""

    model: str
    quant: str = "int4"
    rank: int = 8
    targets: str | tuple[str, ...] = QV
    remat: str = "full"
    unit: int = 1024
    most: int | None = None

    @property
    def name(self) -> str:
        return f"longest sequence of {_of(self)}, {adapter(self)}, remat {self.remat}"

    def step(self, tokens: int) -> Train:
        """The training step on one sequence of so many tokens."""
        return Train(self.model, self.quant, self.rank, self.targets, 1, tokens, self.remat)


class Matmul(NamedTuple):
    """Products of x [rows, k] with random weights [k, n], in each form that takes them.

    weights: bytes of packed words to cycle through, so that a GPU's cache does not help.
    """

    k: int
    n: int
    rows: tuple[int, ...]
    quant: str = "int4"
    weights: int = 400_000_000
    peer: bool = False

    @property
    def name(self) -> str:
        by = "bitsandbytes" if self.peer else "lora_jax"
        return f"products {self.k} × {self.n}, {self.quant}, {by}"


KINDS = {kind.__name__: kind for kind in (Doctor, Tests, Train, Decode, Longest, Matmul)}
Case = Doctor | Tests | Train | Decode | Longest | Matmul


class Planned(NamedTuple):
    """A case, the part that it is in, and the seconds it is expected to take at most."""

    part: int
    case: Case
    expected: float


def fields(case: Case) -> dict[str, Any]:
    """The settings of a case as JSON has them; `read` is the inverse."""
    each = {name: list(value) if isinstance(value, tuple) else value
            for name, value in case._asdict().items()}  # fmt: skip
    return {"kind": type(case).__name__, **each}


def read(given: dict[str, Any]) -> Case:
    each = {name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items() if name != "kind"}  # fmt: skip
    return KINDS[given["kind"]](**each)


def adapter(case: Train | Longest) -> str:
    where = case.targets if isinstance(case.targets, str) else ", ".join(
        name.removesuffix("_proj") for name in case.targets
    )  # fmt: skip
    return f"rank {case.rank} on {where}"


def _of(case: Train | Decode | Longest) -> str:
    by = "PEFT and bitsandbytes, " if getattr(case, "peer", False) else ""
    return f"{by}{case.model} {case.quant}"


def full() -> list[Planned]:
    """All parts. One setting at a time differs from 4 × 2048 of an 8B in int4, rank 8, full remat.

    Part 1 has what the goals are about. The parts from REST on have the rest of `grid`.
    """
    eight, seven = Train(LLAMA_8B), Train(LLAMA_7B)
    linear = {"rank": 16, "targets": "all-linear"}
    sixteen = {"rows": 16, "packed": True}
    goals = [
        eight,
        eight._replace(rows=1),
        eight._replace(remat="dots"),
        Decode(LLAMA_8B),
        Decode(LLAMA_8B, rows=64),
        eight._replace(remat="none"),
        eight._replace(**sixteen),
        Decode(LLAMA_8B, rows=8),
    ]
    training = [
        eight._replace(packed=True),
        eight._replace(**linear),
        eight._replace(quant="nf4"),
        seven,
        eight._replace(**sixteen, remat="dots"),
        eight._replace(rows=1, remat="none"),
        seven._replace(quant="nf4"),
        eight._replace(rows=1, remat="dots"),
    ]
    more_training = [
        eight._replace(quant="nf4", rows=1),
        eight._replace(quant="nf4", **linear),
        seven._replace(**linear, rows=1),
        seven._replace(**sixteen),
        eight._replace(**sixteen, remat="none"),
    ]
    nf4, decode_nf4 = eight._replace(quant="nf4", peer=True), Decode(LLAMA_8B, "nf4", peer=True)
    peers = [
        nf4,
        nf4._replace(rows=1),
        decode_nf4,
        decode_nf4._replace(rows=64),
        seven._replace(quant="nf4", peer=True),
        nf4._replace(**linear),
        decode_nf4._replace(rows=8),
        nf4._replace(rows=16),
    ]
    decode = [
        Decode(LLAMA_8B, "nf4"),
        Decode(LLAMA_8B, "nf4", 64),
        Decode(LLAMA_8B, "nf4", 8),
        Decode(LLAMA_7B),
        Decode(LLAMA_7B, rows=64),
        Decode(LLAMA_8B, form="stored"),
        Decode(LLAMA_8B, rows=64, form="stored"),
    ]
    rows = (1, 4, 16, 64, 2048, 8192)
    shapes = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 6144))
    products = [Matmul(k, n, rows, quant) for quant in ("int4", "nf4") for k, n in shapes]
    products = products[:6] + [case._replace(peer=True) for case in products[4:6]]
    first = [
        Planned(1, Doctor(), 30),
        *(Planned(1, case, EXPECTED) for case in goals),
        Planned(2, Tests(), 420),
        *(Planned(3, case, EXPECTED) for case in training),
        *(Planned(4, case, EXPECTED) for case in (*more_training, *decode[:3])),
        *(Planned(5, case, EXPECTED) for case in peers),
        *(Planned(6, case, EXPECTED) for case in decode[3:]),
        Planned(6, Longest(LLAMA_8B), 200),
        *(Planned(7, case, EXPECTED) for case in products),
    ]
    known = {planned.case for planned in first}
    rest = [case for case in grid() if case not in known]
    parts = (REST + index // AT_ONCE for index in range(len(rest)))
    return first + [Planned(*each, EXPECTED) for each in zip(parts, rest, strict=True)]


def grid() -> list[Train]:
    """Training in every combination of model, format, adapter, batch and remat: 72 cases."""
    adapters = {"rank": 8}, {"rank": 16, "targets": "all-linear"}
    batches = {"rows": 4}, {"rows": 1}, {"rows": 16, "packed": True}
    each = itertools.product(
        (LLAMA_8B, LLAMA_7B), ("int4", "nf4"), adapters, batches, ("full", "dots", "none")
    )
    return [Train(model, quant, **adapter, **batch, remat=remat)
            for model, quant, adapter, batch, remat in each]  # fmt: skip


def tiny() -> list[Planned]:
    """The same kinds, at a size that measures nothing."""
    small = Train("tiny", length=32, rows=2)
    product = Matmul(256, 192, (1, 64), weights=2 * 256 * 192)
    decode = Decode("tiny", rows=2, prompt=16, new=4)
    packed = small._replace(remat="none", packed=True, quant="nf4")
    return [
        Planned(1, Doctor(), 1),
        Planned(1, small._replace(targets="all-linear"), 1),
        Planned(1, decode, 1),
        Planned(2, Tests(("tests/kernels/test_kernels.py", "-k", "swiglu or embedding")), 1),
        Planned(3, packed, 1),
        Planned(4, decode._replace(form="stored"), 1),
        Planned(5, small._replace(peer=True, quant="nf4"), 1),
        Planned(5, decode._replace(peer=True, quant="nf4"), 1),
        Planned(6, Longest("tiny", unit=16, most=64), 1),
        Planned(7, product, 1),
        Planned(7, product._replace(quant="nf4", peer=True), 1),
    ]


def num_weights(architecture: Sequence[Any]) -> int:
    """N: the number of weights that a token is multiplied by, all except the embedding's."""
    vocab, hidden, ffn, layers, heads, kv_heads, _ = architecture
    attention = 2 * hidden * hidden * (1 + kv_heads / heads)
    return int(layers * (attention + 3 * hidden * ffn) + vocab * hidden)


def mfu(rate: float, weights: int, per_weight: int, peak: float | None) -> float | None:
    """per_weight · N · tokens/s ÷ the published peak of the chip; None where that is unknown.

    per_weight 4: a frozen weight takes 2 operations of a token forward and 2 for the gradient of
    its input. 6: as if it had a gradient of its own, as most publications count. Neither counts
    attention or what is computed a second time.
    """
    return rate * per_weight * weights / peak if peak else None


def next_length(
    planned: int, fits: Sequence[int], fails: Sequence[int], unit: int, most: int | None
) -> int | None:
    """The length to try next; None if the longest is known within NEAR.

    The plan's own length first. From there, steps that double, up or down, until one length fits
    and a longer one does not; then their middle.
    """

    def whole(length: float) -> int:
        rounded = max(1, math.floor(length / unit)) * unit
        return rounded if most is None else min(rounded, most)

    best, worst = max(fits, default=0), min(fails, default=None)
    if not fits and worst is None:
        return whole(planned)
    if worst is None:
        step = NEAR * planned * 2 ** (len(fits) - 1)
        found = whole(max(best + step, best + unit))
    elif not fits:
        found = whole(worst - NEAR * planned * 2 ** (len(fails) - 1))
    elif worst - best <= max(unit, NEAR * worst):
        return None
    else:
        found = whole((best + worst) / 2)
    return None if found in (*fits, *fails) else found
