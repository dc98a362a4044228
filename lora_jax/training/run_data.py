"""The data of a run: read, split into training and held-out data, encoded, and batched."""

import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_jax import console, errors, tokenizer
from lora_jax.console import say
from lora_jax.data import (
    bad_rows,
    batches,
    encoding,
    fields,
    mixture,
    packing,
    rows,
    sources,
    stream,
)
from lora_jax.data.chats import chat
from lora_jax.data.examples import as_chats
from lora_jax.training.settings import groups

if TYPE_CHECKING:
    import transformers

AT_HAND = 8  # steps of a stream whose sequences stay in memory: more than are prefetched


class Read(NamedTuple):
    """The data sets as read, one per source: those to train on, and those held out.

    bad: the rows that were skipped.
    """

    train: list[rows.Rows]
    held_out: list[rows.Rows]
    bad: bad_rows.BadRows


def read(settings: groups.TrainSettings) -> Read:
    """The training data and the held-out data; of a stream only its first examples."""
    bad = bad_rows.BadRows(settings.data.skip_bad_rows)
    train = load(settings.data, bad)
    if settings.data.eval_dataset:
        return Read(train[:-1], train[-1:], bad)
    if not settings.eval.eval_every:
        return Read(train, [], bad)
    seed = settings.loop.seed
    split = [sources.holdout(examples, settings.eval.eval_size, seed) for examples in train]
    return Read(*map(list, zip(*split, strict=True)), bad)


def load(data: groups.DataSettings, bad: bad_rows.BadRows) -> list[rows.Rows]:
    """The data sets, the held-out one last; of a stream only its first examples.

    Says which files were chosen, and which columns are not used. bad: counts the rows skipped.
    """
    names = list(data.dataset)
    counts = [sources.HEAD if data.streaming else None] * len(names)
    if data.eval_dataset:
        names, counts = [*names, data.eval_dataset], [*counts, None]
    loaded = sources.load_all(names, data.columns, counts, bad)
    for note in filter(None, map(sources.note, dict.fromkeys(names))):
        say("files", note)
    for source, found in zip(names, loaded, strict=True):
        if unused := fields.unused(found, in_pairs=data.dpo, as_chat=data.as_chat):
            say("columns", f"not used of {console.near(source)}: {unused}{_use(data, unused)}")
    return loaded


def _use(data: groups.DataSettings, unused: str) -> str:
    """Which flag would use these columns; "" for none."""
    names = set(unused.split(", "))
    if not data.dpo and {"chosen", "rejected"} <= names:
        return "; --dpo trains on chosen and rejected"
    if not data.as_chat and "system" in names:
        return "; --as-chat puts system into the chat template"
    return ""


def encode(
    data: groups.DataSettings,
    examples: rows.Rows,
    reader: "transformers.PreTrainedTokenizerBase",
    eos: int,
    vocabulary: int,
    bad: bad_rows.BadRows,
    *,
    may_be_empty: bool = False,
) -> tuple[rows.Rows, encoding.Encoded]:
    """(the examples that are not skipped as bad, encoded). Says what is skipped.

    data: with seq_len resolved. vocabulary: the rows of the model's embedding. bad: counts the rows
    skipped. may_be_empty: see encoding.encode.
    """
    how = encoding.encode_pairs
    if not data.dpo:
        how = functools.partial(
            encoding.encode, split_texts=data.split_texts, train_on_inputs=data.train_on_inputs
        )

    def encoded_as_asked(some: rows.Rows, empty: bool) -> encoding.Encoded:
        each = as_chats.convert(some, in_pairs=data.dpo) if data.as_chat else some
        return how(each, reader, data.seq_len, eos, may_be_empty=empty)

    kept, encoded = bad_rows.encode(
        examples,
        encoded_as_asked,
        bad,
        may_be_empty=may_be_empty,
    )
    if news := bad.news():
        say("bad rows", news)
    tokenizer.check_ids(reader, (ids for ids, _ in encoded.rows), vocabulary)
    return kept, encoded


