"""Serve a model and its adapters over HTTP, in OpenAI's protocol."""

import dataclasses
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from lora_jax import console, errors, extras
from lora_jax.cli import arguments, model_flags, process_flags, sampling_flags
from lora_jax.generation import config
from lora_jax.serving import settings as serve_settings
from lora_jax.training.settings import groups

KEY = "LORA_JAX_API_KEY"  # in the environment, where other users of the machine do not see it
DEFAULTS = {"slots": 8, "speculate": 0, **dataclasses.asdict(serve_settings.ServeSettings())}
DESCRIPTION = """\
Serve a model and its adapters over HTTP, in OpenAI's protocol.

  lora-jax serve --adapter runs/…/adapter --quant int4
  lora-jax serve --model huggyllama/llama-7b --use-4bit --adapter mine=PATH
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The model, its adapters, and the server.

    model: None: the base model of the first adapter, or without an adapter the demo model.
    adapters: {name: folder or hub id}. slots: how many choices are generated at the same time.
    context: the most tokens of prompt and output; None: those of the model, up to
    config.DEFAULT_CONTEXT.
    kv_dtype, speculate: see generation.Engine.
    """

    model: str | None
    base: groups.ModelSettings
    adapters: dict[str, str]
    slots: int
    context: int | None
    kv_dtype: str | None
    speculate: int
    server: serve_settings.ServeSettings


def flags(**where: Any) -> arguments.Flags:
    """The flags of `serve`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS, **where)
    model_flags.add(flags)
    flags.add("--adapter", "PEFT adapter, folder or hub id, by the name that requests give in "
              "`model`; may be repeated. Without --model, the config of the first names the base "
              "model", action="append", metavar="NAME=PATH|HUB_ID")  # fmt: skip
    flags.add("--served-model-name", "the base's name in `model` (default: the last part of its "
              "path or id)", metavar="NAME")  # fmt: skip
    model_flags.add_chat_template(flags)
    flags.group("engine")
    flags.add("--slots", "choices generated at the same time", type=int, metavar="N")
    flags.add("--context", "maximum number of tokens of prompt and output (default: the model's, "
              f"up to {config.DEFAULT_CONTEXT})", type=int, metavar="T")  # fmt: skip
    add_kv_dtype(flags)
    flags.add("--speculate", "guess N tokens at a time from repetitions in the text, while few "
              "requests run", type=int, metavar="N")  # fmt: skip
    flags.group("access")
    flags.add("--host", "address to listen on; 0.0.0.0: all of this machine's")
    flags.add("--port", "port to listen on; 0: a free one", type=int)
    flags.add("--api-key", "what clients must send as a bearer token (default: the environment "
              f"variable {KEY}, else none)", metavar="KEY")  # fmt: skip
    flags.add("--allow-origin", "origin whose web pages may read answers, or '*'; may be repeated",
              action="append", metavar="ORIGIN")  # fmt: skip
    flags.switch("--allow-runtime-lora", "adapters below --adapters-dir can be loaded and "
                 "unloaded by requests")  # fmt: skip
    flags.add("--adapters-dir", "folder of such adapters", metavar="PATH")
    flags.group("limits")
    flags.add("--max-body", "bytes of a request", type=int, metavar="N")
    flags.add("--max-prompt", "tokens of a prompt (default: the context's)", type=int, metavar="T")
    flags.add("--max-tokens", "tokens that a choice may generate (default: the context's)",
              type=int, metavar="T")  # fmt: skip
    flags.add("--max-n", "choices of a prompt", type=int, metavar="N")
    flags.add("--max-queue", "choices that may wait for a slot; more get 429", type=int,
              metavar="N")  # fmt: skip
    flags.add("--timeout", "seconds that a request may take", type=float, metavar="S")
    flags.add("--drain", "seconds that requests have to end after SIGTERM", type=float,
              metavar="S")  # fmt: skip
    process_flags.add(flags)
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags."""
    return model_flags.quantization(flags().typed(argv))


def settings_of(typed: arguments.Given) -> Settings:
    """The settings from the typed flags. Raises: UserError if they contradict each other."""
    problems: list[errors.UserError] = []
    base = sampling_flags.base(typed, problems)
    values = {name: typed.get(name, DEFAULTS[name]) for name in DEFAULTS}
    slots, speculate = values.pop("slots"), values.pop("speculate")
    values["allow_origin"] = tuple(values["allow_origin"])
    values["api_key"] = values["api_key"] or os.environ.get(KEY) or None
    if "adapters_dir" in typed:
        values["adapters_dir"] = pathlib.Path(typed["adapters_dir"])
    server, adapters = serve_settings.ServeSettings(), {}
    with errors.noted(problems):
        adapters = named(typed.get("adapter", ()))
    with errors.noted(problems):
        server = serve_settings.ServeSettings(**values)
    wrong = [
        f"--{name} {value}"
        for name, value in (("slots", slots), ("context", typed.get("context")))
        if value is not None and value < 1
    ] + ([f"--speculate {speculate}"] if speculate < 0 else [])
    if wrong:
        problems.append(errors.UserError(expected="at least 1", found=wrong))
    if problems:
        raise errors.UserError.together(problems)
    return Settings(
        typed.get("model"), base, adapters, slots, typed.get("context"), kv_dtype(typed),
        speculate, server,
    )  # fmt: skip


