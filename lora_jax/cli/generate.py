"""Continue prompts with a LLaMA, with or without a LoRA adapter."""

import dataclasses
import datetime
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_jax import console, errors
from lora_jax.cli import arguments, model_flags, process_flags, results_file, sampling_flags
from lora_jax.generation import config as generation_config
from lora_jax.parallel import processes
from lora_jax.training.settings import checks, groups

if TYPE_CHECKING:
    from lora_jax.cli import opening
    from lora_jax.data import prompt_files
    from lora_jax.generation import request

DEFAULTS = {**dataclasses.asdict(generation_config.Sampling()), "seed": 0, "slots": 64}
DESCRIPTION = """\
Continue prompts with a LLaMA, with or without a LoRA adapter.

  lora-jax generate --adapter runs/…/adapter --quant int4 --prompt "…"
  lora-jax generate --model huggyllama/llama-7b --use-4bit --prompt "…"
  lora-jax generate --adapter … --prompts-file IN.jsonl --output-file OUT.jsonl
"""


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """The prompts, the model and adapter, and how tokens are sampled.

    model: None: the base model of the adapter, or without an adapter the demo model. chat: a text
    is a user's message. chat_time: what a chat template prints; None: the present.
    """

    model: str | None
    base: groups.ModelSettings
    adapter: str | None
    prompts: "tuple[prompt_files.Prompt, ...]"
    chat: bool
    chat_time: str | None
    output_file: pathlib.Path | None
    sampling: generation_config.Sampling
    slots: int


def flags(**where: Any) -> arguments.Flags:
    """The flags of `generate`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS, **where)
    model_flags.add(flags)
    flags.add("--adapter", "PEFT adapter, folder or hub id; its config names the base model",
              metavar="PATH|HUB_ID")  # fmt: skip
    flags.group("prompts")
    flags.add("--prompt", "text to continue; may be repeated", action="append")
    flags.add("--prompts-file", "file with one prompt per line; or .jsonl, .json, .csv, .parquet "
              "with prompt or messages in each example", metavar="FILE")  # fmt: skip
    flags.switch("--chat", "apply the chat template to each prompt; messages always need it")
    model_flags.add_chat_template(flags)
    flags.add("--chat-time", "the time that a chat template prints, e.g. 2026-01-31 (default: the "
              "present)", metavar="TIME")  # fmt: skip
    flags.add("--output-file", "write the results as JSON lines; the same command goes on with "
              "the file of a run that was stopped", metavar="FILE.jsonl")  # fmt: skip
    flags.group("sampling")
    flags.add("--max-new-tokens", "maximum number of generated tokens", type=int, metavar="N")
    sampling_flags.add(flags)
    flags.add("--repetition-penalty", "divides the logits of tokens in the prompt and the output",
              type=float, metavar="P")  # fmt: skip
    flags.add("--presence-penalty", "subtracted from the logit of each token in the output",
              type=float, metavar="P")  # fmt: skip
    flags.add("--frequency-penalty", "subtracted as often as the token is in the output",
              type=float, metavar="P")  # fmt: skip
    flags.add("--stop", "text that ends a continuation, and is not part of it; may be repeated",
              action="append", metavar="TEXT")  # fmt: skip
    flags.add("--min-tokens", "generate at least N tokens", type=int, metavar="N")
    flags.switch("--ignore-eos", "do not stop at the model's end of text")
    flags.add("--slots", "prompts that are continued at the same time", type=int, metavar="N")
    process_flags.add(flags)
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The typed flags."""
    return model_flags.quantization(flags().typed(argv))


def settings_of(typed: arguments.Given) -> GenerateSettings:
    """The settings from the typed flags. Raises: UserError if they contradict each other."""
    from lora_jax.data import prompt_files  # imported late, to keep --help fast

    problems: list[errors.UserError] = []
    base = sampling_flags.base(typed, problems)
    data = groups.DataSettings(chat_time=typed.get("chat_time"))
    problems += checks.chat_time(data)
    prompts = [prompt_files.Prompt(text, "--prompt") for text in typed.get("prompt", ())]
    before = len(problems)
    if "prompts_file" in typed:
        with errors.noted(problems):
            prompts += prompt_files.read(
                pathlib.Path(typed["prompts_file"]), as_chat=typed.get("chat", False)
            )
    if not prompts and len(problems) == before:
        problems.append(errors.UserError(
            expected="at least one prompt", found="none", where=typed.get("prompts_file"),
            do='--prompt "…"',
        ))  # fmt: skip
    values = DEFAULTS | typed
    sampling = sampling_flags.sampling(values, problems)
    problems += _out_of_range(values)
    if problems:
        raise errors.UserError.together(problems)
    return GenerateSettings(
        typed.get("model"), base, typed.get("adapter"), tuple(prompts), bool(typed.get("chat")),
        data.chat_time, pathlib.Path(typed["output_file"]) if "output_file" in typed else None,
        sampling, values["slots"],
    )  # fmt: skip


def _out_of_range(values: arguments.Given) -> Iterator[errors.UserError]:
    if values["slots"] < 1:
        yield errors.UserError(expected="at least 1", found=f"--slots {values['slots']}")
    if values["min_tokens"] > values["max_new_tokens"]:
        yield errors.UserError(
            expected="--min-tokens up to --max-new-tokens",
            found=f"{values['min_tokens']} and {values['max_new_tokens']}",
        )


