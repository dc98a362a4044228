"""Fold a LoRA adapter into its base model, for programs that do not support adapters."""

import contextlib
import math
import pathlib
import signal
import time
from typing import Any

from lora_jax import console, errors, quant
from lora_jax.cli import arguments, model_flags
from lora_jax.training.settings import checks, convert, groups

DEFAULTS = {"max_kl": 0.01}
DESCRIPTION = """\
Fold a LoRA adapter into its base model, for programs without adapters.

  lora-jax merge --adapter runs/…/adapter --output-dir merged
  lora-jax merge --adapter owner/name --quant int4 --output-dir merged
"""
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Once upon a time there was a little girl who lived with her grandmother in the woods.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Q: A shop sells 3 apples for 2 dollars. How much do 12 apples cost?\nA:",
)
SHOWN = 3  # of the layers with the largest changes


def flags(**where: Any) -> arguments.Flags:
    """The flags of `merge`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS, **where)
    flags.group("what to merge")
    flags.add("--adapter", "PEFT or mlx-lm adapter, folder or hub id; its config names the model",
              metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--model", "base model, folder or Hugging Face id (default: the one that the adapter "
              "names)", metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--revision", "branch, tag or commit of a hub model", metavar="REV")
    flags.add("--quant", "fold into the weights as rounded by this format, for an adapter trained "
              "on such a base (default: into the original weights)",
              choices=quant.QUANTS[1:], metavar="FORMAT")  # fmt: skip
    flags.switch("--quant-fast", "with --quant int4: no search for scales, as in training")
    flags.group("result")
    flags.add("--output-dir", "a new folder", metavar="DIR")
    flags.add("--prompt", "text to compare the two models' predictions on; may be repeated "
              "(default: four short ones)", action="append")  # fmt: skip
    flags.add("--max-kl", "write nothing if the predictions differ by more, in nats per token",
              type=float, metavar="KL")  # fmt: skip
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags, and the defaults of the others."""
    return DEFAULTS | flags().typed(argv)


def main() -> int:
    settings = parse()
    base = groups.ModelSettings(
        quant=settings.get("quant"), quant_fast=bool(settings.get("quant_fast"))
    )
    problems = [*checks.quant_fast(base)]
    required = ("adapter", "output_dir")
    missing = [f"no {convert.flag(name)}" for name in required if name not in settings]
    if missing:
        problems.append(errors.UserError(expected="--adapter and --output-dir", found=missing))
    if not settings["max_kl"] >= 0:
        found = f"{settings['max_kl']:g}"
        problems.append(errors.UserError(expected="--max-kl of 0 or more", found=found))
    if problems:
        raise errors.UserError.together(problems)
    into = pathlib.Path(settings["output_dir"])
    from lora_jax import hub
    from lora_jax.checkpoints import writer
    from lora_jax.lora import peft
    from lora_jax.models import config as model_config

    writer.refuse_occupied(into)  # before a model is downloaded
    source = hub.adapter_folder(settings["adapter"])
    adapter = peft.read(source)
    name, revision, named_by = settings.get("model"), settings.get("revision"), None
    if not name:
        named_by, (name, own_revision) = source, peft.base_of(source)
        revision = revision or own_revision
    folder = hub.model_folder(name, revision, named_by=named_by)
    if base.quant is None:
        model_flags.note_other_base(source, base.resolve_quant(model_config.load(folder), folder))
    merge(folder, adapter, into, settings)
    return 0


def merge(folder: pathlib.Path, adapter, into: pathlib.Path, settings: arguments.Given) -> None:
    """Writes the merged model to `into`, if it predicts the same as the base with the adapter."""
    import numpy as np

    from lora_jax import hub, tokenizer
    from lora_jax.checkpoints import merge as merged
    from lora_jax.checkpoints import model_folder, writer
    from lora_jax.data.chats import chat
    from lora_jax.lora import tied_head
    from lora_jax.training import evaluate

    source = hub.adapter_folder(settings["adapter"])
    reader = tokenizer.load(folder, source)
    encoded = tokenizer.encode(reader, list(settings.get("prompt", PROMPTS)))
    architecture = model_folder.config(folder)
    num_tokens = tied_head.num_tokens(adapter, architecture, settings["adapter"])
    if num_tokens != architecture.vocab_size:
        console.say("note", f"the adapter brings {num_tokens} tokens, in place of the base's "
                    f"{architecture.vocab_size}")  # fmt: skip
    tokenizer.check_ids(reader, encoded, num_tokens)
    how = {"quantization": settings.get("quant"), "search": not settings.get("quant_fast")}
    start, plan = time.time(), merged.plan(folder, adapter, **how)  # refuses before it computes
    expected = predicted(folder, encoded, adapter, settings["adapter"], **how)
    if not all(np.isfinite(each).all() for each in expected):
        raise errors.UserError(
            expected="finite predictions of the base with the adapter",
            found="NaN or infinity",
            where=f"{folder}, {settings['adapter']}",
            do="check whether the base alone generates text, and take an earlier checkpoint of "
            "the adapter",
        )
    for note in model_folder.notes(folder):
        console.say("note", note)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # to remove incomplete files
    num_bytes = sum(part.num_bytes for part in plan.parts)
    with writer.new_folder(into, num_bytes) as written:
        with contextlib.closing(merged.write(folder, written, plan)) as names:
            for _ in console.tracked(names, len(plan.parts), "tensor"):
                pass
        tokenizer.copy(source, written)
        stops = chat.stop_ids(reader, folder)
        if stops != tokenizer.eos_ids(reader, folder):
            tokenizer.keep_stops(written, stops)
        found = predicted(written, encoded)
        same, kl = evaluate.agreement(expected, found)
        console.say("compared", f"{same:.1%} of {sum(map(len, encoded))} most likely tokens "
                    f"are the same, KL {kl:.1e} nats per token (at most "
                    f"{settings['max_kl']:g})")  # fmt: skip
        if not kl <= settings["max_kl"]:
            raise errors.UserError(
                expected="a merged model that predicts the same as base and adapter, within "
                f"{settings['max_kl']:g} nats per token",
                found="NaN or infinity" if math.isnan(kl) else f"{kl:.3g}",
                where=str(settings["adapter"]),
                do="check the adapter: the dtype of the base cannot represent its change"
                + ("; or raise --max-kl" if math.isfinite(kl) else ""),
            )
    console.say("wrote", f"{into}: {console.size(num_bytes)} in {time.time() - start:.1f} s")
    print(f"\nto use it:\n  {console.command('generate')} --model {console.quoted(str(into))} …")


def predicted(
    folder: pathlib.Path, encoded: list[list[int]], adapter=None, name: str = "", **how: Any
) -> list:
    """Log-probabilities [T, V] of each text, by the model in `folder` with the adapter, if any.

    name: of the adapter, for messages.
    """
    import jax

    from lora_jax import lora
    from lora_jax.checkpoints import loader
    from lora_jax.parallel import devices
    from lora_jax.parallel import mesh as sharding
    from lora_jax.training import evaluate

    devices.keep_freed_memory()
    devices.keep_compiled()
    mesh = sharding.make_mesh(sharding.ONE)
    with jax.set_mesh(mesh):
        model = loader.load(folder, mesh=mesh, **how)
        if adapter is not None:
            lora.attach(model, adapter, where=name)
            changes = sorted(lora.effects(model).items(), key=lambda item: -item[1])
            largest = ", ".join(f"{name} {ratio:.1%}" for name, ratio in changes[:SHOWN])
            console.say("adapter", f"{len(changes)} layers; changed most: {largest}")
        return evaluate.log_probabilities(model, encoded)
