"""Finds settings that contradict each other, are out of range, or have no effect."""

import collections
import dataclasses
import datetime
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping

from lora_jax import errors
from lora_jax.lora import config as lora_config
from lora_jax.training.settings import convert, groups

_LEAST = {  # {lowest value: settings}
    0: ("max_steps", "exact_match", "seed", "lr", "warmup", "weight_decay", "clip", "temperature",
        "skip_bad_rows"),
    1e-6: ("epochs", "alpha", "lora_plus_ratio", "beta", "max_time"),
    1: ("batch_size", "grad_accum", "keep_checkpoints", "max_new_tokens", "patience", "log_every"),
    2: ("seq_len",),
}  # fmt: skip
_MOST = {2**32 - 1: ("seed",)}  # of the others JAX takes the last 32 bits


_NUMBERS_OR_SHARES = ("eval_every", "eval_size", "save_every")
_PROMPT = ("a --prompt", lambda settings: bool(settings.prompts.prompt))
_HELD_OUT = ("--eval-dataset or --eval-every", lambda settings: settings.evaluates)
# {setting: (what it needs to have an effect, whether the settings have that)}
_NEEDS: dict[str, tuple[str, Callable[[groups.TrainSettings], bool]]] = {
    "beta": ("--dpo", lambda settings: settings.data.dpo),
    **dict.fromkeys(("chat", "temperature", "max_new_tokens"), _PROMPT),
    "eval_size": (
        "--eval-every, or with --eval-dataset",
        lambda settings: bool(settings.eval.eval_every and not settings.data.eval_dataset),
    ),
    **dict.fromkeys(("exact_match", "keep_best", "patience"), _HELD_OUT),
}


# What an adapter to start from has itself.
_OF_ADAPTER = {field.name for field in dataclasses.fields(lora_config.LoRAConfig)} - {"dropout"}
_OF_ADAPTER |= {"add_tokens", "add_special_tokens"}


def is_inert(name: str, settings: groups.TrainSettings) -> bool:
    """Whether a setting has no effect, given the others."""
    if settings.loop.init_adapter and name in _OF_ADAPTER:
        return True
    if name == "epochs":
        return settings.loop.max_steps is not None
    if name == settings.loop.swept:
        return True
    return name in _NEEDS and not _NEEDS[name][1](settings)


def problems(settings: groups.TrainSettings) -> Iterator[errors.UserError]:
    """Yields an error for each contradiction, value out of range, or setting without effect."""
    if {"max_steps", "epochs"} <= settings.given:
        yield errors.UserError(
            expected="one length of training",
            found="--max-steps and --epochs",
            do="give one of them",
        )
    if not settings.data.dataset:
        yield errors.UserError(expected="data to train on", found="an empty --dataset")
    if settings.data.dpo and "dataset" not in settings.given:
        yield errors.UserError(
            expected="preferences to train on",
            found="--dpo without --dataset",
            do="give a --dataset with prompt, chosen and rejected",
        )
    yield from out_of_range(settings.flat())
    yield from _adapter(settings)
    if settings.data.streaming:
        yield from _streaming(settings)
    yield from mixture(settings.data)
    for text in _without_effect(settings):
        yield errors.UserError(expected="flags that have an effect", found=text)
    yield from quant_fast(settings.model)
    yield from chat_time(settings.data)
    yield from new_tokens(settings.model)
    to = settings.run.report_to
    if to and importlib.util.find_spec(groups.REPORTS[to]) is None:
        yield errors.UserError(
            expected=f"the package {groups.REPORTS[to]}, for --report-to {to}",
            found="it is not installed",
            do=f"pip install {groups.REPORTS[to]}",
        )


def out_of_range(values: Mapping[str, groups.Value]) -> Iterator[errors.UserError]:
    """Yields one error that lists all numbers that are out of range, if there are any."""
    wrong = [
        f"{convert.flag(name)} {values[name]} (at least {least:g})"
        for least, names in _LEAST.items()
        for name in names
        if values.get(name) is not None and not least <= values[name] < math.inf
    ]
    wrong += [
        f"{convert.flag(name)} {values[name]} (at most {most})"
        for most, names in _MOST.items()
        for name in names
        if values.get(name) is not None and values[name] > most
    ]
    wrong += [
        f"{convert.flag(name)} {values[name]} (a whole number, or a share between 0 and 1)"
        for name in _NUMBERS_OR_SHARES
        if values.get(name) is not None and not _is_number_or_share(values[name])
    ]
    if wrong:
        yield errors.UserError(expected="numbers in their range", found=wrong)


def _is_number_or_share(value: float) -> bool:
    return 0 < value < 1 or (1 <= value < math.inf and value % 1 == 0)


def quant_fast(model: groups.ModelSettings) -> Iterator[errors.UserError]:
    """Yields an error if quant_fast has no effect."""
    fmt = model.quant or "none"  # a checkpoint's own format needs no search either
    if model.quant_fast and not fmt.startswith("int4"):
        yield errors.UserError(
            expected="flags that have an effect",
            found=f"--quant-fast with --quant {fmt}",
            do="--quant int4, or leave it out",
        )


