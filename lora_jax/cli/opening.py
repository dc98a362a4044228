"""A base model and its adapter from the flags, loaded for generation."""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import assets, console, errors, hub, lora, tokenizer
from lora_jax.checkpoints import inventory, loader, model_folder
from lora_jax.cli import model_flags
from lora_jax.data.chats import chat
from lora_jax.generation import chunks, config, engine
from lora_jax.generation import pool as pools
from lora_jax.generation import weights as decode_weights
from lora_jax.kernels import choice
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import outer_names, peft, tied_head, token_indices, unshared
from lora_jax.lora.nnx import bank
from lora_jax.models import config as model_config
from lora_jax.models import llama
from lora_jax.parallel import devices, processes
from lora_jax.parallel import mesh as sharding
from lora_jax.selftest import of_model, proof
from lora_jax.training.settings import groups

_RANKS = (8, 16)  # of a slot; an adapter of a larger rank takes several
_BANK_SLOTS = 8
_SHOWN = 4  # tokens of an adapter
_SHARE = 0.8  # of the free memory, for keys and values; the rest is for a step


@dataclasses.dataclass(frozen=True)
class Files:
    """What is to be loaded, before any weight is: prompts can be checked against it.

    name: the base as it was given. adapted: the adapter, if it becomes part of the model.
    num_tokens: of the model's embedding.
    """

    name: str
    folder: pathlib.Path
    adapter: pathlib.Path | None
    adapted: lora_adapter.Adapter | None
    reader: Any
    quant: str
    num_tokens: int
    context: int
    eos_ids: tuple[int, ...]
    mesh: Mesh


def files(
    settings: groups.ModelSettings,
    model: str | None,
    adapter: str | None,
    *,
    own: bool = True,
    if_unshared: bool = False,
) -> Files:
    """The files of a base and its adapter. The base is `model`, else the adapter's, else the demo.

    own: the adapter becomes part of the model; else it only names the base and the tokenizer.
    if_unshared: it becomes part of the model if it cannot share a batch with the base.
    """
    if processes.leads() and (warning := devices.unused_accelerator()):
        print(f"warning: {warning}", file=sys.stderr)
    devices.keep_freed_memory()
    devices.keep_compiled()
    found = hub.adapter_folder(adapter) if adapter else None
    name, revision = model or str(assets.FOLDER), settings.revision
    if found and not model:
        name, own_revision = peft.base_of(found)
        revision = revision or own_revision
    folder = hub.model_folder(name, revision, named_by=None if model else found)
    architecture = model_folder.config(folder)
    quant = settings.resolve_quant(architecture, folder)
    if found and settings.quant is None and processes.leads():
        model_flags.note_other_base(found, quant)
    num_bytes = inventory.loaded_bytes(folder, dtype=settings.dtype, quantization=quant)
    mesh = sharding.choose(settings.mesh, num_bytes)
    reader = tokenizer.load(folder, found, chat_template=settings.chat_template)
    adapted, num_tokens = None, architecture.vocab_size
    read = peft.read(found) if found and (own or if_unshared) else None
    if read and not own:
        inner = outer_names.inner(read, architecture)
        unbatched = unshared.find(inner, architecture, str(found))
        if unbatched and processes.leads():
            print("note: the adapter becomes part of the model, so the base alone does not "
                  f"answer: it has {'; '.join(unbatched)}", file=sys.stderr)  # fmt: skip
        own = bool(unbatched)
    if read and own:
        adapted = _of_language_model(read, architecture)
        num_tokens = tied_head.num_tokens(adapted, architecture, str(found))
        if num_tokens != architecture.vocab_size and processes.leads():
            print(f"the adapter brings {num_tokens} tokens, in place of the base's "
                  f"{architecture.vocab_size}", file=sys.stderr)  # fmt: skip
    return Files(
        name, folder, found, adapted, reader, quant, num_tokens, architecture.context,
        tuple(chat.stop_ids(reader, folder)), mesh,
    )  # fmt: skip