def add_kv_dtype(flags: arguments.Flags) -> None:
    """Adds --kv-cache-dtype, which `kv_dtype` reads."""
    flags.add("--kv-cache-dtype", "int8 halves the memory of keys and values, and changes the "
              "logits a little", choices=("auto", "int8"))  # fmt: skip


def kv_dtype(typed: arguments.Given) -> str | None:
    """The dtype of keys and values, as generation.Engine takes it."""
    found = typed.get("kv_cache_dtype")
    return None if found == "auto" else found


def named(typed: Sequence[str]) -> dict[str, str]:
    """{name: path} of adapters that were typed as NAME=PATH or PATH.

    A path alone is named by its last part; adapter/ in a run folder, by the run.
    Raises: UserError if two have the same name.
    """
    found: dict[str, str] = {}
    twice = []
    for text in typed:
        given = re.fullmatch(r"([^/\\=]+)=(.+)", text)
        if given and not pathlib.Path(text).exists():
            name, path = given.groups()
        else:
            whole = pathlib.Path(text).absolute()
            name, path = whole.parent.name if whole.name == "adapter" else whole.name, text
        if name in found:
            twice.append(f"{name}={path} and {name}={found[name]}")
        found.setdefault(name, path)
    if twice:
        raise errors.UserError(
            expected="a name for each adapter", found=twice, where="--adapter",
            do="--adapter NAME=PATH",
        )  # fmt: skip
    return found


def names_of(settings: Settings, base: str, *, alone: bool) -> tuple[str, str, dict[str, str]]:
    """(the model's name, what the command calls it, the adapters that share batches with it).

    base: what the command, or the adapter, calls the base. alone: the only adapter is part of the
    model. Raises: UserError if an adapter has the model's name.
    """
    name, adapters = pathlib.PurePath(base).name, settings.adapters
    if alone:
        ((name, base),), adapters = adapters.items(), {}
    name = settings.server.served_model_name or name
    if name in adapters:
        raise errors.UserError(
            expected="a name for each model",
            found=f"{name}, of the base and of an adapter",
            do="--served-model-name NAME, or --adapter NAME=PATH",
        )
    return name, base, adapters


def main() -> int:
    settings = settings_of(process_flags.join(parse()))
    extras.require(extra="serve")
    import jax

    from lora_jax.cli import opening
    from lora_jax.parallel import processes
    from lora_jax.serving import models, run, server

    growing = settings.server.allow_runtime_lora
    first = next(iter(settings.adapters.values()), None)
    alone = len(settings.adapters) == 1 and not growing
    found = opening.files(settings.base, settings.model, first, own=False, if_unshared=alone)
    name, typed, adapters = names_of(settings, found.name, alone=bool(found.adapted))
    if growing and jax.process_count() > 1:
        raise errors.UserError(
            expected="one process, to load adapters at run time",
            found=f"--allow-runtime-lora in {jax.process_count()} processes",
            do="name the adapters with --adapter",
        )
    leads = processes.leads()
    listening = run.bind(settings.server.host, settings.server.port) if leads else None
    opening.note_other_tokens(found, adapters)
    model = opening.load(settings.base, found)
    engine = opening.start(
        found, model, slots=settings.slots, context=settings.context,
        kv_dtype=settings.kv_dtype, speculate=settings.speculate, kernels=settings.base.kernels,
        pool=opening.pool(model, adapters, growing=growing),
    )  # fmt: skip
    if listening is None:
        engine.follow()
        return 0
    engine.start()
    console.say("serve", "compiling the first programs")
    engine.warm_up()
    opening.compile_ahead(engine)
    try:
        known = models.Models(engine.pool, name, engine.context, settings.server, typed, adapters)
        run.run(
            server.Server(engine, known, settings.server), listening,
            lambda url: _say(settings, (name, *adapters), url),
        )  # fmt: skip
    finally:
        engine.close()
    return 0


def _say(settings: Settings, names: Sequence[str], url: str) -> None:
    """Prints where the server is, and how to ask it. names: of the models, the base's first."""
    console.say("serve", f"{url}/v1; model: {', '.join(names)}")
    if not settings.model and not settings.adapters:
        console.say("", "This is the demo's base. Serve a run with --adapter runs/…/adapter, or "
                    "another model with --model.")  # fmt: skip
    body = f'{{"model": "{names[-1]}", "prompt": "In Milan", "max_tokens": 32}}'
    address = shlex.quote(f"{url}/v1/completions")  # for the brackets of IPv6
    print(f"{'try':<{console.LABEL}}curl {address} -H 'Content-Type: application/json' "
          f"-d '{body}'", flush=True)  # fmt: skip
    if (
        settings.server.host not in ("127.0.0.1", "localhost", "::1")
        and not settings.server.api_key
    ):
        print("warning: anyone who reaches this address can use the server; --api-key asks for a "
              "key", file=sys.stderr)  # fmt: skip
