"""The page of a device, and README.md's section on speed, from the files in devices/."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import device_cases
import device_record

README = device_record.FOLDER.parents[1] / "README.md"
BEGIN = "<!-- speed: written by benchmarks/device.py --page -->"
END = "<!-- end of speed -->"
NOT_YET = """\
**Nothing has been run on a GPU or a TPU yet: their speed is not measured yet.** Everything runs
and is tested on CPUs. The programs for GPUs and TPUs are compiled ahead of time, and their memory
and communication are what the compilers plan. [One command](benchmarks/devices/README.md) measures
a device."""
NONE = "–"
GB = 1e9


class Goal(NamedTuple):
    """What a figure of an 8B in int4 on one H100 should be. at_most: less is better."""

    what: str
    value: Callable[[dict[str, Any]], float | None]
    limit: float
    unit: str
    at_most: bool = False

    def cells(self, record: dict[str, Any]) -> list[str]:
        found, sign = self.value(record), "≤" if self.at_most else "≥"
        goal = f"{sign} {self.limit:,.0f} {self.unit}"
        if found is None:
            return [self.what, goal, NONE, "not measured yet"]
        is_reached = found <= self.limit if self.at_most else found >= self.limit
        value = f"{found:,.1f}" if self.at_most else f"{found:,.0f}"
        return [self.what, goal, value, "reached" if is_reached else "not reached"]


def of_train(record: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """The measured training steps of an 8B in int4 with these settings."""
    wanted = {"kind": "Train", "model": device_cases.LLAMA_8B, "quant": "int4"} | settings
    return [found for found in record["cases"].values()
            if found["status"] == device_record.MEASURED
            and wanted.items() <= found["settings"].items()]  # fmt: skip


def best(record: dict[str, Any], **settings: Any) -> float | None:
    """The most tokens/s of them."""
    return max((found["tokens_per_second"] for found in of_train(record, **settings)), default=None)


def memory(record: dict[str, Any]) -> float | None:
    """GB of the step on 1 × 2048 tokens with full remat."""
    found = of_train(record, rows=1, length=2048, remat="full")
    return max((each["peak_bytes"] or each["xla_bytes"]) / GB for each in found) if found else None


def decoded(record: dict[str, Any], rows: int) -> float | None:
    """Tokens/s of so many sequences."""
    case = device_cases.Decode(device_cases.LLAMA_8B, rows=rows)
    found = device_record.outcome(record, case)
    return found["tokens_per_second"] if found and "tokens_per_second" in found else None


def longest(record: dict[str, Any]) -> int | None:
    found = device_record.outcome(record, device_cases.Longest(device_cases.LLAMA_8B))
    return found.get("length") if found else None


GOALS = (
    Goal("training, remat full", lambda r: best(r, remat="full"), 9_000, "tokens/s"),
    Goal("training, the remat that is fastest", best, 12_000, "tokens/s"),
    Goal("memory at 1 × 2048, remat full", memory, 7, "GB", at_most=True),
    Goal("decoding, 1 sequence", lambda r: decoded(r, 1), 0.6 * 683, "tokens/s"),
    Goal("decoding, 64 sequences", lambda r: decoded(r, 64), 0.6 * 16_000, "tokens/s"),
)
PUBLISHED = """\
Published by others, not measured here: NeMo AutoModel trains LoRA on an 8B in bfloat16 with 12,473
tokens/s on one H100; torchtune trains QLoRA on an 8B with 2,413 tokens/s in 7.4 GiB on an RTX 4090;
Unsloth states 342,733 tokens as the longest sequence of an 8B in 80 GB."""

MEANING = """\
Random weights; every token is trained. Seconds are the median of so many steps. N is the number of
weights that a token is multiplied by, without the embedding. MFU by 4N is 4 · N · tokens/s ÷ peak:
a frozen weight takes 2 operations of a token forward and 2 for the gradient of its input. MFU by 6N
counts 6, as if it had a gradient of its own. Neither counts attention or what is computed a second
time. Memory: as `lora-jax plan` has it, as XLA plans the program, and the peak that the allocator
measured."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gigabytes(size: float | None) -> str:
    return NONE if size is None else f"{size / GB:.2f}"


