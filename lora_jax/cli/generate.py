"""Continue prompts with a LLaMA, with or without a LoRA adapter."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from lora_jax import assets, console, errors
from lora_jax.cli import arguments
from lora_jax.generation import config as generation_config
from lora_jax.parallel import processes
from lora_jax.training.settings import checks, groups

DEFAULTS = {"seed": 0, **dataclasses.asdict(generation_config.Sampling())}
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
    seed: int


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
        bool(typed.get("chat")), sampling, values["seed"],
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
    import jax

    from lora_jax import hub, lora, tokenizer
    from lora_jax.checkpoints import inventory, loader, model_folder
    from lora_jax.data import chat
    from lora_jax.generation import continuation
    from lora_jax.generation import weights as decode_weights
    from lora_jax.lora import peft, tied_head
    from lora_jax.lora.nnx import model_state
    from lora_jax.parallel import devices
    from lora_jax.parallel import mesh as sharding

    if processes.leads() and (warning := devices.unused_accelerator()):
        print(f"warning: {warning}", file=sys.stderr)
    devices.keep_freed_memory()
    devices.keep_compiled()
    adapter = hub.adapter_folder(settings.adapter) if settings.adapter else None
    name, revision = settings.model, settings.base.revision
    if not name:
        named = peft.settings(adapter) if adapter else {"base_model_name_or_path": assets.FOLDER}
        name = str(named.get("base_model_name_or_path") or "")
        revision = revision or named.get("revision")
    if not name:
        raise errors.UserError(
            expected="base_model_name_or_path in adapter_config.json",
            found="none",
            where=str(adapter),
            do="give the base model with --model",
        )
    named_by = None if settings.model else adapter
    folder = hub.model_folder(name, revision, named_by=named_by)
    architecture = model_folder.config(folder)
    quant, dtype = settings.base.resolve_quant(architecture, folder), settings.base.dtype
    if adapter and settings.base.quant is None and processes.leads():
        arguments.note_other_base(adapter, quant)
    num_bytes = inventory.loaded_bytes(folder, dtype=dtype, quantization=quant)
    mesh = sharding.choose(settings.base.mesh, num_bytes)
    reader = tokenizer.load(folder, adapter)
    if settings.chat:
        encoded = [tokenizer.chat_prompt(reader, prompt) for prompt in settings.prompts]
    else:
        encoded = tokenizer.encode(reader, list(settings.prompts))
    adapted = peft.read(adapter) if adapter else None
    num_tokens = architecture.vocab_size
    if adapted:
        num_tokens = tied_head.num_tokens(adapted, architecture, str(adapter))
        if num_tokens != architecture.vocab_size and processes.leads():
            print(f"the adapter brings {num_tokens} tokens, in place of the base's "
                  f"{architecture.vocab_size}", file=sys.stderr)  # fmt: skip
    tokenizer.check_ids(reader, encoded, num_tokens)
    context = architecture.context
    for ids in encoded:
        continuation.check_length(len(ids), settings.sampling, context)
    with jax.set_mesh(mesh):
        model = loader.load(
            folder,
            dtype=dtype,
            quantization=quant,
            search=not settings.base.quant_fast,
            mesh=mesh,
        )
        if processes.leads() and (note := inventory.dense_note(quant, model)):
            print(note, file=sys.stderr)
        for note in model_folder.notes(folder) if processes.leads() else ():
            print(note, file=sys.stderr)
        if adapted:
            lora.attach(model, adapted, where=str(adapter))
        graphdef, *state = model_state.split(model)
        trained, frozen = sharding.place(state, mesh)
        form = decode_weights.choose(model, mesh)
        if form and processes.leads():
            size = console.size(decode_weights.num_bytes(model, form))
            print(f"decode: a {form} copy of the weights, {size}", file=sys.stderr)
        eos_ids = chat.stop_ids(reader, folder)
        continue_ = continuation.make(graphdef, settings.sampling, eos_ids, form=form)
        key = jax.random.key(settings.seed)
        yield from continuation.continuations(
            continue_, trained, frozen, encoded, reader, key=key, mesh=mesh
        )


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(
            expected="a UTF-8 text file with one prompt per line",
            found=getattr(error, "strerror", str(error)),
            where=str(path),
        ) from None
