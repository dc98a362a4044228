"""Continue prompts with a LLaMA, with or without a LoRA adapter."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from lora_jax import console, errors
from lora_jax.cli import arguments
from lora_jax.generation import config as generation_config
from lora_jax.lora import config
from lora_jax.parallel import processes
from lora_jax.training import settings as training_settings

DEFAULTS = {"seed": 0, **dataclasses.asdict(generation_config.Sampling())}
DESCRIPTION = """\
Continue prompts with a LLaMA, with or without a LoRA adapter.

  generate.py --adapter runs/…/adapter --quant int4 --prompt "…"
  generate.py --model huggyllama/llama-7b --use-4bit --prompt "…" --prompt "…"
"""


def parse(argv: list[str] | None = None) -> dict[str, Any]:
    """Every setting: what was typed, else the defaults."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS)
    arguments.add_model(flags)
    flags.add("--adapter", "PEFT adapter: folder or hub id; its config names the model",
              metavar="PATH|HUB_ID")  # fmt: skip
    flags.group("prompts")
    flags.add("--prompt", "text to continue; given again, a batch", action="append")
    flags.add("--prompts-file", "one prompt a line", metavar="FILE")
    flags.add("--chat", "put each prompt into the chat template", action="store_const", const=True)
    flags.group("sampling")
    arguments.add_sampling(flags)
    flags.add("--seed", "of the draws", type=int)
    arguments.add_processes(flags)
    return DEFAULTS | arguments.quantization(flags.typed(argv))


def main() -> int:
    settings = arguments.join(parse())
    arguments.check_quant_fast(settings)
    prompts = list(settings.get("prompt", []))
    if "prompts_file" in settings:
        prompts += _lines(pathlib.Path(settings["prompts_file"]))
    if not prompts:
        raise errors.UserError(expected="at least one prompt", found="none", do='--prompt "…"')

    sampling = config.build(generation_config.Sampling, settings)
    filters = [name for name in ("top_k", "top_p", "min_p") if settings[name] != DEFAULTS[name]]
    if filters and not sampling.temperature:
        raise errors.UserError(
            expected="flags that have an effect",
            found=[f"--{name.replace('_', '-')} at temperature 0" for name in filters],
            do="--temperature 1 to sample",
        )
    for prompt, text in zip(prompts, continuations(prompts, settings, sampling), strict=True):
        shown = f"> {prompt}\n{text}" if settings.get("chat") else f"{prompt}{text}"
        print(shown, end="\n\n", flush=True)
    return 0


def continuations(prompts: list[str], settings: dict[str, Any], sampling) -> Iterator[str]:
    """Yields what the model writes after each prompt."""
    import jax

    from lora_jax import assets, hub, tokenizer
    from lora_jax.checkpoints import inventory, loader
    from lora_jax.generation import continuation
    from lora_jax.generation import weights as decode_weights
    from lora_jax.lora import peft
    from lora_jax.lora.nnx import model_state
    from lora_jax.models import config as model_config
    from lora_jax.parallel import devices
    from lora_jax.parallel import mesh as sharding

    if processes.leads() and (warning := devices.unused_accelerator()):
        print(f"warning: {warning}", file=sys.stderr)
    devices.keep_freed_memory()
    devices.keep_compiled()
    adapter = hub.adapter_folder(settings["adapter"]) if "adapter" in settings else None
    name, revision = settings.get("model"), settings.get("revision")
    if not name:
        named = peft.settings(adapter) if adapter else {"base_model_name_or_path": assets.FOLDER}
        name = str(named.get("base_model_name_or_path") or "")
        revision = revision or named.get("revision")
    if not name:
        raise errors.UserError(
            expected="base_model_name_or_path in adapter_config.json",
            found="none",
            where=str(adapter),
            do="name the base model with --model",
        )
    named_by = None if settings.get("model") else adapter
    folder = hub.model_folder(name, revision, named_by=named_by)
    architecture = model_config.load(folder)
    settings["quant"] = training_settings.resolved_quant(settings, architecture, folder)
    loaded = {"dtype": settings.get("dtype"), "quantization": settings["quant"]}
    mesh = sharding.choose(settings.get("mesh"), inventory.loaded_bytes(folder, **loaded))
    reader = tokenizer.load(folder)
    texts = prompts
    if settings.get("chat"):
        texts = [tokenizer.chat_prompt(reader, prompt) for prompt in prompts]
    encoded = tokenizer.encode(reader, texts)
    context = architecture.max_position_embeddings
    for ids in encoded:
        continuation.check_length(len(ids), sampling, context)
    with jax.set_mesh(mesh):
        model = loader.load(
            folder,
            dtype=settings.get("dtype"),
            quantization=settings["quant"],
            search=not settings.get("quant_fast"),
            mesh=mesh,
        )
        if processes.leads() and (note := inventory.dense_note(settings["quant"], model)):
            print(note, file=sys.stderr)
        if adapter:
            peft.load(model, adapter)
        graphdef, *state = model_state.split(model)
        trained, frozen = sharding.place(state, mesh)
        form = decode_weights.choose(model, mesh)
        if form and processes.leads():
            size = console.size(decode_weights.num_bytes(model, form))
            print(f"decode: a {form} copy of the weights, {size}", file=sys.stderr)
        continue_ = continuation.make(
            graphdef, sampling, tokenizer.eos_ids(reader, folder), form=form
        )
        key = jax.random.key(settings["seed"])
        yield from continuation.continuations(
            continue_, trained, frozen, encoded, reader, key=key, mesh=mesh
        )


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(
            expected="a file of UTF-8 text with one prompt a line",
            found=getattr(error, "strerror", str(error)),
            where=str(path),
        ) from None