class RunData:
    """The batches that a run trains on, and its held-out data."""

    def __init__(
        self,
        settings: groups.TrainSettings,
        found: Read,
        reader: "transformers.PreTrainedTokenizerBase",
        eos: int,
        context: int,
        vocabulary: int,
    ):
        """settings: with seq_len resolved. context: the model's maximum number of tokens.
        vocabulary: the rows of its embedding."""
        self._settings, self._reader, self._context = settings, reader, context
        self._data, self._loop, self._bad = settings.data, settings.loop, found.bad
        self._encoded = functools.partial(
            encode, self._data, reader=reader, eos=eos, vocabulary=vocabulary, bad=self._bad
        )
        self._arrange = functools.partial(
            packing.arrange,
            seq_len=self._data.seq_len,
            packing=self._data.packing,
            in_pairs=self._data.dpo,
        )
        self.has_chats = False
        self.used = np.zeros(vocabulary, bool)  # which tokens there are; of a stream, so far
        label = "stream" if self._data.streaming else "data"
        encoded = [
            self._encode(label, source, part)[1].rows
            for source, part in zip(self._data.dataset, found.train, strict=True)
        ]
        if self.has_chats and (note := chat.end_note(reader)):
            say("chats", note)
        self.held_out: list[packing.TokenSequence] | None = None
        self.scored: list[tuple[Any, str]] | None = None
        self.longest_answer = 0  # tokens
        if found.held_out:
            self._hold_out(found.held_out)
        self._streams: list[stream.Stream] = []
        arrange = self._from_streams if self._data.streaming else self._shuffled
        self.batches = arrange(encoded)
        self.num_steps: int = self._loop.max_steps or self.batches.num_steps(self._loop.epochs)
        self._say_mixture()
        if self._data.group_by_length:
            self.batches = batches.ByLength(self.batches, self.num_steps, self._loop.seed)
            lengths = ", ".join(map(str, self.batches.used))
            say("grouped", f"sequences of {lengths} tokens, each length compiled once, "
                f"{self.batches.filled:.1%} filled")  # fmt: skip
        self._check_warmup()
        self.fingerprints = self._fingerprints(found)

    def keep(self, folder: pathlib.Path, *, write: bool) -> None:
        """Records in files where each block of a stream begins, so that a run can be resumed."""
        for number, each in enumerate(self._streams):
            each.keep(folder / f"{number}.jsonl", write=write)

    def _check_warmup(self) -> None:
        warmup = self._settings.optim.warmup
        if warmup >= max(1, self.num_steps):
            raise errors.UserError(
                expected=f"a warmup shorter than the run of {self.num_steps} steps",
                found=f"--warmup {warmup:g}",
                do="fewer steps of warmup, or a share below 1",
            )

    def _fingerprints(self, found: Read) -> dict[str, str | None]:
        of_train = sources.fingerprint(*found.train)
        if self._data.streaming:
            versions = filter(None, map(sources.version, self._data.dataset))
            of_train = ", ".join([f"{of_train} of the first rows", *versions])
        of_held_out = sources.fingerprint(*found.held_out) if found.held_out else None
        return {"train": of_train, "held out": of_held_out}

    def _shuffled(self, encoded: list[list[encoding.Example]]) -> batches.Batches:
        """Batches of the shuffled examples of each source."""
        if self._data.weights is None:  # one source: each example once an epoch
            encoded = [list(itertools.chain(*encoded))]
        parts = [self._arrange(examples) for examples in encoded]
        sequences = list(itertools.chain(*parts))
        length = min(self._settings.sequence_length, packing.longest(sequences))
        if self._data.packing:
            say("packed", f"{len(sequences)} sequences of {length} tokens, "
                f"{packing.filled(sequences, length):.1%} filled")  # fmt: skip
        seed = self._loop.seed
        return self._batches(
            [batches.Shuffled(part, seed, number) for number, part in enumerate(parts)], length
        )

    def _from_streams(self, encoded: list[list[encoding.Example]]) -> batches.Batches:
        """Batches of streams. encoded: the first examples of each."""
        length = self._settings.sequence_length
        first = [sequence for examples in encoded for sequence in self._arrange(examples)]
        say("streaming", f"sequences of {length} tokens, {packing.filled(first, length):.1%} filled"
            f" by these; shuffled in blocks of {stream.BLOCK} examples")  # fmt: skip

        def arrange(examples: rows.Rows) -> list[packing.TokenSequence]:
            _, made = self._encoded(examples, may_be_empty=True)
            return self._arrange(made.rows)

        self._streams = [
            stream.Stream(
                source,
                arrange,
                columns=self._data.columns,
                seed=self._loop.seed,
                number=number,
                window=AT_HAND * self._loop.batch_size * self._loop.grad_accum,
                bad=self._bad,
            )
            for number, source in enumerate(self._data.dataset)
        ]
        return self._batches(self._streams, length)

    def _batches(self, parts: Sequence[mixture.Source], length: int) -> batches.Batches:
        weights = self._data.weights
        return batches.Batches(
            parts[0] if weights is None else mixture.Mixture(parts, weights),
            batch_size=self._loop.batch_size,
            grad_accum=self._loop.grad_accum,
            length=length,
        )

    def _say_mixture(self) -> None:
        mixed = self.batches.sequences
        if isinstance(mixed, mixture.Mixture):
            sizes = None if self._data.streaming else [*map(len, mixed.sources)]
            shown = self.num_steps * self.batches.step_size
            shares = mixture.shares(mixed.weights)
            say("mixture", console.mixture(self._data.dataset, shares, sizes, shown))

    def _hold_out(self, parts: list[rows.Rows]) -> None:
        own = self._data.eval_dataset
        names = [own] if own else [f"held out of {console.near(n)}" for n in self._data.dataset]
        both = [self._encode("held out", *of) for of in zip(names, parts, strict=True)]
        self.held_out = self._arrange([example for _, each in both for example in each.rows])
        parts = [kept for kept, _ in both]
        count = self._settings.eval.exact_match
        if not count:
            return
        # The same number from each source.
        turns = itertools.zip_longest(*parts)
        examples = itertools.islice((e for turn in turns for e in turn if e), count)
        self.scored = encoding.prompts(list(examples), self._reader)
        answers = tokenizer.encode(self._reader, [text for _, text in self.scored])
        self.longest_answer = max(map(len, answers)) + 1  # for EOS
        longest = max(len(ids) for ids, _ in self.scored) + self.longest_answer
        if longest > self._context:
            raise errors.UserError(
                expected=f"answers within the model's context of {self._context} tokens",
                found=f"{longest} tokens in the longest prompt and the longest answer",
                where=f"--exact-match, {', '.join(names)}",
                do="shorten these examples, or leave --exact-match out",
            )

    def _encode(
        self, label: str, source: str, examples: rows.Rows
    ) -> tuple[rows.Rows, encoding.Encoded]:
        """(the examples that are not skipped as bad, encoded), and says how many there are."""
        kept, encoded = self._encoded(examples)
        self.has_chats |= encoded.num_chats > 0
        for ids, _ in encoded.rows:
            self.used[ids] = True
        first = "of its first examples " if label == "stream" else ""
        num_tokens = sum(len(ids) for ids, _ in encoded.rows)
        say(
            label,
            f"{first}{len(encoded.rows)} examples, {num_tokens} tokens, {encoded.num_cut} cut "
            f"at {self._data.seq_len}, {encoded.num_skipped} skipped: {console.near(source)}",
        )
        for loss in encoded.losses:
            say("chats", loss)
        return kept, encoded
