"""The scores of each member of a sweep, from metrics.jsonl, as a table."""

import math
from collections.abc import Iterable, Mapping, Sequence

from lora_jax.training.output import run_folder

Table = run_folder.Scores
_COLUMNS = {"first_loss": "first loss", "loss": "last loss", "eval_loss": "held-out",
            "perplexity": "perplexity", "exact_match": "exact match"}  # fmt: skip


def table(names: Iterable[str], metrics: Sequence[run_folder.MetricsLine]) -> Table:
    """{member: first and last training loss, last held-out scores}.

    A member whose loss was not finite has "lost", the step of this, instead of held-out scores.
    """
    found: Table = {}
    for name in names:
        losses = [(row["step"], row[f"loss/{name}"], row.get(f"grad_norm/{name}"))
                  for row in metrics if f"loss/{name}" in row]  # fmt: skip
        own = found[name] = {}
        if losses:
            own |= {"first_loss": losses[0][1], "loss": losses[-1][1]}
            if None in losses[-1]:
                found[name] = own | {"lost": losses[-1][0]}
                continue
        for score in ("eval_loss", "exact_match"):
            logged = [row[f"{score}/{name}"] for row in metrics if f"{score}/{name}" in row]
            own |= {score: logged[-1]} if logged else {}
        if (loss := own.get("eval_loss")) is not None and loss < 700:
            own["perplexity"] = math.exp(loss)
    return found


def best(found: Table) -> str | None:
    """The member with the lowest held-out loss, or training loss if there is no held-out data."""
    by = "eval_loss" if any("eval_loss" in own for own in found.values()) else "loss"
    known = {name: own[by] for name, own in found.items()
             if "lost" not in own and own.get(by) is not None}  # fmt: skip
    return min(known, key=known.__getitem__) if known else None


def columns(found: Table, *, perplexity: bool) -> dict[str, str]:
    """{key: heading} of the scores that any member has."""
    return {key: heading for key, heading in _COLUMNS.items()
            if any(key in own for own in found.values())
            and (perplexity or key != "perplexity")}  # fmt: skip


def cell(own: Mapping[str, float | None], key: str) -> str:
    """A score of a member as the table shows it."""
    value = own.get(key)
    if key == "loss" and "lost" in own:
        return f"not finite at step {own['lost']}"
    if value is None:
        return "–"
    if key == "exact_match":
        return f"{value:.1%}"
    return f"{value:.4g}" if key == "perplexity" else f"{value:.4f}"


def lines(found: Table, *, perplexity: bool) -> list[str]:
    """The lines of the table, with the best member marked."""
    shown, first = columns(found, perplexity=perplexity), best(found)
    rows = [["", *shown.values()]]
    rows += [[name, *(cell(own, key) for key in shown)] for name, own in found.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown_rows = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        shown_rows.append("  ".join(cells) + ("  ← best" if row[0] and row[0] == first else ""))
    return shown_rows
