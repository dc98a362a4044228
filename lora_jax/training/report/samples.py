"""Held-out prompts with the answers before and after training."""

from collections.abc import Mapping
from typing import Any

from lora_jax import console
from lora_jax.training.report import formatting
from lora_jax.training.report.markup import Markup, joined, tag


def samples(answers: Mapping[str, Any]) -> Markup:
    """Each prompt with its two answers, and the expected answer if neither matches it."""
    before, after = answers.get("before") or [], answers.get("after") or []
    shown = []
    for index in range(max(len(before), len(after))):
        old, new = (part[index] if index < len(part) else None for part in (before, after))
        one = new or old
        cells = [answer(label, part) for label, part in (("before", old), ("after", new)) if part]
        if not any(part and console.is_right(part) for part in (old, new)):
            cells.append(tag("div", tag("h4", "expected"), verbatim(one["expected"])))
        shown.append(tag("article", tag("h3", "Prompt"), verbatim(one["prompt"], "prompt"),
                         tag("div", *cells, class_="answers")))  # fmt: skip
    return joined(shown)


def answer(label: str, found: Mapping[str, str]) -> Markup:
    verdict = ("good", "✓ as expected") if console.is_right(found) else ("bad", "✗ not as expected")
    heading = tag("h4", label, " ", tag("span", verdict[1], class_=verdict[0]))
    return tag("div", heading, verbatim(found["text"]))


def verbatim(text: str, class_: str | None = None) -> Markup:
    # HTML drops a newline at the start of a <pre>: this one, and not one of the text.
    shown = formatting.shortened(text.rstrip("\n")) or "(nothing)"
    return tag("pre", Markup("\n"), shown, dir="auto", class_=class_)
