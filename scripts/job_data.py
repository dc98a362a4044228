"""The data of a job: read, encoded, held out, and dealt out in batches."""

import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import arguments
import console
from console import say

from lora_jax import batches, data, errors, mixture, sources, tokenizer

if TYPE_CHECKING:
    import datasets
    import transformers

HELD_OUT = 0.02  # share of the rows, when --eval-every has no --eval-dataset


class Rows(NamedTuple):
    """What was read, and of it or besides it what is held out: a part for each source."""

    train: "list[datasets.Dataset]"
    held_out: "list[datasets.Dataset]"


def read(settings: dict[str, Any]) -> Rows:
    """The rows to train on, and those held out, if any."""
    held_out = [settings["eval_dataset"]] if settings.get("eval_dataset") else []
    names = settings["dataset"]
    loaded = sources.load_all([*names, *held_out], settings.get("columns"))
    train, held_out = loaded[: len(names)], loaded[len(names) :]
    if settings.get("eval_every") and not held_out:
        split = [sources.holdout(rows, HELD_OUT, settings["seed"]) for rows in train]
        train, held_out = map(list, zip(*split, strict=True))
    return Rows(train, held_out)


class Data:
    """What a job trains on, step by step, and what it is evaluated on."""

    def __init__(
        self,
        settings: dict[str, Any],
        rows: Rows,
        reader: "transformers.PreTrainedTokenizerBase",
        eos: int,
        context: int,
    ):
        """context: tokens that the model takes at most. Sets settings["seq_len"]."""
        self._settings, self._reader, self._eos, self._context = settings, reader, eos, context
        self._seq_len = settings["seq_len"] = arguments.sequence_length(settings, context)
        self._in_pairs = bool(settings.get("dpo"))
        self._arrange = functools.partial(
            batches.arrange,
            seq_len=self._seq_len,
            packing=bool(settings.get("packing")),
            in_pairs=self._in_pairs,
        )
        encoded = [
            self._encode("data", source, part).rows
            for source, part in zip(settings["dataset"], rows.train, strict=True)
        ]
        self.held_out: list[batches.Line] | None = None
        self.scored: list[tuple[Any, str]] | None = None
        self.longest_answer = 0  # tokens
        if rows.held_out:
            self._hold_out(rows.held_out)
        self.num_steps = settings.get("max_steps")
        self.batches = self._deal_out(encoded)
        self.fingerprints = {
            "train": sources.fingerprint(*rows.train),
            "held out": sources.fingerprint(*rows.held_out) if rows.held_out else None,
        }

    def _deal_out(self, encoded: list[list[data.Row]]) -> batches.Batches:
        """Batches of the rows of each source; says how they come, and sets `num_steps`."""
        settings, weights = self._settings, self._settings.get("weights")
        if weights is None:  # as one source: each row once an epoch
            encoded = [list(itertools.chain(*encoded))]
        parts = [self._arrange(rows) for rows in encoded]
        lines = list(itertools.chain(*parts))
        length = min(arguments.line_length(settings), batches.longest(lines))
        if settings.get("packing"):
            say("packed", f"{len(lines)} lines of {length} tokens, "
                f"{batches.filled(lines, length):.1%} filled")  # fmt: skip
        seed = settings["seed"]
        shuffled = [batches.Shuffled(part, seed, number) for number, part in enumerate(parts)]
        made = batches.Batches(
            shuffled[0] if weights is None else mixture.Mixture(shuffled, weights),
            batch_size=settings["batch_size"],
            grad_accum=settings["grad_accum"],
            length=length,
        )
        self.num_steps = self.num_steps or made.num_steps(settings["epochs"])
        if weights is not None:
            sizes, shown = [*map(len, parts)], self.num_steps * made.step_size
            shares = mixture.shares(weights)
            say("mixture", console.mixture(settings["dataset"], shares, sizes, shown))
        if settings.get("group_by_length"):
            made = batches.ByLength(made, self.num_steps, seed)
            lengths = ", ".join(map(str, made.used))
            say("grouped", f"lines of {lengths} tokens, each length compiled once, "
                f"{made.filled:.1%} filled")  # fmt: skip
        if settings["warmup"] >= max(1, self.num_steps):
            raise errors.UserError(
                expected=f"a warmup shorter than the run of {self.num_steps} steps",
                found=f"--warmup {settings['warmup']:g}",
                do="fewer steps of warmup, or a share below 1",
            )
        return made

    def _hold_out(self, parts: "list[datasets.Dataset]") -> None:
        settings, own = self._settings, self._settings.get("eval_dataset")
        names = [own] if own else [f"held out of {console.near(n)}" for n in settings["dataset"]]
        encoded = (self._encode("held out", *of) for of in zip(names, parts, strict=True))
        self.held_out = self._arrange([row for each in encoded for row in each.rows])
        if not settings["exact_match"]:
            return
        # As many of each source.
        turns = itertools.zip_longest(*parts)
        rows = itertools.islice((r for turn in turns for r in turn if r), settings["exact_match"])
        self.scored = data.prompts(list(rows), self._reader)
        answers = tokenizer.encode(self._reader, [text for _, text in self.scored])
        self.longest_answer = max(map(len, answers)) + 1  # and EOS
        longest = max(len(ids) for ids, _ in self.scored) + self.longest_answer
        if longest > self._context:
            raise errors.UserError(
                expected=f"answers within the model's context of {self._context} tokens",
                found=f"{longest} tokens in the longest prompt and the longest answer",
                where=f"--exact-match, {', '.join(names)}",
                do="shorten these rows, or leave --exact-match out",
            )

    def _encode(self, label: str, source: str, rows: "datasets.Dataset") -> data.Encoded:
        encode = data.encode_pairs if self._in_pairs else data.encode
        encoded = encode(rows, self._reader, self._seq_len, self._eos)
        say(
            label,
            f"{len(encoded.rows)} rows, {sum(len(ids) for ids, _ in encoded.rows)} tokens, "
            f"{encoded.num_cut} cut at {self._seq_len}, {encoded.num_skipped} skipped: "
            f"{console.near(source)}",
        )
        return encoded