def note_other_tokens(found: Files, adapters: Mapping[str, str]) -> None:
    """Says which adapters {name: folder or hub id} have tokens that the tokenizer has not."""
    for name, path in adapters.items():
        tokens: list[str] = []
        with errors.noted([]):  # `pool` says what is wrong with an adapter
            tokens = tokenizer.missing(found.reader, hub.adapter_folder(path))
        if tokens and processes.leads():
            shown = " ".join(tokens[:_SHOWN]) + (" …" if len(tokens) > _SHOWN else "")
            print(f"note: the tokenizer lacks {shown}, which the adapter {name} was trained "
                  "with; name it first, or use it alone", file=sys.stderr)  # fmt: skip


def load(settings: groups.ModelSettings, found: Files) -> llama.LlamaForCausalLM:
    """The model, with its adapter."""
    with jax.set_mesh(found.mesh):
        model = loader.load(
            found.folder,
            dtype=settings.dtype,
            quantization=found.quant,
            search=not settings.quant_fast,
            mesh=found.mesh,
        )
        if processes.leads():
            note = inventory.dense_note(found.quant, model)
            for each in filter(None, (note, *model_folder.notes(found.folder))):
                print(each, file=sys.stderr)
        if found.adapted:
            lora.attach(model, found.adapted, where=str(found.adapter))
    return model