def chat_time(data: groups.DataSettings) -> Iterator[errors.UserError]:
    """Yields an error if chat_time is no time."""
    try:
        datetime.datetime.fromisoformat(data.chat_time or "2026-01-31")
    except ValueError:
        yield errors.UserError(
            expected="a time in ISO 8601, such as 2026-01-31 or 2026-01-31T12:00",
            found=repr(data.chat_time),
            where="--chat-time",
        )


# "<a>,<b>", as --targets takes its names; a comma in a word is one of its characters.
_LIST_OF_TOKENS = re.compile(r"([<\[][^,]*[>\]])(\s*,\s*[<\[][^,]*[>\]])+")


def new_tokens(model: groups.ModelSettings) -> Iterator[errors.UserError]:
    """Yields an error if new tokens are empty, given twice, or several in one text."""
    counts = collections.Counter((*model.add_tokens, *model.add_special_tokens))
    if wrong := [f"{token!r}, {count} times" if token else "an empty text"
                 for token, count in counts.items() if count > 1 or not token]:  # fmt: skip
        yield errors.UserError(
            expected="texts that become tokens, each once",
            found=wrong,
            where="--add-tokens, --add-special-tokens",
        )
    if lists := [token for token in counts if _LIST_OF_TOKENS.fullmatch(token)]:
        yield errors.UserError(
            expected="texts that become tokens, separated by spaces",
            found=lists,
            where="--add-tokens, --add-special-tokens",
            do=" ".join(f'"{each.strip()}"' for token in lists for each in token.split(",")),
        )


def _adapter(settings: groups.TrainSettings) -> Iterator[errors.UserError]:
    """Yields an error for settings that the adapter to start from has itself."""
    if settings.loop.init_adapter and (given := sorted(_OF_ADAPTER & settings.given)):
        yield errors.UserError(
            expected="the settings of the adapter that is trained further",
            found=[f"{convert.flag(name)} with --init-adapter" for name in given],
            do="leave them out, or start without --init-adapter",
        )


def _without_effect(settings: groups.TrainSettings) -> Iterator[str]:
    flat, swept, loop = settings.flat(), settings.loop.swept, settings.loop
    for name, field in groups.FIELDS.items():
        changed = name in settings.given and flat.get(name) != field.default
        if changed and name in _NEEDS and is_inert(name, settings):
            yield f"{convert.flag(name)} without {_NEEDS[name][0]}"
    for text, is_so in (
        ("--max-steps 0 without a --prompt", loop.max_steps == 0 and not settings.prompts.prompt),
        ("--packing with --dpo: each pair is a sequence of its own", settings.data.packing
         and settings.data.dpo),
        ("--group-by-length with --packing, which makes full sequences",
         settings.data.group_by_length and settings.data.packing),
        ("--exact-match with --as-chat: it compares texts", settings.eval.exact_match
         and settings.data.as_chat),
        ("--min-lr-ratio with --schedule constant", settings.optim.min_lr_ratio
         and settings.optim.schedule == "constant"),
        ("--split-texts with --dpo", settings.data.split_texts and settings.data.dpo),
        ("--train-on-inputs with --dpo", settings.data.train_on_inputs and settings.data.dpo),
        ("--exact-match with --dpo", settings.eval.exact_match and settings.data.dpo),
        (f"--{swept} with --sweep {swept}=…", swept in settings.given),
        ("--keep-best with --sweep: its adapters are of the last step", swept
         and settings.eval.keep_best),
        ("--patience with --sweep: its adapters end at the same step", swept
         and settings.eval.patience),
        ("--patience without --eval-every: it is evaluated at the end only", settings.eval.patience
         and settings.evaluates and not settings.eval.eval_every),
        ("--max-steps 0 with --sweep", swept and loop.max_steps == 0),
        ("--sweep rank=… with --init-adapter, which has its rank", swept == "rank"
         and bool(loop.init_adapter)),
        ("--init-lora-weights pissa with --sweep rank=…: each rank would change the base",
         swept == "rank" and settings.lora.init_lora_weights != "default"),
        ("--revision without --model", "revision" in settings.given
         and "model" not in settings.given),
    ):  # fmt: skip
        if is_so:
            yield text


def _streaming(settings: groups.TrainSettings) -> Iterator[errors.UserError]:
    wrong = {
        "--max-steps N instead of --epochs": settings.loop.max_steps is None,
        "--packing instead of --group-by-length": settings.data.group_by_length,
        "a separate --eval-dataset": settings.eval.eval_every and not settings.data.eval_dataset,
    }
    if found := [do for do, is_so in wrong.items() if is_so]:
        asked = [convert.flag(name) for name in ("epochs", "group_by_length", "eval_every")
                 if name in settings.given]  # fmt: skip
        yield errors.UserError(
            expected="settings for data whose end is not known",
            found=" ".join(["--streaming", *asked]),
            do=", and ".join(found),
        )


def mixture(data: groups.DataSettings) -> Iterator[errors.UserError]:
    """Yields an error if the weights do not match the data sets."""
    given, named = len(data.weights or ()), len(data.dataset)
    if (given and given != named) or given == 1:
        yield errors.UserError(
            expected="a weight for each of several data sets",
            found=f"{given} in --weights, {named} in --dataset",
        )
    if data.streaming and named > 1 and not given:
        yield errors.UserError(
            expected="a weight for each of several streams, whose sizes are not known",
            found="--streaming of several data sets without --weights",
            do="--weights " + ",".join("1" * named),
        )
