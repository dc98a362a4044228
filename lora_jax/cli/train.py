"""Fine-tune a LLaMA with LoRA on a quantized base, and save a PEFT adapter."""

import sys
from typing import Any, NamedTuple

from lora_jax import console, errors
from lora_jax.cli import arguments, data_flags, model_flags, process_flags
from lora_jax.training import outcome as outcomes
from lora_jax.training.settings import assemble, convert, files, groups

DESCRIPTION = """\
Fine-tune a LLaMA with LoRA on a quantized base, and save a PEFT adapter.

  lora-jax train --rank 8 --quant int4          the demo that is included
  lora-jax train --model huggyllama/llama-7b --use-4bit --dataset my.jsonl
  lora-jax train --resume --output-dir runs/…   continue a run that stopped
"""
MAIN = ("--model", "--quant", "--dataset", "--seq-len", "--packing", "--rank", "--alpha",
        "--targets", "--batch-size", "--grad-accum", "--epochs", "--lr", "--output-dir",
        "--resume", "--eval-every")  # fmt: skip
PLANNING = ("plan", "target", "hbm", "no_compile", "json")
_NO_SETTINGS = (*PLANNING, "resume", "coordinator", "num_processes", "process_id")
_RIVALS = {"max_steps": "epochs", "epochs": "max_steps"}


class Asked(NamedTuple):
    """What a command line asks for.

    settings: of the new run; None with --resume. given: the settings in flags and in --config.
    others: the flags that are no settings.
    """

    settings: groups.TrainSettings | None
    given: groups.Flat
    others: arguments.Given


def flags(**where: Any) -> arguments.Flags:
    """The flags of `train`. where: see arguments.Flags."""
    flags = arguments.Flags(DESCRIPTION, short=MAIN, **where)
    add_run(flags)
    flags.group("planning: memory and time of the job, without weights or devices")
    flags.switch("--plan", "print the plan, and do not train")
    add_planning(flags)
    return flags


