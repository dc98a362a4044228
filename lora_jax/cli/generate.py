"""Continue prompts with a LLaMA, with or without a LoRA adapter."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from lora_jax import console, errors
from lora_jax.cli import arguments, results_file, sampling_flags
from lora_jax.generation import config as generation_config
from lora_jax.generation import request
from lora_jax.parallel import processes
from lora_jax.training.settings import groups

DEFAULTS = {**dataclasses.asdict(generation_config.Sampling()), "seed": 0, "slots": 64}
DESCRIPTION = """\
Continue prompts with a LLaMA, with or without a LoRA adapter.

  lora-jax generate --adapter runs/…/adapter --quant int4 --prompt "…"
  lora-jax generate --model huggyllama/llama-7b --use-4bit --prompt "…"
"""


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """The prompts, the model and adapter, and how tokens are sampled.

    model: None: the base model of the adapter, or without an adapter the demo model. slots: how
    many prompts are continued at a time. output: the file of the results; None: they are printed.
    """

    model: str | None
    base: groups.ModelSettings
    adapter: str | None
    prompts: tuple[str, ...]
    chat: bool
    sampling: generation_config.Sampling
    slots: int
    output: pathlib.Path | None = None


def flags(**where: Any) -> arguments.Flags:
    """The flags of `generate`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS, **where)
    arguments.add_model(flags)
    flags.add("--adapter", "PEFT adapter, folder or hub id; its config names the base model",
              metavar="PATH|HUB_ID")  # fmt: skip
    flags.group("prompts")
    flags.add("--prompt", "text to continue; may be repeated", action="append")
    flags.add("--prompts-file", "file with one prompt per line; .jsonl: with an object that has "
              "`prompt` on each", metavar="FILE")  # fmt: skip
    flags.add("--output-file", "write a JSON object for each prompt, as they come; the same "
              "command continues after the last one", metavar="FILE.jsonl")  # fmt: skip
    flags.switch("--chat", "apply the chat template to each prompt")
    flags.group("sampling")
    flags.add("--max-new-tokens", "maximum number of generated tokens", type=int, metavar="N")
    sampling_flags.add(flags)
    flags.add("--repetition-penalty", "divides the positive logits of tokens that were there",
              type=float, metavar="P")  # fmt: skip
    flags.add("--presence-penalty", "subtracted from the logits of generated tokens", type=float,
              metavar="P")  # fmt: skip
    flags.add("--frequency-penalty", "the same for each time a token was generated", type=float,
              metavar="P")  # fmt: skip
    flags.add("--stop", "text at which to stop; may be repeated", action="append", metavar="TEXT")
    flags.add("--min-tokens", "do not stop before N tokens", type=int, metavar="N")
    flags.switch("--ignore-eos", "do not stop at the model's stop tokens")
    flags.add("--slots", "prompts that are continued at the same time", type=int, metavar="N")
    arguments.add_processes(flags)
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags."""
    return arguments.quantization(flags().typed(argv))


def settings_of(typed: arguments.Given) -> GenerateSettings:
    """The settings from the typed flags. Raises: UserError if they contradict each other."""
    problems: list[errors.UserError] = []
    base = sampling_flags.base(typed, problems)
    prompts = list(typed.get("prompt", []))
    if "prompts_file" in typed:
        with errors.noted(problems):
            prompts += _lines(pathlib.Path(typed["prompts_file"]))
    elif not prompts:
        problems.append(
            errors.UserError(expected="at least one prompt", found="none", do='--prompt "…"')
        )
    values = DEFAULTS | typed
    sampling = sampling_flags.sampling(values, problems)
    if problems:
        raise errors.UserError.together(problems)
    return GenerateSettings(
        typed.get("model"), base, typed.get("adapter"), tuple(prompts),
        bool(typed.get("chat")), sampling, values["slots"],
        pathlib.Path(typed["output_file"]) if "output_file" in typed else None,
    )  # fmt: skip


def main() -> int:
    settings = settings_of(arguments.join(parse()))
    if settings.output is None:
        texts = continuations(settings)
        for prompt, text in zip(settings.prompts, texts, strict=True):
            shown = f"> {prompt}\n{text}" if settings.chat else f"{prompt}{text}"
            print(shown, end="\n\n", flush=True)
        return 0
    with contextlib.ExitStack() as opened:
        written, file = 0, None
        if processes.leads():
            digest = _digest(settings)
            file = results_file.ResultsFile(settings.output, settings.prompts, digest)
            opened.callback(file.close)
            written = file.num_done
        _write(settings, file, processes.broadcast(written))
    return 0


def _write(settings: GenerateSettings, file: results_file.ResultsFile | None, written: int) -> None:
    """Writes the results that are not in the file yet; only one process has it."""
    total = len(settings.prompts)
    if file and written:
        console.say("resume", f"{written} of {total} results are in {settings.output}")
    if written < total:
        with console.bar(total, written, "prompt") as bar:
            for result in results(settings, first=written):
                if file:
                    file.add(text=result.text, finish_reason=result.finish_reason,
                             num_tokens=len(result.tokens))  # fmt: skip
                bar.update()
    if file:
        console.say("results", f"{total} in {settings.output}")


def continuations(settings: GenerateSettings) -> Iterator[str]:
    """Yields the continuation of each prompt."""
    return (result.text for result in results(settings))


def results(settings: GenerateSettings, first: int = 0) -> Iterator[request.Result]:
    """Yields the result of each prompt, from prompt number `first`."""
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
        seed = settings.sampling.seed + first
        sampling = dataclasses.replace(settings.sampling, seed=seed)
        yield from serving.generate(encoded[first:], sampling)


def _digest(settings: GenerateSettings) -> str:
    """Of what the results depend on: the model's name, the adapter's files, the settings."""
    known = dataclasses.asdict(settings)
    for name in ("prompts", "output", "slots"):
        del known[name]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    if settings.adapter and (folder := pathlib.Path(settings.adapter)).is_dir():
        for path in sorted(folder.glob("adapter*")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _lines(path: pathlib.Path) -> list[str]:
    """The prompts of a file. Raises: UserError with each line that has none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, as splitlines
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(
            expected="a UTF-8 text file with one prompt per line",
            found=getattr(error, "strerror", str(error)),
            where=str(path),
        ) from None
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    prompts, wrong = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
            if not isinstance(prompts[-1], str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            wrong.append(f"line {number}: {line[:60]}")
    if wrong:
        raise errors.UserError(
            expected='an object with a text as "prompt" on each line', found=wrong, where=str(path)
        )
    return prompts
