"""Show examples as the model sees them, with the tokens that are trained on."""

import dataclasses
import datetime
import itertools
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lora_jax import assets, console, errors
from lora_jax.cli import arguments, data_flags
from lora_jax.training.settings import assemble, checks, groups

DEFAULTS = {"rows": 3, "first": 1, "tokens": False}
LONGEST = 3  # of the longest examples are listed
DESCRIPTION = """\
Show examples as the model sees them, with the tokens that are trained on.

  lora-jax inspect --model huggyllama/llama-7b --dataset my.jsonl
  lora-jax inspect --dataset my.jsonl --columns prompt=question
  lora-jax inspect --dataset my.jsonl --packing --rows 1 --tokens
"""
TRAINED, PLAIN = "\033[32;1m", "\033[0m"  # on a terminal
OPEN, CLOSE = "⟦", "⟧"  # elsewhere


def flags(**where: Any) -> arguments.Flags:
    """The flags of `inspect`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS, **where)
    flags.group("model")
    flags.add("--model", "model with the tokenizer, folder or Hugging Face id; its weights are not "
              "downloaded (default: the demo model)", metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--revision", "branch, tag or commit of a hub model", metavar="REV")
    data_flags.add(flags)
    flags.group("what to show")
    flags.add("--rows", "number of sequences to show; 0: only the summary", type=int,
              metavar="N")  # fmt: skip
    flags.add("--first", "number of the first sequence to show", type=int, metavar="N")
    flags.switch("--tokens", "one line per token: position, id, example, trained or not, text")
    return flags


@dataclasses.dataclass(frozen=True)
class InspectSettings:
    """The data, the model whose tokenizer encodes it, and what to show.

    rows: the number of sequences to show, from number `first` on. tokens: show one token per line.
    """

    model: groups.ModelSettings
    data: groups.DataSettings
    rows: int
    first: int
    tokens: bool


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags."""
    return flags().typed(argv)


def settings_of(typed: arguments.Given) -> InspectSettings:
    """The settings from the typed flags. Raises: UserError if they contradict each other."""
    values = DEFAULTS | {name: typed[name] for name in DEFAULTS if name in typed}
    wrong = [f"--{name} {values[name]}" for name, least in (("rows", 0), ("first", 1))
             if values[name] < least]  # fmt: skip
    if wrong:
        raise errors.UserError(expected="numbers in their range", found=wrong)
    own = {name: value for name, value in typed.items() if name not in DEFAULTS}
    if not {"model", "dataset"} & own.keys():
        own = {"seq_len": assets.settings()["seq_len"], **own}
    settings = assemble.compose(own, given=frozenset(own))
    if settings.data.packing and settings.data.dpo:
        raise errors.UserError(expected="--packing or --dpo", found="both")
    for problem in (
        *checks.mixture(settings.data),
        *checks.chat_time(settings.data),
        *checks.new_tokens(settings.model),
    ):
        raise problem
    return InspectSettings(settings.model, settings.data, **values)


def main() -> None:
    settings = settings_of(parse())
    from lora_jax import hub, tokenizer
    from lora_jax.data import bad_rows, mixture, packing
    from lora_jax.data.chats import chat
    from lora_jax.models import config as model_config
    from lora_jax.training import run_data

    data = settings.data
    files = [("data", source) for source in data.dataset]
    if data.eval_dataset:
        files.append(("held out", data.eval_dataset))
    bad = bad_rows.BadRows(data.skip_bad_rows)
    loaded = run_data.load(data, bad)
    folder = hub.tokenizer_folder(settings.model.model, settings.model.revision)
    architecture = model_config.load(folder)
    seq_len = data.resolve_seq_len(architecture.context)
    data = dataclasses.replace(data, seq_len=seq_len)
    model = settings.model
    reader = tokenizer.load(folder, chat_template=model.chat_template)
    vocabulary = architecture.vocab_size
    new = tokenizer.add(reader, model.add_tokens, model.add_special_tokens, vocabulary)
    vocabulary = max(vocabulary, new[-1] + 1) if new else vocabulary
    stops = chat.stop_ids(reader, folder)
    say_template(reader, stops, data.chat_time)
    sizes = []
    for (label, source), examples in zip(files, loaded, strict=True):
        _, encoded = run_data.encode(data, examples, reader, stops[0], vocabulary, bad)
        notes = [chat.end_note(reader)] if encoded.num_chats and not sizes else []
        for each in filter(None, [*encoded.losses, *notes]):
            console.say("chats", each)
        sequences = packing.arrange(encoded.rows, seq_len, packing=data.packing, in_pairs=data.dpo)
        which = "its first examples, " if data.streaming and label == "data" else ""
        summarize(label, which + console.near(source), encoded, seq_len)
        length = seq_len * (2 if data.dpo else 1)
        if not which:
            length = min(length, packing.longest(sequences))
        what = "packed" if data.packing else "pairs" if data.dpo else "padded"
        console.say("sequences", f"{len(sequences)} ({what}) of {length} tokens, "
                    f"{packing.filled(sequences, length):.1%} filled")  # fmt: skip
        sizes.append(len(sequences))
        show_chosen(settings, source, encoded, sequences, reader)
    if data.weights:
        shares = mixture.shares(data.weights)
        sizes = sizes[: len(shares)]  # without held-out data
        shown = 100 if data.streaming else sum(sizes)
        known = None if data.streaming else sizes
        console.say("mixture", "in " + console.mixture(data.dataset, shares, known, shown))


