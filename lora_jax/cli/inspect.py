"""Show rows as the model sees them: what is trained, what was cut, how lines are packed."""

import itertools
import os
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from lora_jax import assets, console, errors
from lora_jax.cli import arguments
from lora_jax.training import settings as training_settings

DEFAULTS = {"rows": 3}
LONGEST = 3  # rows named
DESCRIPTION = """\
Show rows as the model sees them: what is trained, what was cut, what is packed.

  inspect_data.py --model huggyllama/llama-7b --dataset my.jsonl
  inspect_data.py --dataset my.jsonl --columns prompt=question,completion=answer
  inspect_data.py --dataset my.jsonl --packing --rows 1 --tokens
"""
TRAINED, PLAIN = "\033[32;1m", "\033[0m"  # on a terminal
OPEN, CLOSE = "⟦", "⟧"  # elsewhere


def parse(argv: list[str] | None = None) -> dict[str, Any]:
    """Every setting: what was typed, else the defaults."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS)
    flags.group("model")
    flags.add("--model", "whose tokenizer it is: folder or Hugging Face id, of which no weights "
              "are downloaded; without it, the demo's", metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--revision", "branch, tag or commit of a hub model", metavar="REV")
    arguments.add_data(flags)
    flags.group("what to show")
    flags.add("--rows", "so many lines: rows, packed rows or pairs; 0: the summary alone", type=int,
              metavar="N")  # fmt: skip
    flags.add("--first", "beginning with this one, from 1", type=int, metavar="N")
    flags.add("--tokens", "one token to a line: position, id, row, trained or not, text",
              action="store_const", const=True)  # fmt: skip
    settings = DEFAULTS | flags.typed(argv)
    wrong = [f"--{name} {settings[name]}" for name, least in (("rows", 0), ("first", 1))
             if settings.get(name, least) < least]  # fmt: skip
    if wrong:
        raise errors.UserError(expected="numbers in their range", found=wrong)
    if settings.get("packing") and settings.get("dpo"):
        raise errors.UserError(expected="--packing or --dpo", found="both")
    if "dataset" not in settings:
        settings |= {"dataset": [str(assets.TRAIN)]}
    if "weights" in settings:
        settings["weights"] = arguments.weights(settings["weights"])
    arguments.check_data(settings)
    return settings


def main() -> None:
    settings = parse()
    from lora_jax import hub, tokenizer
    from lora_jax.data import encoding, mixture, packing, sources
    from lora_jax.models import config as model_config

    pairs = arguments.columns(settings["columns"]) if "columns" in settings else None
    files = [("data", source) for source in settings["dataset"]]
    if "eval_dataset" in settings:
        files.append(("held out", settings["eval_dataset"]))
    streaming = bool(settings.get("streaming"))
    counts = [sources.HEAD if streaming and label == "data" else None for label, _ in files]
    loaded = sources.load_all([source for _, source in files], pairs, counts)
    folder = hub.tokenizer_folder(
        settings.get("model") or str(assets.FOLDER), settings.get("revision")
    )
    context = model_config.load(folder).max_position_embeddings
    seq_len = settings["seq_len"] = training_settings.sequence_length(settings, context)
    reader = tokenizer.load(folder)
    eos = tokenizer.eos_ids(reader, folder)[0]
    sizes = []
    for (label, source), rows in zip(files, loaded, strict=True):
        encode = encoding.encode_pairs if settings.get("dpo") else encoding.encode
        encoded = encode(rows, reader, seq_len, eos)
        how = {"packing": bool(settings.get("packing")), "in_pairs": bool(settings.get("dpo"))}
        lines = packing.arrange(encoded.examples, seq_len, **how)
        which = "its first rows, " if streaming and label == "data" else ""
        summarise(label, which + console.near(source), encoded, seq_len)
        length = training_settings.line_length(settings)
        if not which:
            length = min(length, packing.longest(lines))
        what = "packed on" if how["packing"] else "paired on" if how["in_pairs"] else "padded to"
        console.say("lines", f"{len(lines)} {what} lines of {length} tokens, "
                    f"{packing.filled(lines, length):.1%} filled")  # fmt: skip
        sizes.append(len(lines))
        named = zip(encoded.examples, encoded.origins, strict=True)
        origins = {id(ids): origin for (ids, _), origin in named}
        first = settings.get("first", 1)
        if settings["rows"] and first > len(lines):
            raise errors.UserError(
                expected=f"one of the {len(lines)} lines",
                found=f"--first {first}",
                where=source,
            )
        for number, line in enumerate(lines[first - 1 : first - 1 + settings["rows"]], first):
            print(f"\nline {number} of {len(lines)}", flush=True)
            show(line, [origins[id(ids)] for ids, _ in line], reader, settings.get("tokens"))
        print()
    if "weights" in settings:
        shares = mixture.shares(settings["weights"])
        sizes = sizes[: len(shares)]  # without what is held out
        shown = 100 if streaming else sum(sizes)
        parts = console.mixture(settings["dataset"], shares, None if streaming else sizes, shown)
        console.say("mixture", f"in {parts}")


def summarise(label: str, source: str, encoded, seq_len: int) -> None:
    """What is in the data, in a few lines."""
    sizes = [len(ids) for ids, _ in encoded.examples]
    trained = sum(int(trained[1:].sum()) for _, trained in encoded.examples)
    console.say(label, f"{len(sizes)} rows, {sum(sizes)} tokens: {source}")
    console.say("cut", f"{encoded.num_cut} at {seq_len} tokens; {encoded.num_skipped} "
                "skipped, with nothing to train in what is left")  # fmt: skip
    console.say("trained", f"{trained} tokens, {trained / sum(sizes):.1%}")
    cuts = statistics.quantiles(sizes, n=20, method="inclusive") if len(sizes) > 1 else sizes * 19
    console.say("length", f"median {statistics.median(sizes):g} tokens, 95 % have at most "
                f"{cuts[18]:g}, the longest {max(sizes)}")  # fmt: skip
    longest = sorted(zip(encoded.lengths, encoded.origins, strict=True), reverse=True)[:LONGEST]
    console.say("longest", ", ".join(f"{where} ({size})" for size, where in longest))


def show(line, origins: list[str], reader, tokens: bool | None) -> None:
    """A line's rows: where each is from, and its text, what is trained in colour or in brackets."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = (TRAINED, PLAIN) if colour else (OPEN, CLOSE)
    for number, ((ids, trained), origin) in enumerate(zip(line, origins, strict=True), 1):
        predicted = trained.copy()
        predicted[:1] = False  # it follows nothing
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
    """(text, whether trained) of the parts of a row."""
    borders = [0, *(n for n in range(1, len(ids)) if trained[n] != trained[n - 1]), len(ids)]
    before = ""
    for start, end in itertools.pairwise(borders):
        upto = reader.decode(ids[:end])
        # As it continues what stands before; alone it would lose the blank at its beginning.
        text = upto[len(before) :] if upto.startswith(before) else reader.decode(ids[start:end])
        before = upto
        yield text, trained[start]
