"""One frozen dataclass for each concern of a training run, composed in TrainSettings.

Every field has the name of its flag, and no two fields of TrainSettings have the same name. So the
settings of a run are also one flat mapping, as in run.json and YAML.
"""

import dataclasses
import os
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_jax import assets, errors, quant
from lora_jax.generation import config as generation_config
from lora_jax.lora import config as lora_config
from lora_jax.models import config as model_config
from lora_jax.models import quantization_config as model_quantization
from lora_jax.optim import config as optim_config
from lora_jax.training.settings import convert

SEQ_LEN = 1024  # tokens; less if the model's context is shorter
REPORTS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # dashboard: the package it needs
Flat = dict[str, "Value"]  # {name: value}
Value = bool | int | float | str | os.PathLike | Sequence[Any] | Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The base model and how it is loaded.

    Args:
      model: a folder or a Hugging Face id.
      revision: branch, tag or commit of a hub model.
      chat_template: a Jinja file, or the folder or hub id of a model, whose chat template is used,
        or the template itself; None: that of the tokenizer.
      add_tokens, add_special_tokens: texts that become tokens besides those of the tokenizer, with
        rows of the embedding and the head that are trained; special ones are left out of the
        generated text.
      quant: the format of the frozen linear layers, one of quant.QUANTS; None: the checkpoint's.
      quant_fast: quantize to int4 without the search for scales.
      dtype: compute dtype; None: config.json's, with float16 read as bfloat16.
      mesh: devices by axis, such as "data=-1,fsdp=8"; None: fsdp if the base does not fit on one
        device, else data.
      kernels: "auto": the kernels that suit the device and are right on it; "xla": XLA's own
        operations.
    """

    model: str = str(assets.FOLDER)
    revision: str | None = None
    chat_template: str | None = None
    add_tokens: tuple[str, ...] = ()
    add_special_tokens: tuple[str, ...] = ()
    quant: str | None = None
    quant_fast: bool = False
    dtype: str | None = None
    mesh: str | None = None
    kernels: str = "auto"

    def resolve_quant(self, architecture: model_config.LlamaConfig, folder: pathlib.Path) -> str:
        """The format in which the model in `folder` is loaded.

        Raises: UserError if the checkpoint cannot be loaded in it, or if quant_fast has no effect.
        """
        stored = architecture.quantization
        chosen = model_quantization.choose(self.quant, stored, str(folder))
        if stored is not None and stored.stays_packed and self.quant_fast:
            raise errors.UserError(
                expected="flags that have an effect",
                found=f"--quant-fast with a checkpoint that is already quantized ({stored.fmt})",
                where=str(folder),
                do="leave it out",
            )
        return chosen


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data sets, and how their examples become sequences.

    Args:
      dataset: files, folders or hub ids to train on; several are mixed.
      weights: their shares of the sequences; None: each example once an epoch.
      eval_dataset: held-out data; None: a share of `dataset` if eval_every is set.
      columns: {field: name of the column in the file}.
      seq_len: the number of tokens to cut examples at; None: SEQ_LEN or the model's context.
      split_texts: cut a longer `text` into several examples, instead of leaving out its end.
      train_on_inputs: the loss is on prompts and all messages too, not on the answers alone.
      packing: pack several examples into each sequence; attention stays within an example.
      group_by_length: give each step examples of about the same length.
      streaming: read the data during training, not before it.
      skip_bad_rows: how many rows that cannot be trained on are skipped; one more is an error.
      dpo: train on preferences.
      as_chat: put prompts, instructions and their answers into the chat template.
      chat_time: the time, in ISO 8601, that a chat template prints; None: when the run starts.
    """

    dataset: tuple[str, ...] = (str(assets.TRAIN),)
    weights: tuple[int, ...] | None = None
    eval_dataset: str | None = None
    columns: dict[str, str] | None = None
    seq_len: int | None = None
    split_texts: bool = False
    train_on_inputs: bool = False
    packing: bool = False
    group_by_length: bool = False
    streaming: bool = False
    skip_bad_rows: int = 0
    dpo: bool = False
    as_chat: bool = False
    chat_time: str | None = None

    def resolve_seq_len(self, context: int) -> int:
        """seq_len or its default. Raises: UserError if it exceeds the model's context."""
        seq_len = self.seq_len or min(SEQ_LEN, context)
        if seq_len > context:
            raise errors.UserError(
                expected=f"examples within the model's context of {context} tokens",
                found=f"--seq-len {seq_len}",
                do=f"--seq-len {context}",
            )
        return seq_len


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What is trained, what a step computes, how many steps there are, and the random seed.

    Args:
      init_adapter: the adapter to train further, a folder or a hub id; None: a new one.
      batch_size: sequences per forward pass, over all devices.
      grad_accum: batches per optimizer step.
      max_steps: optimizer steps, instead of epochs.
      epochs: passes over the data.
      remat: what the backward pass recomputes: "full", "dots", "none", or "auto": as little as is
        planned to fit.
      beta: with DPO, how close the model stays to the base.
      sweep: several learning rates or ranks trained at the same time, such as "lr=1e-4,3e-4".
      seed: of the data order, the initial A, and dropout.
    """

    init_adapter: str | None = None
    batch_size: int = 4
    grad_accum: int = 4
    max_steps: int | None = None
    epochs: float = 1.0
    remat: str = "auto"
    beta: float = 0.1
    sweep: str | None = None
    seed: int = 0

    @property
    def swept(self) -> str | None:
        """The name of the setting that the sweep varies: "lr" or "rank"."""
        return convert.sweep(self.sweep)[0] if self.sweep else None


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """When the adapter is evaluated, and what follows from it.

    Args:
      eval_every: steps between evaluations, besides those at the start and the end; below 1 their
        share of all steps.
      eval_size: how many examples of each data set are held out without eval_dataset; below 1 their
        share.
      exact_match: the number of held-out prompts whose answers are generated and compared.
      keep_best: keep the checkpoint with the lowest held-out loss, and save its adapter.
      patience: stop after this many evaluations without a lower held-out loss.
    """

    eval_every: int | float | None = None
    eval_size: int | float = 0.02
    exact_match: int = 0
    keep_best: bool = False
    patience: int | None = None


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The output folder, checkpoints and reports.

    Args:
      output_dir: a new folder; None: runs/DATE-TIME.
      save_every: steps between checkpoints; below 1 their share of all steps.
      keep_checkpoints: the number of checkpoints to keep.
      max_time: seconds after which the run saves and stops.
      log_every: steps between progress lines without a terminal; None: 20 lines in all.
      report_to: a dashboard, one of REPORTS.
      profile: a folder for a trace of three steps by jax.profiler.
    """

    output_dir: str | None = None
    save_every: int | float = 100
    keep_checkpoints: int = 2
    max_time: float | None = None
    log_every: int | None = None
    report_to: str | None = None
    profile: str | None = None


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """Prompts that the model continues after training.

    Args:
      prompt: the prompts.
      chat: put each into the chat template.
      max_new_tokens, temperature: see generation.Sampling.
    """

    prompt: tuple[str, ...] = ()
    chat: bool = False
    max_new_tokens: int = generation_config.Sampling.max_new_tokens
    temperature: float = generation_config.Sampling.temperature

    @property
    def sampling(self) -> generation_config.Sampling:
        """How the next token is chosen."""
        return generation_config.Sampling(self.max_new_tokens, self.temperature)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """All settings of a training run. `build` creates and checks them.

    given: the names that the user has set. The others have defaults; a default batch size may be
    rounded up to suit the devices. None: those whose values are not the defaults, and the model and
    the dataset.
    """

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    lora: lora_config.LoRAConfig = dataclasses.field(default_factory=lora_config.LoRAConfig)
    optim: optim_config.OptimConfig = dataclasses.field(default_factory=optim_config.OptimConfig)
    loop: LoopSettings = LoopSettings()
    eval: EvalSettings = EvalSettings()
    run: RunSettings = RunSettings()
    prompts: PromptSettings = PromptSettings()
    given: frozenset[str] = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        if self.given is None:
            object.__setattr__(self, "given", frozenset({"model", "dataset", *_changed(self)}))

    @property
    def beta(self) -> float | None:
        """The beta of DPO; None without DPO."""
        return self.loop.beta if self.data.dpo else None

    @property
    def sequence_length(self) -> int:
        """The maximum number of tokens in a sequence, which with DPO is a pair. Needs seq_len."""
        return (self.data.seq_len or SEQ_LEN) * (2 if self.data.dpo else 1)

    @property
    def evaluates(self) -> bool:
        """Whether there is held-out data."""
        return bool(self.data.eval_dataset or self.eval.eval_every)

    def replace(self, **changes: Value) -> "TrainSettings":
        """A copy with other values, by name. Raises: UserError if a name is no setting."""
        if unknown := [name for name in changes if name not in FIELDS]:
            raise errors.UserError(
                expected="names of settings",
                found=unknown,
                do=errors.did_you_mean(unknown[0], FIELDS),
            )
        parts: dict[str, Flat] = {}
        for name, value in changes.items():
            parts.setdefault(FIELDS[name].part, {})[name] = value
        return dataclasses.replace(
            self,
            given=self.given.union(changes),
            **{part: dataclasses.replace(getattr(self, part), **new)
               for part, new in parts.items()},
        )  # fmt: skip

    def flat(self) -> Flat:
        """{name: value} in the types of JSON, without values that are None."""
        values = {name: getattr(getattr(self, field.part), name) for name, field in FIELDS.items()}
        return {name: _of_json(value) for name, value in values.items() if value is not None}


