"""Chat with a model and its adapters in the terminal."""

import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

from lora_jax import console, errors
from lora_jax.cli import arguments, serve
from lora_jax.generation import config as generation_config
from lora_jax.training.settings import checks, groups

DEFAULTS = {**dataclasses.asdict(generation_config.Sampling()), "max_new_tokens": None}
DESCRIPTION = """\
Chat with a model and its adapters in the terminal. /help lists the commands.

  lora-jax chat --adapter runs/…/adapter --quant int4
  lora-jax chat --model meta-llama/Llama-3.2-1B-Instruct --adapter mine=PATH
"""


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """The model, its adapters, and how tokens are sampled.

    model: None: the base model of the first adapter. adapters: {name: folder or hub id}; the first
    answers. most: tokens of an answer; None: what the context has room for.
    """

    model: str | None
    base: groups.ModelSettings
    adapters: dict[str, str]
    system: str | None
    context: int | None
    sampling: generation_config.Sampling
    most: int | None


def flags(**where: Any) -> arguments.Flags:
    """The flags of `chat`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS, **where)
    arguments.add_model(flags)
    flags.add("--adapter", "PEFT adapter, folder or hub id, by a name; may be repeated. Without "
              "--model, the config of the first names the base model", action="append",
              metavar="NAME=PATH|HUB_ID")  # fmt: skip
    flags.add("--system", "system prompt (default: that of the chat template)", metavar="TEXT")
    flags.add("--context", "maximum number of tokens of the chat (default: the model's)", type=int,
              metavar="T")  # fmt: skip
    flags.group("sampling")
    flags.add("--max-new-tokens", "maximum number of tokens of an answer (default: the rest of the "
              "context)", type=int, metavar="N")  # fmt: skip
    flags.add("--temperature", "0: always take the most likely token", type=float)
    flags.add("--top-k", "sample from the K most likely tokens; 0: all", type=int, metavar="K")
    flags.add("--top-p", "sample from the most likely tokens whose probabilities sum to P",
              type=float, metavar="P")  # fmt: skip
    flags.add("--min-p", "sample from tokens at least P times as likely as the most likely one",
              type=float, metavar="P")  # fmt: skip
    flags.add("--seed", "random seed of sampling", type=int)
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags."""
    return arguments.quantization(flags().typed(argv))


def settings_of(typed: arguments.Given) -> ChatSettings:
    """The settings from the typed flags. Raises: UserError if they contradict each other."""
    own = {field.name for field in dataclasses.fields(groups.ModelSettings)}
    base = groups.ModelSettings(**{name: typed[name] for name in own & typed.keys()})
    problems = [*checks.quant_fast(base)]
    adapters, sampling = {}, generation_config.Sampling()
    with errors.noted(problems):
        adapters = serve.named(typed.get("adapter", ()))
    with errors.noted(problems):
        names = {field.name for field in dataclasses.fields(sampling)}
        sampling = generation_config.Sampling(
            **{name: typed[name] for name in names & typed.keys()}
        )
    filters = [name for name in ("top_k", "top_p", "min_p") if name in typed]
    if filters and not typed.get("temperature"):
        problems.append(
            errors.UserError(
                expected="flags that have an effect",
                found=[f"--{name.replace('_', '-')} at temperature 0" for name in filters],
                do="--temperature 1 to sample",
            )
        )
    if typed.get("context", 1) < 1:
        problems.append(errors.UserError("at least 1", f"--context {typed['context']}"))
    if problems:
        raise errors.UserError.together(problems)
    return ChatSettings(
        typed.get("model"), base, adapters, typed.get("system"), typed.get("context"), sampling,
        typed.get("max_new_tokens"),
    )  # fmt: skip


def main() -> int:
    settings = settings_of(parse())
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # editing of lines, for input()
            import readline  # noqa: F401
    from lora_jax.cli import conversation, opening

    first = next(iter(settings.adapters.values()), None)
    found = opening.files(settings.base, settings.model, first, own=False)
    if not found.reader.chat_template:
        raise errors.UserError(
            expected="a model with a chat template",
            found="none",
            where=str(found.reader.name_or_path),
            do=f"use {console.command('generate')}, or a chat model",
        )
    model = opening.load(settings.base, found)
    engine = opening.start(
        found, model, slots=2, context=settings.context,
        pool=opening.pool(model, settings.adapters),
    )  # fmt: skip
    engine.start()
    try:
        talk = conversation.Conversation(
            engine,
            pathlib.PurePath(found.name).name,
            settings.sampling,
            adapter=next(iter(settings.adapters), None),
            system=settings.system,
            most=settings.most,
        )
        if is_terminal:
            console.say("chat", f"{talk.adapter or talk.base} answers; /help lists the commands, "
                        "Ctrl-C stops an answer, Ctrl-D ends the chat")  # fmt: skip
        conversation.Terminal(talk, is_terminal=is_terminal).run()
    finally:
        engine.close()
    return 0
