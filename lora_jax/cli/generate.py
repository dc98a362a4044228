"""Continue prompts with a LLaMA, with or without a LoRA adapter."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from lora_jax import errors
from lora_jax.cli import arguments
from lora_jax.generation import config as generation_config
from lora_jax.training.settings import checks, groups

DEFAULTS = {**dataclasses.asdict(generation_config.Sampling()), "seed": 0, "slots": 64}
DESCRIPTION = """\
Continue prompts with a LLaMA, with or without a LoRA adapter.

  lora-jax generate --adapter runs/…/adapter --quant int4 --prompt "…"
  lora-jax generate --model huggyllama/llama-7b --use-4bit --prompt "…"
"""


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """The prompts, the model and adapter, and how tokens are sampled.

    model: None: the base model of the adapter, or without an adapter the demo model.
    """

    model: str | None
    base: groups.ModelSettings
    adapter: str | None
    prompts: tuple[str, ...]
    chat: bool
    sampling: generation_config.Sampling
    slots: int


def flags(**where: Any) -> arguments.Flags:
    """The flags of `generate`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS, **where)
    arguments.add_model(flags)
    flags.add("--adapter", "PEFT adapter, folder or hub id; its config names the base model",
              metavar="PATH|HUB_ID")  # fmt: skip
    flags.group("prompts")
    flags.add("--prompt", "text to continue; may be repeated", action="append")
    flags.add("--prompts-file", "file with one prompt per line", metavar="FILE")
    flags.switch("--chat", "apply the chat template to each prompt")
    flags.group("sampling")
    flags.add("--max-new-tokens", "maximum number of generated tokens", type=int, metavar="N")
    flags.add("--temperature", "0: always take the most likely token", type=float)
    flags.add("--top-k", "sample from the K most likely tokens; 0: all", type=int, metavar="K")
    flags.add("--top-p", "sample from the most likely tokens whose probabilities sum to P",
              type=float, metavar="P")  # fmt: skip
    flags.add("--min-p", "sample from tokens at least P times as likely as the most likely one",
              type=float, metavar="P")  # fmt: skip
    flags.add("--seed", "random seed of sampling", type=int)
    flags.add("--slots", "prompts that are continued at the same time", type=int, metavar="N")
    arguments.add_processes(flags)
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags."""
    return arguments.quantization(flags().typed(argv))


def settings_of(typed: arguments.Given) -> GenerateSettings:
    """The settings from the typed flags. Raises: UserError if they contradict each other."""
    own = {field.name for field in dataclasses.fields(groups.ModelSettings)}
    base = groups.ModelSettings(**{name: typed[name] for name in own & typed.keys()})
    problems = [*checks.quant_fast(base)]
    prompts = list(typed.get("prompt", []))
    if "prompts_file" in typed:
        with errors.noted(problems):
            prompts += _lines(pathlib.Path(typed["prompts_file"]))
    elif not prompts:
        problems.append(
            errors.UserError(expected="at least one prompt", found="none", do='--prompt "…"')
        )
    values = DEFAULTS | typed
    sampling = generation_config.Sampling()
    with errors.noted(problems):
        sampling = generation_config.Sampling(
            **{field.name: values[field.name] for field in dataclasses.fields(sampling)}
        )
    filters = [name for name in ("top_k", "top_p", "min_p") if values[name] != DEFAULTS[name]]
    if filters and not values["temperature"]:
        problems.append(
            errors.UserError(
                expected="flags that have an effect",
                found=[f"--{name.replace('_', '-')} at temperature 0" for name in filters],
                do="--temperature 1 to sample",
            )
        )
    if problems:
        raise errors.UserError.together(problems)
    return GenerateSettings(
        typed.get("model"), base, typed.get("adapter"), tuple(prompts),
        bool(typed.get("chat")), sampling, values["slots"],
    )  # fmt: skip


def main() -> int:
    settings = settings_of(arguments.join(parse()))
    texts = continuations(settings)
    for prompt, text in zip(settings.prompts, texts, strict=True):
        shown = f"> {prompt}\n{text}" if settings.chat else f"{prompt}{text}"
        print(shown, end="\n\n", flush=True)
    return 0


def continuations(settings: GenerateSettings) -> Iterator[str]:
    """Yields the continuation of each prompt."""
    from lora_jax import tokenizer
    from lora_jax.cli import opening
    from lora_jax.generation import engine

    found = opening.files(settings.base, settings.model, settings.adapter)
    if settings.chat:
        encoded = [tokenizer.chat_prompt(found.reader, prompt) for prompt in settings.prompts]
    else:
        encoded = tokenizer.encode(found.reader, list(settings.prompts))
    tokenizer.check_ids(found.reader, encoded, found.num_tokens)
    num_new = settings.sampling.max_new_tokens
    for ids in encoded:
        engine.check_length(len(ids), num_new, found.context)
    serving = opening.start(
        found,
        opening.load(settings.base, found),
        slots=min(len(encoded), settings.slots),
        context=max(map(len, encoded)) + num_new,
    )
    with serving:
        for result in serving.generate(encoded, settings.sampling):
            yield result.text


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(
            expected="a UTF-8 text file with one prompt per line",
            found=getattr(error, "strerror", str(error)),
            where=str(path),
        ) from None