def _of_json(value: Any) -> Any:
    """The value with lists in place of tuples."""
    if isinstance(value, dict):
        return {name: _of_json(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _changed(settings: TrainSettings) -> Iterator[str]:
    """The names of the settings whose values are not the defaults."""
    for part in vars(settings).values():
        if dataclasses.is_dataclass(part):
            defaults = type(part)()
            for field in dataclasses.fields(part):
                if getattr(part, field.name) != getattr(defaults, field.name):
                    yield field.name


class Field(typing.NamedTuple):
    """A setting: its part of TrainSettings, its type, and its default."""

    part: str
    hint: Any
    default: Value


def _fields() -> Iterator[tuple[str, Field]]:
    defaults = TrainSettings()
    for part in dataclasses.fields(TrainSettings):
        inside = getattr(defaults, part.name)
        if dataclasses.is_dataclass(inside):
            hints = typing.get_type_hints(type(inside))
            for field in dataclasses.fields(inside):
                default = getattr(inside, field.name)
                yield field.name, Field(part.name, hints[field.name], default)


FIELDS: dict[str, Field] = dict(_fields())
CHOICES: dict[str, tuple[str, ...]] = {
    "quant": quant.QUANTS,
    "dtype": ("float32", "bfloat16"),
    "kernels": ("auto", "xla"),
    "schedule": optim_config.SCHEDULES,
    "remat": ("auto", *model_config.REMAT),
    "report_to": tuple(REPORTS),
}
