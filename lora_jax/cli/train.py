"""Fine-tune a LLaMA with LoRA on a quantized base, and save a PEFT adapter."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

from lora_jax import assets, console, errors
from lora_jax.cli import arguments
from lora_jax.generation import config as generation_config
from lora_jax.lora import config
from lora_jax.models import config as model_config
from lora_jax.optim import config as optim_config
from lora_jax.parallel import processes
from lora_jax.training import members, monitor, run_folder

DEFAULTS = {
    **dataclasses.asdict(config.LoRAConfig()),
    **dataclasses.asdict(optim_config.OptimConfig()),
    "beta": 0.1,
    "batch_size": 4,
    "grad_accum": 4,
    "epochs": 1.0,
    "remat": "auto",
    "seed": 0,
    "save_every": 100,
    "keep_checkpoints": 2,
    "exact_match": 0,
    "max_new_tokens": generation_config.Sampling.max_new_tokens,
    "temperature": generation_config.Sampling.temperature,
}
NUMBERS = {  # flags with a number, by what it must at least be
    0: ("max_steps", "exact_match", "seed", "lr", "warmup", "weight_decay", "clip", "temperature"),
    1e-6: ("epochs", "alpha", "lora_plus_ratio", "beta"),
    1: (
        "batch_size",
        "grad_accum",
        "save_every",
        "eval_every",
        "keep_checkpoints",
        "max_new_tokens",
        "patience",
        "log_every",
    ),
    2: ("seq_len",),
}
DESCRIPTION = """\
Fine-tune a LLaMA with LoRA on a quantized base, and save a PEFT adapter.

  train.py --rank 8 --quant int4                     the demo that ships inside
  train.py --model huggyllama/llama-7b --use-4bit --dataset my.jsonl
  train.py --resume --output-dir runs/…              go on where a run stopped
