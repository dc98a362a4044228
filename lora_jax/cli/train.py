"""Fine-tune a LLaMA with LoRA on a quantized base, and save a PEFT adapter."""

import sys
from collections.abc import Mapping
from typing import Any

from lora_jax import console, errors
from lora_jax.cli import arguments
from lora_jax.training import settings as train_settings
from lora_jax.training.settings import assemble

DESCRIPTION = """\
Fine-tune a LLaMA with LoRA on a quantized base, and save a PEFT adapter.

  lora-jax train --rank 8 --quant int4          the demo that ships inside
  lora-jax train --model huggyllama/llama-7b --use-4bit --dataset my.jsonl
  lora-jax train --resume --output-dir runs/…   go on where a run stopped
"""
PLANNING = ("plan", "target", "hbm", "no_compile", "json")
_RIVALS = {"max_steps": "epochs", "epochs": "max_steps"}


def flags(**where: Any) -> arguments.Flags:
    """The flags of `train`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, short=True, **where)
    arguments.add_model(flags)
    arguments.add_data(flags)
    flags.group("adapter")
    flags.add("--rank", "size of A and B", main=True, type=int, metavar="R")
    flags.add("--alpha", "the adapter is scaled by alpha / rank", main=True, type=float)
    flags.add("--dropout", "on the adapter's input, in training", type=float, metavar="P")
    flags.add("--targets", "names of linear layers, a regex, or all-linear; also embed_tokens (for "
              "new words or a new language) and lm_head", main=True)  # fmt: skip
    flags.add("--exclude", "names or a regex left out of the targets")
    flags.add("--layers", "adapt only these, e.g. 16-31 (late layers: style, at half the price)",
              metavar="I,J-K")  # fmt: skip
    flags.add("--rank-pattern", "another rank for layers whose path ends so; may be repeated",
              action="append", metavar="REGEX=R")  # fmt: skip
    flags.add("--alpha-pattern", "another alpha, likewise", action="append", metavar="REGEX=A")
    flags.add("--modules-to-save", "names of modules to train and save whole, such as lm_head, "
              "embed_tokens (new tokens) or norm")  # fmt: skip
    flags.switch("--use-rslora", "scale by alpha / √rank instead: for ranks of 64 and more")
    flags.switch("--use-dora", "train the magnitudes and directions of the weights separately: "
                 "closer to full fine-tuning at ranks below 16, with a slower step")  # fmt: skip
    flags.add("--init-lora-weights", "default, pissa (start from the principal part of the "
              "weights: learns sooner, and quantizes less of them) or pissa_niter_16 (an "
              "approximation that is computed sooner)", metavar="HOW")  # fmt: skip
    flags.add("--lora-plus-ratio", "learning rate of B over that of A (LoRA+): 4 to 16 learns "
              "sooner in wide models", type=float, metavar="X")  # fmt: skip
    flags.group("training")
    flags.add("--batch-size", "sequences computed at a time, over all devices", main=True,
              type=int, metavar="B")  # fmt: skip
    flags.add("--grad-accum", "such batches per optimizer step", main=True, type=int, metavar="A")
    flags.add("--max-steps", "optimizer steps, instead of --epochs", type=int, metavar="N")
    flags.add("--epochs", "passes over the data", main=True, type=float, metavar="E")
    flags.add("--lr", "peak learning rate", main=True, type=float)
    flags.add("--schedule", "of the learning rate after the warmup")
    flags.add("--warmup", "steps if ≥ 1, else the share of all steps", type=float)
    flags.add("--weight-decay", "decoupled, as in AdamW", type=float, metavar="W")
    flags.add("--clip", "largest norm of the gradient; 0: none", type=float, metavar="NORM")
    flags.add("--remat", "what the backward pass computes again, to save memory; auto: the least "
              "that is planned to fit, on a CPU full")  # fmt: skip
    flags.switch("--group-by-length", "give each step examples of about the same length, in at "
                 "most 8 lengths, each compiled once")  # fmt: skip
    flags.add("--beta", "with --dpo: how near to the base the model stays, 0.01 to 0.5", type=float)
    flags.add("--sweep", "several learning rates or ranks side by side on one base, each ending as "
              "an adapter of its own: lr=1e-4,3e-4,1e-3 or rank=4,8,16; S of them compute S times "
              "--batch-size sequences at a time", metavar="NAME=V,V")  # fmt: skip
    flags.add("--seed", "of the data order, the initial A and dropout", type=int)
    flags.group("run")
    flags.add("--config", "a YAML file of settings, named as the flags; flags win. A run writes "
              "its own, config.yaml", metavar="FILE")  # fmt: skip
    flags.add("--output-dir", "a new folder (default: runs/DATE-TIME)", main=True, metavar="DIR")
    flags.switch("--resume", "go on with the run in --output-dir; --mesh may differ, and "
                 "--batch-size and --grad-accum too if their product stays the same",
                 main=True)  # fmt: skip
    flags.add("--eval-every", "evaluate every N steps, besides start and end", main=True, type=int,
              metavar="N")  # fmt: skip
    flags.add("--exact-match", "generate answers to so many held-out prompts and compare them",
              type=int, metavar="N")  # fmt: skip
    flags.add("--save-every", "checkpoint every N steps", type=int, metavar="N")
    flags.add("--keep-checkpoints", "keep the newest N of them", type=int, metavar="N")
    flags.switch("--keep-best", "checkpoint at every evaluation too, keep the one with the least "
                 "held-out loss, and make the adapter of it")  # fmt: skip
    flags.add("--patience", "end when the held-out loss has not improved in N evaluations; keeps "
              "the best as --keep-best does", type=int, metavar="N")  # fmt: skip
    flags.add("--max-time", "stop and save after so long, e.g. 8h or 90m, with exit code 75",
              metavar="TIME")  # fmt: skip
    flags.add("--log-every", "a line of progress every N steps if there is no terminal "
              "(default: 20 lines in all; metrics.jsonl has every step)", type=int,
              metavar="N")  # fmt: skip
    flags.add("--report-to", "a dashboard to report the metrics to as well")
    flags.add("--profile", "have jax.profiler trace three steps into this folder", metavar="DIR")
    flags.group("generating, after training or with --max-steps 0")
    flags.add("--prompt", "continue this text; may be repeated", action="append")
    flags.switch("--chat", "put --prompt into the chat template")
    flags.add("--max-new-tokens", "generate at most so many", type=int, metavar="N")
    flags.add("--temperature", "0 takes the most likely token", type=float)
    arguments.add_processes(flags)
    flags.group("planning: what the job takes and whether it fits, without weights or devices")
    flags.switch("--plan", "print that, and train nothing")
    flags.add("--target", "cpu:N, gpu:CHIP-N or tpu:CHIP-N such as tpu:v5e-8 (default: the "
              "devices of this machine)", metavar="NAME")  # fmt: skip
    flags.add("--hbm", "memory of a device, e.g. 16GiB (default: the target's)", metavar="SIZE")
    flags.switch("--no-compile", "do not ask XLA")
    flags.switch("--json", "print one JSON object")
    return flags


def parse(argv: list[str] | None = None) -> arguments.Given:
    """The flags that were typed, over those of --config."""
    typed = arguments.quantization(flags().typed(argv))
    if "config" in typed:
        typed = _over(train_settings.read(typed.pop("config")), typed)
    values = assemble.converted(settings_in(typed))
    return {**{name: value for name, value in typed.items() if name not in values}, **values}


def _over(config: Mapping[str, Any], typed: arguments.Given) -> arguments.Given:
    """The settings of a file with flags that win; a flag replaces the setting it excludes."""
    replaced = {_RIVALS[name] for name in typed if name in _RIVALS} - typed.keys()
    kept = {name: value for name, value in config.items() if name not in replaced}
    return {**kept, **typed}


def settings_in(typed: arguments.Given) -> arguments.Given:
    """The flags that are settings of a run."""
    others = {*PLANNING, "resume", "coordinator", "num_processes", "process_id"}
    return {name: value for name, value in typed.items() if name not in others}


def main() -> int:
    typed = parse()
    resume = typed.pop("resume", False)
    if "plan" in typed and not resume:
        from lora_jax.cli import plan

        return plan.run(typed)
    if planning := [name for name in PLANNING if name in typed]:
        raise errors.UserError(
            expected="flags that have an effect",
            found=[f"--{name.replace('_', '-')}" for name in planning],
            do="--plan with them and without --resume, or leave them out",
        )
    typed = arguments.join({**typed, "resume": resume})
    del typed["resume"]
    if resume and "output_dir" not in typed:
        raise errors.UserError(
            expected="the folder of the run to go on with",
            found="--resume alone",
            do="--resume --output-dir runs/…",
        )
    settings = None if resume else train_settings.build(**typed)  # before jax is imported
    from lora_jax import training

    return _end(training.resume(**typed) if resume else training.run(settings))


def _end(steps: Any) -> int:
    """Runs to the end, shows how it ended, and returns the exit code."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        outcome = end.value
    if not outcome.finished:
        where = console.quoted(str(outcome.folder))
        print(f"\nstopped after step {outcome.step} of {outcome.num_steps}; to go on:\n"
              f"  {console.command('train')} --resume --output-dir {where}")  # fmt: skip
        return outcome.code
    if outcome.num_steps:
        _show(outcome)
    for prompt, text in zip(outcome.settings.prompts.prompt, outcome.continuations, strict=True):
        print(f"\n{prompt}{text}")
    sys.stdout.flush()
    return outcome.code


def _show(outcome: Any) -> None:
    """Answers before and after, where everything is, and how to generate with the adapter."""
    if outcome.table:
        print("\n".join(outcome.table))
    console.side_by_side(outcome.samples.get("before", []), outcome.samples.get("after", []))
    console.say("adapter", str(outcome.adapter))
    console.say("run", f"{outcome.folder}/run.json, config.yaml, metrics.jsonl, checkpoints/")
    console.say("report", outcome.report)
    settings = outcome.settings
    example = settings.prompts.prompt or [
        answer["prompt"] for answer in outcome.samples.get("after", [])
    ]
    same = f"--quant {settings.model.quant} --dtype {settings.model.dtype}"
    same += " --quant-fast" if settings.model.quant_fast else ""
    same += " --chat" if settings.prompts.chat else ""
    print(f"\nto generate with it:\n  {console.command('generate')} {same} \\\n"
          f"    --adapter {console.quoted(str(outcome.adapter))} \\\n"
          f"    --prompt {console.quoted(example[0] if example else '…')}")  # fmt: skip