def pool(
    model: llama.LlamaForCausalLM, adapters: Mapping[str, str], *, growing: bool = False
) -> pools.Pool | None:
    """The adapters {name: folder or hub id}, in a bank on the model; None if there are none.

    growing: others will be loaded later, so all linear layers get a bank.
    Raises: UserError that lists every adapter that does not fit.
    """
    if not adapters and not growing:
        return None
    problems: list[errors.UserError] = []
    read: dict[str, tuple[pathlib.Path, lora_adapter.Adapter]] = {}
    for name, path in adapters.items():
        with errors.noted(problems):
            folder = hub.adapter_folder(path)
            read[name] = folder, _of_language_model(peft.read(folder), model.config)
    if problems:
        raise errors.UserError.together(problems)
    ranks = [_ranks(own, model) for _, own in read.values()]
    most = [max(own.values()) for own in ranks if own]
    rank = next(size for size in _RANKS if size >= min(max(most, default=16), _RANKS[-1]))
    needed = sum(-(-each // rank) for each in most)
    targets = {path for own in ranks for path in own}
    if model.config.tie_word_embeddings:
        targets -= {tied_head.HEAD}  # which is no layer there: `load` says what to do instead
    bank.add(
        model,
        slots=max(_BANK_SLOTS if growing else 1, min(needed, _BANK_SLOTS)),
        rank=rank,
        targets="all-linear" if growing or not targets else tuple(sorted(targets)),
    )
    found = pools.Pool(model)
    for name, (folder, own) in read.items():
        with errors.noted(problems):
            found.load(name, own, where=str(folder))
    if problems:
        raise errors.UserError.together(problems)
    return found


def _of_language_model(
    adapter: lora_adapter.Adapter, base: model_config.LlamaConfig
) -> lora_adapter.Adapter:
    """See outer_names.inner; says what is left out."""
    if (note := outer_names.note(adapter, base)) and processes.leads():
        print(f"note: {note}", file=sys.stderr)
    return outer_names.inner(adapter, base)


def _ranks(adapter: lora_adapter.Adapter, model: llama.LlamaForCausalLM) -> dict[str, int]:
    """{path of each layer that needs a bank for the adapter: its rank there}."""
    found = {path: factors.A.shape[1] for path, factors in adapter.factors.items()}
    if not model.config.tie_word_embeddings:  # see token_indices.as_factors
        ids = {path: token_indices.of(path, adapter.config)
               for path in (tied_head.EMBEDDING, tied_head.HEAD)}  # fmt: skip
        found |= {path: len(own) for path, own in ids.items() if own}
    return found


def start(
    found: Files,
    model: llama.LlamaForCausalLM,
    *,
    slots: int,
    context: int | None = None,
    kv_dtype: str | None = None,
    fewer: bool = False,
    kernels: str = "auto",
    **how: Any,
) -> engine.Engine:
    """The engine for a loaded model. how: see engine.Engine.

    fewer: with as many of the slots as the memory has room for. kernels: see ModelSettings.

    Raises: UserError if the memory has no room for the keys and values.
    """
    if context is None and model.config.context > config.DEFAULT_CONTEXT:
        context = config.DEFAULT_CONTEXT
        if processes.leads():
            print(f"note: requests may have {context:,} tokens; --context T allows up to "
                  f"{model.config.context:,}", file=sys.stderr)  # fmt: skip
    own = context or model.config.context
    wanted = slots
    if fewer:
        slots = processes.broadcast(_fitting(model, found, slots, own, kv_dtype))
    _check_room(model, found, slots, own, kv_dtype, fixed=not fewer)
    if slots < wanted and processes.leads():
        size = console.size(_cache_bytes(model, found, wanted, own, kv_dtype))
        print(f"note: {slots} prompts at a time, because the keys and values of {wanted} take "
              f"{size}, which does not fit into the free memory", file=sys.stderr)  # fmt: skip
    _prove(kernels, found, model, slots, kv_dtype, how.get("speculate", 0))
    serving = engine.Engine(
        model, found.reader, eos_ids=found.eos_ids, slots=slots, context=context, mesh=found.mesh,
        kv_dtype=kv_dtype, **how,
    )  # fmt: skip
    form = serving.batch.form
    if serving.batch.form_bytes and processes.leads():
        size = console.size(serving.batch.form_bytes)
        print(f"decode: a {form} copy of the weights, {size}", file=sys.stderr)
    return serving


def compile_ahead(serving: engine.Engine) -> None:
    """Compiles what later requests need besides the first; not on a CPU, which serves those."""
    if jax.default_backend() != "cpu":
        serving.compile_ahead()


def _prove(kernels: str, found: Files, *job: Any) -> None:
    """Checks the kernels that decode on these devices; those that fail are left out.

    job: the arguments of of_model.generation.
    """
    choice.use(kernels)
    with jax.set_mesh(found.mesh):
        if kernels == "xla" or not proof.is_needed():
            return
        for line in proof.run([*of_model.generation(*job)]).lines():
            if processes.leads():
                print(f"kernels: {line}", file=sys.stderr)


def _fitting(model, found: Files, slots: int, context: int, kv_dtype: str | None) -> int:
    """The slots, halved until their cache leaves room for a step."""
    free = devices.free_bytes(found.mesh.local_devices[0])
    form = decode_weights.choose(model, found.mesh)
    room = (free or 0) - (decode_weights.num_bytes(model, form) if form else 0)
    fitting = slots
    while (
        free is not None
        and fitting > 1
        and _cache_bytes(model, found, fitting, context, kv_dtype) > _SHARE * room
    ):
        fitting //= 2
    return fitting


def _check_room(
    model, found: Files, slots: int, context: int, kv_dtype: str | None, *, fixed: bool
) -> None:
    """fixed: the number of slots and the context were given."""
    free = devices.free_bytes(found.mesh.local_devices[0])
    needed = _cache_bytes(model, found, slots, context, kv_dtype)
    if free is not None and needed > free and processes.leads():
        raise errors.UserError(
            expected=f"keys and values that fit into the {console.size(free)} that are free",
            found=f"{slots} slots of {context} tokens, which take {console.size(needed)} on a "
            "device",
            do="lower --slots or --context" + ("" if kv_dtype else ", or use --kv-cache-dtype int8")
            if fixed
            else "lower --max-new-tokens, or shorten the longest prompt",
        )


def _cache_bytes(model, found: Files, slots: int, context: int, kv_dtype: str | None) -> int:
    """Of the keys and values on a device."""
    places = chunks.spans_of(model.config, context).size
    shape = jax.eval_shape(lambda: model.empty_cache(slots, places, kv_dtype))
    where = sharding.cache(slots, model.config.num_key_value_heads, found.mesh)
    return sum(
        math.prod(where.shard_shape(part.shape)) * part.dtype.itemsize
        for part in jax.tree.leaves(shape)
    )