def main() -> int:
    settings = settings_of(process_flags.join(parse()))
    from lora_jax.cli import opening

    found = opening.files(settings.base, settings.model, settings.adapter)
    if processes.leads():
        _say_what_is_unusual(settings)
    if settings.output_file is None:
        encoded, _ = _encoded(settings, found, None)
        for prompt, result in zip(
            settings.prompts, _results(settings, found, encoded), strict=True
        ):
            print(_shown(settings, prompt, result.text), end="\n\n", flush=True)
    elif processes.leads():
        with results_file.ResultsFile(settings.output_file) as file:
            _write(settings, found, file)
    else:
        _write(settings, found, None)
    return 0


def _write(
    settings: GenerateSettings, found: "opening.Files", file: results_file.ResultsFile | None
) -> None:
    """Generates what the file has not yet. file: None in all processes but the first."""
    encoded, time = _encoded(settings, found, file)
    begun = list(_begun(settings, found, encoded, time))
    processes.same("prompts", results_file.digest(begun))
    done = processes.broadcast(file.resume(begun) if file else 0)
    total = len(begun)
    if done:
        console.say("results", f"{done:,} of {total:,} prompts are done in {settings.output_file}")
    if done == total:
        return
    with console.bar(total, done, "prompt") as bar:
        generated = _results(settings, found, encoded, done)
        for number, result in enumerate(generated, start=done):
            if file:
                file.add(begun[number], {
                    "text": result.text,
                    "finish_reason": result.finish_reason,
                    "num_tokens": len(result.tokens),
                })  # fmt: skip
            bar.update()
    console.say("results", f"{total - done:,} continuations written to {settings.output_file}")


def _encoded(
    settings: GenerateSettings, found: "opening.Files", file: results_file.ResultsFile | None
) -> "tuple[list[prompt_files.Ids], str | None]":
    """(the ids of each prompt, the time that the chat template prints or None).

    Raises: UserError with all prompts that are too long.
    """
    from lora_jax import tokenizer
    from lora_jax.data import prompt_files
    from lora_jax.data.chats import clock
    from lora_jax.generation import limits

    time = None
    is_chat = settings.chat or any(isinstance(each.value, list) for each in settings.prompts)
    if is_chat and clock.is_read(found.reader):
        now = datetime.datetime.now().isoformat(timespec="seconds")
        time = settings.chat_time or processes.broadcast((file and file.chat_time()) or now)
        clock.stop(found.reader, time)
    encoded = prompt_files.encode(settings.prompts, found.reader, as_chat=settings.chat)
    problems: list[errors.UserError] = []
    with errors.noted(problems):
        tokenizer.check_ids(found.reader, encoded, found.num_tokens)
    for prompt, ids in zip(settings.prompts, encoded, strict=True):
        with errors.noted(problems):
            limits.check_length(
                len(ids), settings.sampling.max_new_tokens, found.context, where=prompt.origin
            )
    if problems:
        raise errors.UserError.together(problems)
    return encoded, time


def _begun(
    settings: GenerateSettings,
    found: "opening.Files",
    encoded: "list[prompt_files.Ids]",
    time: str | None,
) -> Iterator[dict[str, Any]]:
    """What the line of each prompt has, whatever is generated."""
    how = results_file.digest(
        results_file.digest_of_base(found.folder),
        results_file.digest_of_adapter(found.adapter) if found.adapter else None,
        [found.quant, settings.base.quant_fast, settings.base.dtype],
        found.eos_ids,
        dataclasses.asdict(settings.sampling),
    )
    for index, (prompt, ids) in enumerate(zip(settings.prompts, encoded, strict=True)):
        plain = json.loads(json.dumps(prompt.value, default=str))
        begun = {
            "index": index,
            "prompt": plain,
            "settings": results_file.digest(how, ids.tobytes()),
        }
        yield begun if time is None else {**begun, "chat_time": time}


def _results(
    settings: GenerateSettings,
    found: "opening.Files",
    encoded: "list[prompt_files.Ids]",
    done: int = 0,
) -> Iterator["request.Result"]:
    """Yields the results of the prompts after those that are done."""
    from lora_jax.cli import opening
    from lora_jax.generation import limits

    # The slots are those of the whole run, because other shapes are rounded in other ways.
    serving = opening.start(
        found,
        opening.load(settings.base, found),
        slots=min(len(encoded), settings.slots),
        context=limits.context(encoded, settings.sampling.max_new_tokens, found.context),
        fewer=True,
        kernels=settings.base.kernels,
    )
    sampling = dataclasses.replace(settings.sampling, seed=settings.sampling.seed + done)
    with serving:
        yield from serving.generate(encoded[done:], sampling)


def _shown(settings: GenerateSettings, prompt: "prompt_files.Prompt", text: str) -> str:
    if isinstance(prompt.value, str):
        return f"> {prompt.value}\n{text}" if settings.chat else f"{prompt.value}{text}"
    content = prompt.value[-1].get("content")
    if isinstance(content, list):
        content = json.dumps(content, ensure_ascii=False)
    return f"{content or ''}{text}" if prompt.continues else f"> {content or ''}\n{text}"


def _say_what_is_unusual(settings: GenerateSettings) -> None:
    """Prints what of the prompts may not be what a user means."""
    if count := sum(each.continues for each in settings.prompts):
        print(f"note: {count} of the chats end with an answer, which is continued; leave it out "
              "to have it written anew", file=sys.stderr)  # fmt: skip
    texts = [each.value for each in settings.prompts if each.origin != "--prompt"]
    if texts and all(isinstance(each, str) and each[:1] + each[-1:] == "{}" for each in texts):
        print("note: the prompts look like JSON, but each line is read as a text; to read their "
              "fields, name the file .jsonl", file=sys.stderr)  # fmt: skip
