"""Chat with a model and its adapters in the terminal."""

import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

from lora_jax import console, errors
from lora_jax.cli import arguments, model_flags, sampling_flags, serve
from lora_jax.generation import config as generation_config
from lora_jax.training.settings import groups

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
    model_flags.add(flags)
    flags.add("--adapter", "PEFT adapter, folder or hub id, by a name; may be repeated. Without "
              "--model, the config of the first names the base model", action="append",
              metavar="NAME=PATH|HUB_ID")  # fmt: skip
    flags.add("--system", "system prompt (default: that of the chat template)", metavar="TEXT")
    model_flags.add_chat_template(flags)
    flags.add("--context", "maximum number of tokens of the chat (default: the model's, up to "
              f"{generation_config.DEFAULT_CONTEXT})", type=int, metavar="T")  # fmt: skip
    flags.group("sampling")
    flags.add("--max-new-tokens", "maximum number of tokens of an answer (default: the rest of the "
              "context)", type=int, metavar="N")  # fmt: skip
    sampling_flags.add(flags)
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags."""
    return model_flags.quantization(flags().typed(argv))


def settings_of(typed: arguments.Given) -> ChatSettings:
    """The settings from the typed flags. Raises: UserError if they contradict each other."""
    problems: list[errors.UserError] = []
    base = sampling_flags.base(typed, problems)
    adapters = {}
    with errors.noted(problems):
        adapters = serve.named(typed.get("adapter", ()))
    sampling = sampling_flags.sampling(typed, problems)
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
    alone = len(settings.adapters) == 1
    found = opening.files(settings.base, settings.model, first, own=False, if_unshared=alone)
    if not found.reader.chat_template:
        raise errors.UserError(
            expected="a model with a chat template",
            found="none",
            where=str(found.reader.name_or_path),
            do=f"--chat-template, or a chat model; or {console.command('generate')}",
        )
    name, adapters = pathlib.PurePath(found.name).name, settings.adapters
    if found.adapted:
        (name,), adapters = adapters, {}
    opening.note_other_tokens(found, adapters)
    model = opening.load(settings.base, found)
    engine = opening.start(
        found, model, slots=2, context=settings.context, kernels=settings.base.kernels,
        pool=opening.pool(model, adapters),
    )  # fmt: skip
    engine.start()
    opening.compile_ahead(engine)
    try:
        talk = conversation.Conversation(
            engine,
            name,
            settings.sampling,
            adapter=next(iter(adapters), None),
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