"""


def parse(argv: list[str] | None = None) -> tuple[dict[str, Any], bool]:
    """(flags that were typed, whether to resume)."""
    flags = arguments.Flags(DESCRIPTION, DEFAULTS)
    arguments.add_model(flags)
    arguments.add_data(flags)
    flags.group("adapter")
    flags.add("--rank", "size of A and B", type=int, metavar="R")
    flags.add("--alpha", "the adapter is scaled by alpha / rank", type=float)
    flags.add("--dropout", "on the adapter's input, in training", type=float, metavar="P")
    flags.add("--targets", "names of linear layers, a regex, or all-linear; also embed_tokens (for "
              "new words or a new language) and lm_head")  # fmt: skip
    flags.add("--exclude", "names or a regex left out of the targets")
    flags.add("--layers", "adapt these alone, e.g. 16-31 (late layers: style, at half the price)",
              metavar="I,J-K")  # fmt: skip
    flags.add("--rank-pattern", "another rank for layers whose path ends so; may be given again",
              action="append", metavar="REGEX=R")  # fmt: skip
    flags.add("--alpha-pattern", "another alpha, likewise", action="append", metavar="REGEX=A")
    flags.add("--modules-to-save", "names of modules to train and save whole, such as lm_head, "
              "embed_tokens (new tokens) or norm")  # fmt: skip
    flags.add("--use-rslora", "scale by alpha / √rank instead: for ranks of 64 and more",
              action="store_const", const=True)  # fmt: skip
    flags.add("--use-dora", "train lengths and directions of the weights apart: nearer to full "
              "fine-tuning at ranks below 16, for a slower step", action="store_const",
              const=True)  # fmt: skip
    flags.add("--init-lora-weights", "default, pissa (begin with the weights' principal part: "
              "learns sooner, and rounds less of them) or pissa_niter_16 (nearly that, sooner "
              "done)", metavar="HOW")  # fmt: skip
    flags.add("--lora-plus-ratio", "learning rate of B over that of A (LoRA+): 4 to 16 learns "
              "sooner in wide models", type=float, metavar="X")  # fmt: skip
    flags.group("training")
    flags.add("--batch-size", "rows computed at a time, over all devices", type=int, metavar="B")
    flags.add("--grad-accum", "such batches per optimizer step", type=int, metavar="A")
    flags.add("--max-steps", "optimizer steps, instead of --epochs", type=int, metavar="N")
    flags.add("--epochs", "passes over the data", type=float, metavar="E")
    flags.add("--lr", "peak learning rate", type=float)
    flags.add("--schedule", "after the warmup", choices=optim_config.SCHEDULES)
    flags.add("--warmup", "steps if ≥ 1, else the share of all steps", type=float)
    flags.add("--weight-decay", "decoupled, as in AdamW", type=float, metavar="W")
    flags.add("--clip", "largest norm of the gradient; 0: none", type=float, metavar="NORM")
    flags.add("--remat", "what the backward pass computes again, to save memory; auto: the least "
              "that is planned to fit, on a CPU full",
              choices=("auto", *model_config.REMAT))  # fmt: skip
    flags.add("--group-by-length", "give each step rows that are about as long, in at most 8 "
              "lengths, each compiled once", action="store_const", const=True)  # fmt: skip
    flags.add("--beta", "with --dpo: how near to the base it stays, 0.01 to 0.5", type=float)
    flags.add("--sweep", "several learning rates or ranks side by side on one base, each ending as "
              "an adapter of its own: lr=1e-4,3e-4,1e-3 or rank=4,8,16; S of them compute S times "
              "--batch-size rows at a time", metavar="NAME=V,V")  # fmt: skip
    flags.add("--seed", "of data order, initial A and dropout", type=int)
    flags.group("run")
    flags.add("--output-dir", "a new folder (default: runs/DATE-TIME)", metavar="DIR")
    flags.add("--resume", "go on with the run in --output-dir; --mesh may be another, and "
              "--batch-size and --grad-accum others with the same product",
              action="store_const", const=True)  # fmt: skip
    flags.add("--eval-every", "evaluate every N steps, besides start and end", type=int,
              metavar="N")  # fmt: skip
    flags.add("--exact-match", "generate for so many held-out prompts and compare", type=int,
              metavar="N")  # fmt: skip
    flags.add("--save-every", "checkpoint every N steps", type=int, metavar="N")
    flags.add("--keep-checkpoints", "keep the newest N of them", type=int, metavar="N")
    flags.add("--keep-best", "checkpoint at every evaluation too, keep the one with the least "
              "held-out loss, and make the adapter of it",
              action="store_const", const=True)  # fmt: skip
    flags.add("--patience", "end when the held-out loss has not been less than before in N "
              "evaluations; keeps the best as --keep-best does", type=int, metavar="N")  # fmt: skip
    flags.add("--max-time", "stop and save after so long, e.g. 8h or 90m, with exit code 75",
              metavar="TIME")  # fmt: skip
    flags.add("--log-every", "a line of progress every N steps where there is no terminal "
              "(default: 20 lines in all; metrics.jsonl has every step)", type=int,
              metavar="N")  # fmt: skip
    flags.add("--report-to", "a dashboard to report the numbers to as well",
              choices=("tensorboard", "wandb"))  # fmt: skip
    flags.add("--profile", "have jax.profiler trace three steps into this folder", metavar="DIR")
    flags.group("generating, after training or with --max-steps 0")
    flags.add("--prompt", "continue this text; may be given again", action="append")
    flags.add("--chat", "put --prompt into the chat template", action="store_const", const=True)
    flags.add("--max-new-tokens", "generate at most so many", type=int, metavar="N")
    flags.add("--temperature", "0 takes the likeliest token", type=float)
    arguments.add_processes(flags)
    flags.group("planning: what the job takes and whether it fits, without weights or devices")
    flags.add("--plan", "print that, and train nothing", action="store_const", const=True)
    flags.add("--target", "cpu:N, gpu:CHIP-N or tpu:CHIP-N such as tpu:v5e-8 (default: the "
              "devices of this machine)", metavar="NAME")  # fmt: skip
    flags.add("--hbm", "memory of a device, e.g. 16GiB (default: the target's)", metavar="SIZE")
    flags.add("--no-compile", "do not ask XLA", action="store_const", const=True)
    flags.add("--json", "print one JSON object", action="store_const", const=True)
    typed = arguments.quantization(flags.typed(argv))
    for name in ("targets", "exclude"):
        if name in typed:
            typed[name] = _names(name, typed[name])
    if "modules_to_save" in typed:
        typed["modules_to_save"] = tuple(typed["modules_to_save"].replace(" ", "").split(","))
    if "layers" in typed:
        typed["layers"] = _numbers(typed["layers"])
    for name, number in (("rank_pattern", int), ("alpha_pattern", float)):
        if name in typed:
            typed[name] = _patterns(name, typed[name], number)
    for name in ("model", "eval_dataset"):
        if name in typed:
            typed[name] = _found_anywhere(typed[name])
    if "dataset" in typed:
        typed["dataset"] = [_found_anywhere(source) for source in typed["dataset"]]
    if "weights" in typed:
        typed["weights"] = arguments.weights(typed["weights"])
    if "max_time" in typed:
        typed["max_time"] = arguments.seconds(typed["max_time"])
    if "sweep" in typed:
        members.parse(typed["sweep"])
    if "columns" in typed:
        typed["columns"] = arguments.columns(typed["columns"])
    return typed, typed.pop("resume", False)


def _found_anywhere(text: str) -> str:
    """A path so that it is found from any folder; a hub id as it is."""
    path = pathlib.Path(text).expanduser()
    return str(path.absolute()) if path.exists() else text


def _names(flag: str, text: str) -> tuple[str, ...] | str:
    if text == "all-linear":
        return text
    if all(c.isalnum() or c in "_,. " for c in text):
        return tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        re.compile(text)
    except re.error as error:
        raise errors.UserError(
            expected="names such as q_proj,v_proj, a regular expression, or all-linear",
            found=f"{text}: {error}",
            where=f"--{flag.replace('_', '-')}",
        ) from None
    return text


def _numbers(text: str) -> tuple[int, ...]:
    """(0, 2, 3, 4) from "0,2-4"."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise errors.UserError(
                expected="layer numbers such as 0,2 or 16-31", found=repr(text), where="--layers"
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(found))