def share(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}"


def summary(found: dict[str, Any]) -> str:
    """An outcome in a few words."""
    if found["status"] != device_record.MEASURED:
        return f"{found['status']}: {found['reason']}"
    if "tokens_per_second" in found:
        return f"{found['tokens_per_second']:,.0f} tokens/s"
    if "length" in found:
        return f"{found['length']:,} tokens"
    return ", ".join(f"{n} {name}" for name, n in found.get("counts", {}).items()) or "measured"


def of_kind(record: dict[str, Any], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, found in record["cases"].items():
        if found["settings"]["kind"] == kind:
            yield name, found


def training(record: dict[str, Any]) -> Iterator[list[str]]:
    for name, found in of_kind(record, "Train"):
        if found["status"] != device_record.MEASURED:
            planned = gigabytes(found.get("planned_bytes"))
            yield [name, summary(found), NONE, NONE, NONE, planned, NONE, NONE]
            continue
        yield [
            name,
            f"{found['tokens_per_second']:,.0f}",
            f"{1e3 * found['seconds']:,.0f} ({found['number']})",
            share(found["mfu_4n"]),
            share(found["mfu_6n"]),
            *(gigabytes(found.get(f"{what}_bytes")) for what in ("planned", "xla", "peak")),
        ]


def decoding(record: dict[str, Any]) -> Iterator[list[str]]:
    copied = record["device"]["copied_bytes_per_second"]
    for name, found in of_kind(record, "Decode"):
        if found["status"] != device_record.MEASURED:
            yield [name, summary(found), *[NONE] * 5]
            continue
        moved = found.get("bytes_per_step")
        yield [
            name,
            f"{found['tokens_per_second']:,.0f}",
            f"{1e3 * found['seconds']:.2f}",
            found.get("form", NONE),
            share(moved and moved / found["seconds"] / copied),
            *(gigabytes(found.get(f"{what}_bytes")) for what in ("planned", "peak")),
        ]


def products(record: dict[str, Any]) -> Iterator[list[str]]:
    for name, found in of_kind(record, "Matmul"):
        if found["status"] != device_record.MEASURED:
            yield [name, NONE, summary(found), *[NONE] * 3]
        size = found["settings"]["k"] * found["settings"]["n"]
        for each in found.get("products", ()):
            yield [
                name,
                str(each["rows"]),
                each["form"],
                f"{1e6 * each['seconds']:.1f}",
                f"{2 * each['rows'] * size / each['seconds'] / 1e12:.1f}",
                f"{each['error']:.0e}" if "error" in each else NONE,
            ]


def page(record: dict[str, Any]) -> str:
    """The Markdown page of a record."""
    device = record["device"]
    commits = sorted({found["commit"] or "unknown" for found in record["cases"].values()})
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    peak = device["peak_flops"]
    text = [
        f"# {device['kind']}",
        "Written by `python benchmarks/device.py --page`; do not edit.",
    ]
    if record["tiny"]:
        text.append("**A rehearsal: the figures mean nothing.**")
    text += [
        f"{record['date']}, commit {', '.join(commits)}. {versions}, Python {device['python']}. "
        f"{device['runtime']}.",
        f"All figures are of one device, of which JAX may use {gigabytes(device['memory'])} GB. "
        f"A copy moves {device['copied_bytes_per_second'] / 1e12:.2f} TB/s. "
        + (f"Published peak: {peak / 1e12:.0f} TFLOP/s in bfloat16." if peak else
           "Its published peak is not known here, so there are no MFUs."),
        "## Goals\n\nFor an 8B in int4 on one H100.",
        table(("", "goal", "here", ""), [goal.cells(record) for goal in GOALS]),
        PUBLISHED,
        "## Correctness",
    ]  # fmt: skip
    checks = [[name, summary(found)] for kind in ("Doctor", "Tests")
              for name, found in of_kind(record, kind)]  # fmt: skip
    text += [
        table(("", ""), checks or [["pytest -m device", "not measured yet"]]),
        "## Training",
        MEANING,
        table(
            ("", "tokens/s", "ms a step", "MFU 4N", "MFU 6N", "plan, GB", "XLA, GB", "peak, GB"),
            list(training(record)),
        ),
        "## Longest sequence",
        *lengths(record),
        "## Decoding",
        "Greedy, with an adapter of rank 8 on q and v. The share is of what a copy moves.",
        table(
            ("", "tokens/s", "ms a step", "form of the weights", "bandwidth", "plan, GB",
             "peak, GB"),
            list(decoding(record)),
        ),
        "## Products",
        "Each form is compared with the dequantized weight before it is timed: ‖error‖ ÷ ‖result‖.",
        table(("", "rows", "form", "µs", "TFLOP/s", "error"), list(products(record))),
    ]  # fmt: skip
    return "\n\n".join(text) + "\n"


def lengths(record: dict[str, Any]) -> Iterator[str]:
    found = dict(of_kind(record, "Longest"))
    if not found:
        yield "Not measured yet."
    for name, each in found.items():
        planned = each.get("planned_length")
        yield f"{name}: {summary(each)}." + (f" Planned: {planned:,} tokens." if planned else "")
        rows = []
        for tried in each.get("attempts", ()):
            seconds = tried.get("seconds")
            ended = (
                f"{seconds:,.1f}" if seconds else "ran, not waited for" if tried["fits"] else NONE
            )
            sizes = (gigabytes(tried.get(f"{what}_bytes")) for what in ("xla", "peak"))
            rows.append([f"{tried['length']:,}", tried["status"], ended, *sizes])
        yield table(("tokens", "", "seconds", "XLA, GB", "peak, GB"), rows)


def section(records: Sequence[dict[str, Any]]) -> str:
    """README.md's text on the speed of GPUs and TPUs."""
    if not records:
        return NOT_YET

    def number(value: float | None) -> str:
        return "not measured yet" if value is None else f"{value:,.0f}"

    rows = []
    for record in records:
        kind = record["device"]["kind"]
        link = device_record.path(pathlib.Path("benchmarks/devices"), kind).with_suffix(".md")
        used = memory(record)
        rows.append([
            f"[{kind}]({link.as_posix()})",
            number(best(record, remat="full")),
            number(best(record)),
            "not measured yet" if used is None else f"{used:.1f} GB",
            number(decoded(record, 1)),
            number(decoded(record, 64)),
            number(longest(record)),
        ])  # fmt: skip
    heads = ("Llama-3.1-8B in int4 on one", "training, full remat, tokens/s",
             "the fastest remat, tokens/s", "memory at 1 × 2048", "decoding 1, tokens/s",
             "decoding 64, tokens/s", "longest sequence, tokens")  # fmt: skip
    return table(heads, rows) + (
        "\n\nMeasured on random weights. [One command](benchmarks/devices/README.md) measures a "
        "device;\nothers have not been measured yet."
    )


def inserted(text: str, own: str) -> str:
    """The text with `own` between the markers."""
    before, found, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"expected the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{own}\n{END}{after}"


def write_all(folder: pathlib.Path) -> None:
    """The page beside each file of the folder; README.md, if it is the folder of measurements."""
    for file in sorted(folder.glob("*.json")):
        file.with_suffix(".md").write_text(page(device_record.read(file)))
    if folder.resolve() == device_record.FOLDER and README.exists():
        own = section(device_record.all_of(folder))
        README.write_text(inserted(README.read_text(), own))