def say_template(reader, stops: Sequence[int], chat_time: str | None) -> None:
    """Says where generation stops, and the time that the chat template prints, which it sets."""
    from lora_jax.data.chats import clock

    if len(stops) > 1:
        console.say("stops", "generation stops at "
                    + " or ".join(reader.convert_ids_to_tokens(list(stops))))  # fmt: skip
    if clock.is_read(reader):
        time = chat_time or datetime.datetime.now().isoformat(timespec="seconds")
        clock.stop(reader, time)
        console.say("clock", f"the chat template prints the time; here it is {time}, in a run when "
                    "it starts, or --chat-time")  # fmt: skip


def show_chosen(settings: InspectSettings, source: str, encoded, sequences, reader) -> None:
    """Prints --rows sequences from --first on."""
    named = zip(encoded.rows, encoded.origins, strict=True)
    origins = {id(ids): origin for (ids, _), origin in named}
    first = settings.first
    if settings.rows and first > len(sequences):
        raise errors.UserError(
            expected=f"one of the {len(sequences)} sequences",
            found=f"--first {first}",
            where=source,
        )
    chosen = sequences[first - 1 : first - 1 + settings.rows]
    for number, sequence in enumerate(chosen, first):
        print(f"\nsequence {number} of {len(sequences)}", flush=True)
        show(sequence, [origins[id(ids)] for ids, _ in sequence], reader, settings.tokens)
    print()


def summarize(label: str, source: str, encoded, seq_len: int) -> None:
    """Prints a few lines about a data set."""
    sizes = [len(ids) for ids, _ in encoded.rows]
    trained = sum(int(trained[1:].sum()) for _, trained in encoded.rows)
    console.say(label, f"{len(sizes)} examples, {sum(sizes)} tokens: {source}")
    console.say("cut", f"{encoded.num_cut} at {seq_len} tokens; {encoded.num_skipped} "
                "skipped, because no token to train on is left")  # fmt: skip
    console.say("trained", f"{trained} tokens, {trained / sum(sizes):.1%}")
    cuts = statistics.quantiles(sizes, n=20, method="inclusive") if len(sizes) > 1 else sizes * 19
    console.say("length", f"median {statistics.median(sizes):g} tokens, 95 % have at most "
                f"{cuts[18]:g}, the longest {max(sizes)}")  # fmt: skip
    longest = sorted(zip(encoded.lengths, encoded.origins, strict=True), reverse=True)[:LONGEST]
    console.say("longest", ", ".join(f"{where} ({size})" for size, where in longest))


def show(line, origins: list[str], reader, tokens: bool) -> None:
    """Prints the examples of a sequence, with the tokens to train on in color or in brackets."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = (TRAINED, PLAIN) if colour else (OPEN, CLOSE)
    for number, ((ids, trained), origin) in enumerate(zip(line, origins, strict=True), 1):
        predicted = trained.copy()
        predicted[:1] = False  # no token before it predicts it
        print(f"── {origin}: {len(ids)} tokens, {int(predicted.sum())} trained")
        if tokens:
            pieces = reader.convert_ids_to_tokens(ids.tolist())
            for position, (id_, piece) in enumerate(zip(ids.tolist(), pieces, strict=True)):
                mark = "trained" if predicted[position] else ""
                print(f"{position:6} {id_:7} {number:4} {mark:8} {piece!r}")
        else:
            found = spans(ids.tolist(), predicted.tolist(), reader)
            print("".join(begin + text + end if on else text for text, on in found))


def spans(ids: list[int], trained: list[bool], reader) -> Iterator[tuple[str, bool]]:
    """Yields (text, whether it is trained on) of the parts of an example."""
    borders = [0, *(n for n in range(1, len(ids)) if trained[n] != trained[n - 1]), len(ids)]
    before = ""
    for start, end in itertools.pairwise(borders):
        upto = reader.decode(ids[:end])
        # Decoded after the text before it: decoded alone it would lose a leading space.
        text = upto[len(before) :] if upto.startswith(before) else reader.decode(ids[start:end])
        before = upto
        yield text, trained[start]