def add_run(flags: arguments.Flags) -> None:
    """The flags that say what a run does."""
    model_flags.add(flags)
    data_flags.add(flags)
    flags.group("adapter")
    flags.add("--init-adapter", "train this adapter further, with its rank, targets and so on; its "
              "config names the base model", metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--rank", "rank of A and B", type=int, metavar="R")
    flags.add("--alpha", "the adapter is scaled by alpha / rank", type=float)
    flags.add("--dropout", "dropout probability of the adapter's input", type=float, metavar="P")
    flags.add("--targets", "names of linear layers, a regex, or all-linear; also embed_tokens (for "
              "new words or a new language) and lm_head", nargs="+", metavar="NAME")  # fmt: skip
    flags.add("--exclude", "names or a regex to leave out of the targets", nargs="+",
              metavar="NAME")  # fmt: skip
    flags.add("--layers", "adapt only these, e.g. 16-31 (late layers: style, at half the cost)",
              metavar="I,J-K")  # fmt: skip
    flags.add("--rank-pattern", "another rank for layers whose path ends in REGEX; may be repeated",
              action="append", metavar="REGEX=R")  # fmt: skip
    flags.add(
        "--alpha-pattern", "another alpha for such layers", action="append", metavar="REGEX=A"
    )
    flags.add("--modules-to-save", "names of modules to train and save in full, such as lm_head, "
              "embed_tokens (new tokens) or norm", nargs="+", metavar="NAME")  # fmt: skip
    flags.add("--trainable-token-indices", "tokens, or their ids, whose embeddings are "
              "trained, and no others, such as the new tokens of a chat template", nargs="+",
              metavar="TOKEN")  # fmt: skip
    flags.switch("--ensure-weight-tying", "train a tied embedding and head as one weight, which "
                 "stays tied; otherwise a head that is trained gets its own")  # fmt: skip
    flags.switch("--use-rslora", "scale by alpha / √rank instead, for ranks of 64 and more")
    flags.switch("--lora-bias", "train a bias of B too, which only layers with a bias of their own "
                 "can be merged with")  # fmt: skip
    flags.switch("--use-dora", "train the magnitudes and directions of the weights separately: "
                 "closer to full fine-tuning at ranks below 16, with a slower step")  # fmt: skip
    flags.add("--init-lora-weights", "default, pissa (start from the principal components of the "
              "weights: learns faster, with less quantization error), pissa_niter_16 (an "
              "approximation that is faster to compute) or olora (start from the QR decomposition)",
              metavar="HOW")  # fmt: skip
    flags.add("--lora-plus-ratio", "learning rate of B over that of A (LoRA+): 4 to 16 learns "
              "faster in wide models", type=float, metavar="X")  # fmt: skip
    flags.group("training")
    flags.add("--batch-size", "sequences computed at a time, over all devices",
              type=int, metavar="B")  # fmt: skip
    flags.add("--grad-accum", "batches per optimizer step", type=int, metavar="A")
    flags.add("--max-steps", "optimizer steps, instead of --epochs", type=int, metavar="N")
    flags.add("--epochs", "passes over the data", type=float, metavar="E")
    flags.add("--lr", "peak learning rate", type=float)
    flags.add("--schedule", "learning rate schedule after the warmup")
    flags.add("--min-lr-ratio", "share of --lr that the decay ends at", type=float, metavar="X")
    flags.add("--warmup", "number of steps if ≥ 1, else share of all steps", type=float)
    flags.add("--weight-decay", "decoupled, as in AdamW", type=float, metavar="W")
    flags.add("--clip", "maximum norm of the gradient; 0: no clipping", type=float, metavar="NORM")
    flags.add("--remat", "what the backward pass recomputes to save memory; auto: as little as is "
              "planned to fit, on a CPU full")  # fmt: skip
    flags.switch("--group-by-length", "give each step examples of about the same length; at most 8 "
                 "lengths, each compiled once")  # fmt: skip
    flags.add(
        "--beta", "with --dpo: how close the model stays to the base, 0.01 to 0.5", type=float
    )
    flags.add("--sweep", "train an adapter for each of several learning rates or ranks at the same "
              "time, on one base: lr=1e-4,3e-4,1e-3 or rank=4,8,16; S of them compute S times "
              "--batch-size sequences at a time", metavar="NAME=V,V")  # fmt: skip
    flags.add("--seed", "random seed of the data order, the initial A and dropout", type=int)
    flags.group("run")
    flags.add("--config", "YAML file of settings with the names of flags; flags override it. A "
              "run writes its own, config.yaml", metavar="FILE")  # fmt: skip
    flags.add("--output-dir", "a new folder (default: runs/DATE-TIME)", metavar="DIR")
    flags.switch("--resume", "continue the run in --output-dir; --mesh may differ, and "
                 "--batch-size and --grad-accum too if their product stays the same")  # fmt: skip
    flags.add("--eval-every", "evaluate every N steps (below 1: this share of all steps), and at "
              "start and end", metavar="N")  # fmt: skip
    flags.add("--eval-size", "number of examples held out for it (below 1: their share), unless "
              "there is an --eval-dataset", metavar="N")  # fmt: skip
    flags.add("--exact-match", "generate answers to N held-out prompts and compare them",
              type=int, metavar="N")  # fmt: skip
    flags.add("--save-every", "save a checkpoint every N steps (below 1: this share of all steps)",
              metavar="N")  # fmt: skip
    flags.add("--keep-checkpoints", "keep the newest N checkpoints", type=int, metavar="N")
    flags.switch("--keep-best", "also save a checkpoint at every evaluation, keep the one with the "
                 "lowest held-out loss, and save its adapter")  # fmt: skip
    flags.add("--patience", "stop when the held-out loss has not improved in N evaluations; "
              "implies --keep-best", type=int, metavar="N")  # fmt: skip
    flags.add("--max-time", "save and stop after this time, e.g. 8h or 90m, with exit code 75",
              metavar="TIME")  # fmt: skip
    flags.add("--log-every", "print progress every N steps if there is no terminal (default: 20 "
              "lines in all; metrics.jsonl has every step)", type=int,
              metavar="N")  # fmt: skip
    flags.add("--report-to", "dashboard that also gets the metrics")
    flags.add("--profile", "trace three steps with jax.profiler into this folder", metavar="DIR")
    flags.group("generating, after training or with --max-steps 0")
    flags.add("--prompt", "continue this text; may be repeated", action="append")
    flags.switch("--chat", "apply the chat template to --prompt")
    flags.add("--max-new-tokens", "maximum number of generated tokens", type=int, metavar="N")
    flags.add("--temperature", "0: always take the most likely token", type=float)
    process_flags.add(flags)


def add_planning(flags: arguments.Flags) -> None:
    """The flags that say how a job is planned."""
    flags.add("--target", "cpu:N, gpu:CHIP-N or tpu:CHIP-N such as tpu:v5e-8 (default: the "
              "devices of this machine)", metavar="NAME")  # fmt: skip
    flags.add(
        "--hbm", "memory of one device, e.g. 16GiB (default: that of the target)", metavar="SIZE"
    )
    flags.switch("--no-compile", "do not compile for XLA's own plan")
    flags.switch("--json", "print one JSON object")


def parse(argv: list[str] | None = None) -> Asked:
    """What the flags and the file of --config ask for. Raises: one UserError with all problems."""
    return asked(flags(), argv)


def asked(flags: arguments.Flags, argv: list[str] | None) -> Asked:
    """As `parse`, for the flags of another command."""
    typed, problems = flags.raw(argv)
    with errors.noted(problems):
        typed = model_flags.quantization(typed)
    others = {name: typed.pop(name) for name in _NO_SETTINGS if name in typed}
    origins: dict[str, str] = {}
    if "config" in typed:
        try:
            file = files.read(typed.pop("config"))
        except errors.UserError as error:
            raise errors.UserError.together([*problems, error]) from None
        problems += file.problems
        origins = {n: line for n, line in file.origins.items() if n not in typed}
        typed = _over(file.values, typed)
    if others.get("resume"):
        return Asked(None, assemble.given_to_resume(typed, origins, problems), others)
    return Asked(assemble.build_from(typed, origins, problems), typed, others)


def _over(config: groups.Flat, typed: arguments.Given) -> arguments.Given:
    """The settings of a file, overridden by flags. A flag also removes the setting it excludes."""
    replaced = {_RIVALS[name] for name in typed if name in _RIVALS} - typed.keys()
    kept = {name: value for name, value in config.items() if name not in replaced}
    return {**kept, **typed}


def main() -> int:
    asked = parse()
    resume = asked.others.pop("resume", False)
    if "plan" in asked.others and not resume:
        from lora_jax.cli import plan

        return plan.run(asked)
    if planning := [name for name in PLANNING if name in asked.others]:
        raise errors.UserError(
            expected="flags that have an effect",
            found=[convert.flag(name) for name in planning],
            do="--plan with them and without --resume, or leave them out",
        )
    process_flags.join({**asked.given, **asked.others, "resume": resume})
    if resume and "output_dir" not in asked.given:
        raise errors.UserError(
            expected="the folder of the run to continue",
            found="--resume alone",
            do="--resume --output-dir runs/…",
        )
    from lora_jax import training

    if asked.settings is None:
        return _end(training.resume(**asked.given))
    return _end(training.run(asked.settings))


def _end(steps: outcomes.Steps) -> int:
    """Runs all steps, prints the outcome, and returns the exit code."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        outcome = end.value
    if not outcome.finished:
        where = console.quoted(str(outcome.folder))
        print(f"\nstopped after step {outcome.step} of {outcome.num_steps}; to continue:\n"
              f"  {console.command('train')} --resume --output-dir {where}")  # fmt: skip
        return outcome.code
    if outcome.num_steps:
        _show(outcome)
    for prompt, text in zip(outcome.settings.prompts.prompt, outcome.continuations, strict=True):
        print(f"\n{prompt}{text}")
    sys.stdout.flush()
    return outcome.code


def _show(outcome: outcomes.Outcome) -> None:
    """Prints answers before and after, where the files are, and how to use the adapter."""
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
    adapter = f"    --adapter {console.quoted(str(outcome.adapter))}"
    chat = settings.prompts.chat or (outcome.has_chats and not settings.prompts.prompt)
    print(f"\nto generate with it:\n  {console.command('generate')} {same}"
          f"{' --chat' if chat else ''} \\\n{adapter} \\\n"
          f"    --prompt {console.quoted(example[0] if example else '…')}")  # fmt: skip
    if outcome.has_chats:
        print(f"to chat with it:\n  {console.command('chat')} {same} \\\n{adapter}")
    print(f"to serve it, as OpenAI's API does:\n  {console.command('serve')} {same} \\\n{adapter}")
