"""The data of a job: read, encoded, held out, and dealt out in batches."""

import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_jax import console, errors, tokenizer
from lora_jax.console import say
from lora_jax.data import batches, encoding, mixture, packing, sources, stream
from lora_jax.training import settings as training_settings

if TYPE_CHECKING:
    import datasets
    import transformers

HELD_OUT = 0.02  # share of the rows, when --eval-every has no --eval-dataset
AT_HAND = 8  # steps whose lines of a stream stay in memory: more than are made ahead


class Rows(NamedTuple):
    """What was read, and of it or besides it what is held out: a part for each source."""

    train: "list[datasets.Dataset]"
    held_out: "list[datasets.Dataset]"


def read(settings: dict[str, Any]) -> Rows:
    """The rows to train on, or of streams the first ones, and those held out, if any."""
    names, own = settings["dataset"], settings.get("eval_dataset")
    counts = [sources.HEAD if settings.get("streaming") else None] * len(names)
    if own:
        names, counts = [*names, own], [*counts, None]
    train = sources.load_all(names, settings.get("columns"), counts)
    if own:
        return Rows(train[:-1], train[-1:])
    if not settings.get("eval_every"):
        return Rows(train, [])
    split = [sources.holdout(rows, HELD_OUT, settings["seed"]) for rows in train]
    return Rows(*map(list, zip(*split, strict=True)))


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
        self._seq_len = settings["seq_len"] = training_settings.sequence_length(settings, context)
        self._in_pairs = bool(settings.get("dpo"))
        self._arrange = functools.partial(
            packing.arrange,
            seq_len=self._seq_len,
            packing=bool(settings.get("packing")),
            in_pairs=self._in_pairs,
        )
        self._streaming = bool(settings.get("streaming"))
        label = "stream" if self._streaming else "data"
        encoded = [
            self._encode(label, source, part).examples
            for source, part in zip(settings["dataset"], rows.train, strict=True)
        ]
        self.held_out: list[packing.TokenSequence] | None = None
        self.scored: list[tuple[Any, str]] | None = None
        self.longest_answer = 0  # tokens
        if rows.held_out:
            self._hold_out(rows.held_out)
        self._streams: list[stream.Stream] = []
        self.batches = self._stream_out(encoded) if self._streaming else self._deal_out(encoded)
        self.num_steps: int = settings.get("max_steps") or self.batches.num_steps(
            settings["epochs"]
        )
        self._say_mixture()
        if settings.get("group_by_length"):
            self.batches = batches.ByLength(self.batches, self.num_steps, settings["seed"])
            lengths = ", ".join(map(str, self.batches.used))
            say("grouped", f"lines of {lengths} tokens, each length compiled once, "
                f"{self.batches.filled:.1%} filled")  # fmt: skip
        if settings["warmup"] >= max(1, self.num_steps):
            raise errors.UserError(
                expected=f"a warmup shorter than the run of {self.num_steps} steps",
                found=f"--warmup {settings['warmup']:g}",
                do="fewer steps of warmup, or a share below 1",
            )
        told = sources.fingerprint(*rows.train)
        if self._streaming:
            versions = map(sources.version, settings["dataset"])
            told = ", ".join([f"{told} of the first rows", *versions])
        self.fingerprints = {
            "train": told,
            "held out": sources.fingerprint(*rows.held_out) if rows.held_out else None,
        }

    def keep(self, folder: pathlib.Path, *, write: bool) -> None:
        """Has what a run must know of its streams, to go on without reading all again, in files."""
        for number, each in enumerate(self._streams):
            each.keep(folder / f"{number}.jsonl", write=write)

    def _deal_out(self, encoded: list[list[encoding.Example]]) -> batches.Batches:
        """Batches of the rows of each source, shuffled."""
        settings, weights = self._settings, self._settings.get("weights")
        if weights is None:  # as one source: each row once an epoch
            encoded = [list(itertools.chain(*encoded))]
        parts = [self._arrange(rows) for rows in encoded]
        lines = list(itertools.chain(*parts))
        length = min(training_settings.line_length(settings), packing.longest(lines))
        if settings.get("packing"):
            say("packed", f"{len(lines)} lines of {length} tokens, "
                f"{packing.filled(lines, length):.1%} filled")  # fmt: skip
        seed = settings["seed"]
        return self._batches(
            [batches.Shuffled(part, seed, number) for number, part in enumerate(parts)], length
        )

    def _stream_out(self, encoded: list[list[encoding.Example]]) -> batches.Batches:
        """Batches of streams, of which `encoded` are the first rows."""
        settings, length = self._settings, training_settings.line_length(self._settings)
        lines = [line for rows in encoded for line in self._arrange(rows)]
        say("streaming", f"lines of {length} tokens, {packing.filled(lines, length):.1%} filled by "
            f"these; in blocks of {stream.BLOCK} rows, which are shuffled")  # fmt: skip
        encode = encoding.encode_pairs if self._in_pairs else encoding.encode

        def arrange(rows: "datasets.Dataset") -> list[packing.TokenSequence]:
            made = encode(rows, self._reader, self._seq_len, self._eos, may_be_empty=True)
            return self._arrange(made.examples)

        self._streams = [
            stream.Stream(
                source,
                arrange,
                columns=settings.get("columns"),
                seed=settings["seed"],
                number=number,
                window=AT_HAND * settings["batch_size"] * settings["grad_accum"],
            )
            for number, source in enumerate(settings["dataset"])
        ]
        return self._batches(self._streams, length)

    def _batches(self, parts: Sequence[mixture.Source], length: int) -> batches.Batches:
        settings, weights = self._settings, self._settings.get("weights")
        return batches.Batches(
            parts[0] if weights is None else mixture.Mixture(parts, weights),
            batch_size=settings["batch_size"],
            grad_accum=settings["grad_accum"],
            length=length,
        )

    def _say_mixture(self) -> None:
        mixed = self.batches.sequences
        if isinstance(mixed, mixture.Mixture):
            sizes = None if self._streaming else [*map(len, mixed.sources)]
            shown = self.num_steps * self.batches.step_size
            shares = mixture.shares(mixed.weights)
            say("mixture", console.mixture(self._settings["dataset"], shares, sizes, shown))

    def _hold_out(self, parts: "list[datasets.Dataset]") -> None:
        settings, own = self._settings, self._settings.get("eval_dataset")
        names = [own] if own else [f"held out of {console.near(n)}" for n in settings["dataset"]]
        encoded = (self._encode("held out", *of) for of in zip(names, parts, strict=True))
        self.held_out = self._arrange([row for each in encoded for row in each.examples])
        if not settings["exact_match"]:
            return
        # As many of each source.
        turns = itertools.zip_longest(*parts)
        rows = itertools.islice((r for turn in turns for r in turn if r), settings["exact_match"])
        self.scored = encoding.prompts(list(rows), self._reader)
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

    def _encode(self, label: str, source: str, rows: "datasets.Dataset") -> encoding.Encoded:
        encode = encoding.encode_pairs if self._in_pairs else encoding.encode
        encoded = encode(rows, self._reader, self._seq_len, self._eos)
        first = "of its first rows " if label == "stream" else ""
        say(
            label,
            f"{first}{len(encoded.examples)} rows, "
            f"{sum(len(ids) for ids, _ in encoded.examples)} tokens, "
            f"{encoded.num_cut} cut at {self._seq_len}, {encoded.num_skipped} skipped: "
            f"{console.near(source)}",
        )
        return encoded
