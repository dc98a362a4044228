"""Loads what a run needs before its first step: base model, tokenizer, adapters."""

import dataclasses
import datetime
import pathlib
import time
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lora_jax import console, hub, lora, tokenizer
from lora_jax.checkpoints import inventory, loader, model_folder, safetensors_files
from lora_jax.console import say
from lora_jax.data.chats import chat, clock
from lora_jax.kernels import choice
from lora_jax.lora import outer_names, tied_head
from lora_jax.lora.nnx import model_state, vocabulary
from lora_jax.models import config as model_config
from lora_jax.models import llama
from lora_jax.parallel import mesh as sharding
from lora_jax.parallel import processes
from lora_jax.selftest import case, of_model, proof
from lora_jax.training import planned, run_data, starting
from lora_jax.training.adapters import one_adapter, sweep
from lora_jax.training.output import run_folder
from lora_jax.training.settings import groups

if TYPE_CHECKING:
    import transformers

_SHOWN = 8  # new tokens
Adapters = one_adapter.OneAdapter | sweep.SweepAdapters


class Base(NamedTuple):
    """A base model: its folder, config.json, tokenizer, and end-of-text tokens.

    architecture: with the vocabulary of the run, in which an adapter to start from may bring along
    more or fewer tokens. new_tokens: the ids of those that are new in this run.
    """

    folder: pathlib.Path
    architecture: model_config.LlamaConfig
    tokenizer: "transformers.PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]
    new_tokens: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """The rows of the embedding."""
        return self.architecture.vocab_size


def find(settings: groups.ModelSettings) -> tuple[pathlib.Path, model_config.LlamaConfig]:
    """(folder, config.json) of the base model; a hub id is downloaded first."""
    folder = hub.model_folder(settings.model, settings.revision)
    return folder, model_folder.config(folder)


def fit(
    settings: groups.TrainSettings,
    folder: pathlib.Path,
    architecture: model_config.LlamaConfig,
    *,
    resume: bool,
) -> tuple[groups.TrainSettings, Mesh]:
    """The settings with targets, format, dtype and batch size for this base and these devices.

    A default batch size is rounded up until it splits evenly over the devices.
    """
    settings = with_targets(settings, architecture)
    settings = settings.replace(quant=settings.model.resolve_quant(architecture, folder))
    num_bytes = inventory.loaded_bytes(
        folder, dtype=settings.model.dtype, quantization=settings.model.quant
    )
    mesh = sharding.choose(settings.model.mesh, num_bytes)
    settings = settings.replace(dtype=settings.model.dtype or architecture.dtype)
    if settings.loop.max_steps == 0:
        return settings, mesh
    if not resume and "batch_size" not in settings.given:
        settings = settings.replace(batch_size=sharding.round_up(settings.loop.batch_size, mesh))
    loop = settings.loop
    fixed = loop.batch_size * loop.grad_accum if resume else None
    sharding.check_batch(loop.batch_size, mesh, fixed)
    return settings, mesh


def with_targets(
    settings: groups.TrainSettings, architecture: model_config.LlamaConfig
) -> groups.TrainSettings:
    """The settings with targets that the model has, if none are given."""
    is_default = settings.lora.targets == lora.LoRAConfig.targets
    if architecture.fused_projections and is_default and "targets" not in settings.given:
        return settings.replace(targets=("qkv_proj",))
    return settings


def base(
    folder: pathlib.Path,
    architecture: model_config.LlamaConfig,
    settings: groups.ModelSettings,
    start: starting.Start | None,
) -> Base:
    """The base model with its tokenizer, or that of the adapter to start from.

    settings: with the chat template and the new tokens of the tokenizer.
    """
    reader = tokenizer.load(folder, start and start.folder, chat_template=settings.chat_template)
    num_tokens = architecture.vocab_size
    if start is not None:
        num_tokens = tied_head.num_tokens(start.adapter, architecture, str(start.folder))
    new = tokenizer.add(reader, settings.add_tokens, settings.add_special_tokens, num_tokens)
    num_tokens = max(num_tokens, new[-1] + 1) if new else num_tokens
    architecture = dataclasses.replace(architecture, vocab_size=num_tokens)
    stops = chat.stop_ids(reader, folder)
    return Base(folder, architecture, reader, stops, new)


def with_chat_time(
    settings: groups.TrainSettings, reader: "transformers.PreTrainedTokenizerBase"
) -> groups.TrainSettings:
    """The settings with the time that the chat template prints, which is set in it; it does not
    change during the run, nor when the run is resumed."""
    if not clock.is_read(reader):
        return settings
    now = datetime.datetime.now().isoformat(timespec="seconds")
    time = settings.data.chat_time or processes.broadcast(now)
    clock.stop(reader, time)
    return settings.replace(chat_time=time)