def _patterns(flag: str, texts: list[str], number: Callable[[str], float]) -> dict[str, float]:
    """{"down_proj": 4} from ["down_proj=4"]."""
    found = {}
    for text in texts:
        pattern, _, value = text.rpartition("=")
        try:
            re.compile(pattern)
            found[pattern] = number(value)
        except (ValueError, re.error):
            pattern = ""
        if not pattern:
            raise errors.UserError(
                expected="REGEX=NUMBER, such as down_proj=4",
                found=repr(text),
                where=f"--{flag.replace('_', '-')}",
            )
    return found


def resolve(typed: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a new run: what was typed, else the demo's table or the defaults."""
    settings = {**DEFAULTS}
    if "model" not in typed and "dataset" not in typed:
        settings |= assets.settings()
    if "max_steps" in typed and "epochs" in typed:
        raise errors.UserError(
            expected="one length of training",
            found="--max-steps and --epochs",
            do="give one of them",
        )
    if "epochs" in typed:
        settings.pop("max_steps", None)
    settings |= typed
    settings.setdefault("model", str(assets.FOLDER))
    if "dataset" not in settings:
        if settings.get("dpo"):
            raise errors.UserError(
                expected="preferences to train on",
                found="--dpo without --dataset",
                do="give a --dataset with prompt, chosen and rejected",
            )
        settings["dataset"] = [str(assets.TRAIN)]
        settings.setdefault("eval_dataset", str(assets.EVAL))
    _check_numbers(settings)
    if settings.get("streaming"):
        _check_streaming(settings, typed)
    arguments.check_quant_fast(settings)
    arguments.check_data(settings)
    prompt = settings.get("prompt")
    swept, each = members.parse(settings["sweep"]) if settings.get("sweep") else ("", {})
    if swept:
        settings[swept] = max(each.values())
    pointless = [
        text
        for text, is_so in (
            ("--max-steps 0 without a --prompt", settings.get("max_steps") == 0 and not prompt),
            ("--chat without a --prompt", settings.get("chat") and not prompt),
            ("--exact-match without --eval-dataset or --eval-every", settings["exact_match"]
             and not settings.get("eval_dataset") and not settings.get("eval_every")),
            ("--keep-best without --eval-dataset or --eval-every", settings.get("keep_best")
             and not settings.get("eval_dataset") and not settings.get("eval_every")),
            ("--beta without --dpo", "beta" in typed and not settings.get("dpo")),
            ("--packing with --dpo, whose pairs take a line each", settings.get("packing")
             and settings.get("dpo")),
            ("--group-by-length with --packing, whose lines are full",
             settings.get("group_by_length") and settings.get("packing")),
            ("--exact-match with --dpo", settings["exact_match"] and settings.get("dpo")),
            ("--patience without --eval-dataset or --eval-every", settings.get("patience")
             and not settings.get("eval_dataset") and not settings.get("eval_every")),
            (f"--{swept} with --sweep {swept}=…", swept in typed),
            ("--keep-best with --sweep: its adapters are of the last step", swept
             and settings.get("keep_best")),
            ("--patience with --sweep, whose members end together", swept
             and settings.get("patience")),
            ("--max-steps 0 with --sweep", swept and settings.get("max_steps") == 0),
            ("--init-lora-weights pissa with --sweep rank=…, of which each would change the base",
             swept == "rank" and settings["init_lora_weights"] != "default"),
            ("--temperature without a --prompt", "temperature" in typed and not prompt),
            ("--max-new-tokens without a --prompt", "max_new_tokens" in typed and not prompt),
            ("--revision of a model that is not given", "revision" in typed
             and "model" not in typed),
        )
        if is_so
    ]  # fmt: skip
    if pointless:
        raise errors.UserError(expected="flags that have an effect", found=pointless)
    if settings.get("patience"):
        settings["keep_best"] = True
    return settings


def _check_streaming(settings: dict[str, Any], typed: dict[str, Any]) -> None:
    """Raises UserError for what cannot be said of a stream, whose end is not known."""
    wrong = {
        "--max-steps N, instead of --epochs": settings.get("max_steps") is None,
        "no --group-by-length, but --packing": settings.get("group_by_length"),
        "an --eval-dataset of its own": settings.get("eval_every")
        and not settings.get("eval_dataset"),
    }
    if found := [do for do, is_so in wrong.items() if is_so]:
        asked = [f"--{name.replace('_', '-')}" for name in
                 ("epochs", "group_by_length", "eval_every") if name in typed]  # fmt: skip
        raise errors.UserError(
            expected="what goes with data whose end is not known",
            found=" ".join(["--streaming", *asked]),
            do=", and ".join(found),
        )


def _check_numbers(settings: dict[str, Any]) -> None:
    wrong = [
        f"--{name.replace('_', '-')} {settings[name]} (at least {least:g})"
        for least, names in NUMBERS.items()
        for name in names
        if settings.get(name) is not None and not least <= settings[name] < math.inf
    ]
    if wrong:
        raise errors.UserError(expected="numbers in their range", found=wrong)


def main() -> int:
    typed, resume = parse()
    if "plan" in typed and not resume:
        from lora_jax.cli import plan

        return plan.run(typed)
    planning = [name for name in ("plan", "target", "hbm", "no_compile", "json") if name in typed]
    if planning:
        raise errors.UserError(
            expected="flags that have an effect",
            found=[f"--{name.replace('_', '-')}" for name in planning],
            do="--plan with them and without --resume, or leave them out",
        )
    typed = arguments.join(typed | {"resume": resume})
    del typed["resume"]
    if resume and "output_dir" not in typed:
        raise errors.UserError(
            expected="the folder of the run to go on with",
            found="--resume alone",
            do="--resume --output-dir runs/…",
        )
    path = typed.get("output_dir") or str(run_folder.default_path())
    path = pathlib.Path(processes.told(path))
    if not resume:
        settings = resolve(typed)
        # Refused before anything heavy is loaded or written.
        config.build(config.LoRAConfig, settings)
        config.build(optim_config.OptimConfig, settings)
    if "report_to" in typed:
        monitor.check_report_to(typed["report_to"])
    with opened(path, resume) as folder:
        if resume:
            settings = resumed(typed, folder)
        elif "model" not in typed and "dataset" not in typed and settings["max_steps"] != 0:
            swept = settings.get("sweep", "").split("=")[0]
            shown = {name: settings[name] for name in assets.settings()
                     if name in settings and name != swept}  # fmt: skip
            console.say("settings", "the demo's: " + console.pairs(shown))
        from lora_jax.training import (
            loop,  # imports jax
            sweep_job,
        )

        how = {"resume": resume, "default_batch": not resume and "batch_size" not in typed}
        kind = sweep_job.SweepJob if settings.get("sweep") else loop.Job
        return loop.run(settings, folder, kind, **how)


def opened(path: pathlib.Path, resume: bool) -> run_folder.RunFolder:
    """The output folder: process 0's, or as the others see it once process 0 has it.

    They end with process 0 where it is refused the folder.
    """
    if not processes.leads():
        processes.told(None)
        return run_folder.Followed(path)
    folder = run_folder.RunFolder(path, resume=resume)
    processes.told(None)
    return folder


def resumed(typed: dict[str, Any], folder: run_folder.RunFolder) -> dict[str, Any]:
    """The settings of the run in `folder`, plus what may be typed anew.

    That is what is printed at the end, and how a step is dealt out: the mesh, and the size and the
    number of its batches as long as its rows stay the same.
    """
    settings = DEFAULTS | folder.read_run()["settings"]  # it may be of a version with fewer
    if typed.get("remat") == "auto":  # what it was in the run
        typed = {**typed, "remat": settings["remat"]}
    anew = ("output_dir", "prompt", "chat", "max_new_tokens", "temperature", "mesh", "max_time",
            "log_every", "report_to", "profile")  # fmt: skip
    split = ("batch_size", "grad_accum")
    rows, typed_rows = (math.prod(s[name] for name in split) for s in (settings, settings | typed))
    if rows == typed_rows:
        anew += split
    elif any(name in typed for name in split):
        raise errors.UserError(
            expected=f"{rows} rows a step, as the run has them: --batch-size {settings[split[0]]} "
            f"× --grad-accum {settings[split[1]]}",
            found=f"{(settings | typed)[split[0]]} × {(settings | typed)[split[1]]}",
            where=str(folder.path / "run.json"),
            do="choose two numbers with this product, or start a new run",
        )
    contradicting = [
        f"--{name.replace('_', '-')} {value}, but the run has {settings.get(name)}"
        for name, value in typed.items()
        if name not in anew
        and json.loads(json.dumps(value)) != settings.get(name)  # a tuple is a list there
    ]
    if contradicting:
        raise errors.UserError(
            expected="--resume with the settings of the run",
            found=contradicting,
            where=str(folder.path / "run.json"),
            do="leave these flags out, or start a new run",
        )
    _check_numbers(settings | typed)
    return settings | typed