def load(
    settings: groups.TrainSettings,
    base: Base,
    mesh: Mesh,
    shape: tuple[int, int] | None,
    slots: int,
    start: starting.Start | None,
) -> Adapters:
    """The base model on its devices, with the adapters that the run trains.

    start: the adapter that is trained further; None: new ones.

    shape: of a micro-batch, [sequences, tokens], and slots: of generation; None and 0 if there is
    none. Kernels that are not right at these shapes are left out.
    """
    config = settings.lora
    principal = None
    if start is None and settings.model.quant != "none" and config.init_lora_weights != "default":
        principal = lora.Principal(config)
    model = loader.load(
        base.folder,
        dtype=settings.model.dtype,
        quantization=settings.model.quant,
        search=not settings.model.quant_fast,
        mesh=mesh,
        residual=None if principal is None else principal.take,
    )
    if base.new_tokens:
        vocabulary.add(model, base.new_tokens)
        shown = base.tokenizer.convert_ids_to_tokens(base.new_tokens[:_SHOWN])
        more = len(base.new_tokens) - len(shown)
        say("tokens", f"new, and trained: {' '.join(map(str, shown))}"
            + (f" and {more} more" if more else ""))  # fmt: skip
    _prove(settings, model, shape, slots)
    if start is None:
        lora.inject(model, config, rngs=nnx.Rngs(settings.loop.seed), principal=principal)
    else:
        starting.note_other_base(start, settings.model.quant)
        say("start", f"from the adapter {console.near(str(start.folder))}")
        if left_out := outer_names.note(start.adapter, base.architecture):
            say("note", left_out)
        lora.attach(model, start.adapter, untrained=True, where=str(start.folder))
    graphdef, *state = model_state.split(model)
    trained, frozen = sharding.place(state, mesh)
    if settings.beta is not None:  # a step reuses the memory of `trained`
        frozen = frozen._replace(reference=jax.tree.map(jnp.copy, trained))
    one = one_adapter.OneAdapter(settings, model, graphdef, trained, frozen, mesh)
    _say_sizes(settings, base, one)
    return sweep.adapters(one) if settings.loop.sweep else one


def _prove(
    settings: groups.TrainSettings,
    model: llama.LlamaForCausalLM,
    shape: tuple[int, int] | None,
    slots: int,
) -> None:
    """Checks the kernels of the run on its devices; those that fail are left out."""
    choice.use(settings.model.kernels)
    if settings.model.kernels == "xla" or not proof.is_needed():
        return
    cases: list[case.Case] = []
    if shape is not None:
        batch, length = shape
        packed = settings.data.packing or settings.data.dpo
        cases += of_model.training(
            model, batch=batch * planned.num_adapters(settings), length=length, packed=packed
        )
    if slots:
        cases += of_model.generation(model, slots)
    for line in proof.run(cases).lines():
        say("kernels", line)


def _say_sizes(settings: groups.TrainSettings, base: Base, adapter: one_adapter.OneAdapter) -> None:
    total = inventory.num_params(base.architecture)
    trainable = lora.num_params(adapter.model)
    before = sum(t.num_bytes for t in safetensors_files.tensors(base.folder).values())
    after = sum(array.nbytes for array in jax.tree.leaves(adapter.frozen.base))
    say("model", f"{console.count(total)} parameters, {console.count(trainable)} trainable "
        f"({trainable / (total + trainable):.2%}): "
        f"{console.near(settings.model.model)}")  # fmt: skip
    say("base", f"{console.size(before)} on disk, {console.size(after)} loaded "
        f"(quant {settings.model.quant})")  # fmt: skip
    if note := inventory.dense_note(settings.model.quant, adapter.model):
        say("base", note)
    for note in model_folder.notes(base.folder):
        say("base", note)


class Stopwatch:
    """Adds up the seconds of each phase of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, name: str, begun: float) -> None:
        """Adds the time since `begun`, a time.time()."""
        self.seconds[name] = self.seconds.get(name, 0) + time.time() - begun


class Job(NamedTuple):
    """What a run works with once everything is loaded."""

    settings: groups.TrainSettings
    folder: run_folder.RunFolder
    base: Base
    mesh: Mesh
    data: run_data.RunData
    adapters: Adapters
    begun: float  # a time.monotonic()
    held: int  # bytes in use before the model was loaded
    watch: Stopwatch
    start: starting.Start | None  # the adapter that is trained further

    @property
    def num_steps(self) -> int:
        return self.data.num_steps
