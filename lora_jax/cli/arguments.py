"""Flags that scripts share, and how a script ends."""

import argparse
import fractions
import io
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from lora_jax import errors, quant
from lora_jax.parallel import cluster, processes, rendezvous
from lora_jax.training import settings as training_settings

# Flags with a path on this machine.
PATHS = ("model", "adapter", "dataset", "eval_dataset", "output_dir", "prompts_file")

MOST_WEIGHT = 100_000  # of all data sets together: after so many lines their order begins anew

PROCESSES = ("coordinator", "num_processes", "process_id")


class Flags:
    """An argparse parser whose flags all default to None, so that a typed one can be told.

    The defaults stand in one table; each flag's help ends in its own.
    """

    def __init__(self, description: str, defaults: dict[str, Any]):
        self.parser = _Parser(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.defaults = defaults
        self._group = self.parser

    def group(self, title: str) -> None:
        """Flags added from here on are listed under `title`."""
        self._group = self.parser.add_argument_group(title)

    def add(self, flag: str, help: str, **options: Any) -> None:
        """Adds a flag. Its default, if the table has one, ends the help text."""
        default = self.defaults.get(flag.lstrip("-").replace("-", "_"))
        if default not in (None, "", (), {}):
            shown = ",".join(default) if isinstance(default, tuple) else default
            help = f"{help} (default: {shown})"
        self._group.add_argument(flag, help=help, default=None, **options)

    def typed(self, argv: list[str] | None) -> dict[str, Any]:
        """{flag: value} of the flags that were typed."""
        values = vars(self.parser.parse_args(argv))
        typed = {name: value for name, value in values.items() if value is not None}
        _refuse_urls(typed)
        return typed


def _refuse_urls(typed: dict[str, Any]) -> None:
    """Raises UserError for gs://…, s3://…, hf://… where a local path is meant."""
    urls = {
        f"--{name.replace('_', '-')}": value
        for name in PATHS
        for value in _values(typed.get(name, ""))
        if re.match(r"\w[\w+.-]*://", value)
    }
    if urls:
        raise errors.UserError(
            expected="local paths, or ids of the Hugging Face hub (owner/name)",
            found=[f"{flag} {url}" for flag, url in urls.items()],
            do="copy the files to a local disk (gcloud storage cp -r gs://bucket/folder . ), or "
            "mount the bucket with gcsfuse and give the path there",
        )


def _values(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise errors.UserError(
            expected="flags and values as in --help", found=message, where=self.prog
        )


def add_model(flags: Flags) -> None:
    """--model, --revision, --quant, --quant-fast, --use-4bit, --no-4bit, --dtype, --mesh."""
    flags.group("model")
    flags.add("--model", "folder or Hugging Face id; without it, the demo's", metavar="PATH|HUB_ID")
    flags.add("--revision", "branch, tag or commit of a hub model", metavar="REV")
    flags.add("--quant", f"weights of the frozen linear layers: {', '.join(quant.QUANTS)} "
              "(default: as the checkpoint has them)", choices=quant.QUANTS,
              metavar="FORMAT")  # fmt: skip
    flags.add("--quant-fast", "round int4 without the search: sooner loaded, 3 %% more error",
              action="store_const", const=True)  # fmt: skip
    flags.add("--use-4bit", "the same as --quant int4", action="store_const", const=True)
    flags.add("--no-4bit", "the same as --quant none", action="store_const", const=True)
    flags.add("--dtype", "compute dtype (default: config.json's; float16 becomes bfloat16)",
              choices=("float32", "bfloat16"))  # fmt: skip
    flags.add("--mesh", "devices by axis, e.g. data=-1,fsdp=8,tensor=1 (default: fsdp where "
              "the base does not fit on one, data otherwise)")  # fmt: skip


def add_data(flags: Flags) -> None:
    """--dataset, --weights, --dpo, --eval-dataset, --columns, --seq-len, --packing, --streaming."""
    flags.group("data")
    flags.add("--dataset", ".jsonl, .json, .csv, .parquet, .txt or hub id; rows with text, "
              "prompt/completion, instruction/output or chat messages; several are mixed, by "
              "default each row once an epoch", nargs="+", metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--weights", "of several data sets: their shares of the lines, such as 3,1; an epoch "
              "still has as many lines as they have together", metavar="W,W")  # fmt: skip
    flags.add("--dpo", "train on preferences (DPO): rows with prompt, chosen and rejected, texts "
              "or lists of messages", action="store_const", const=True)  # fmt: skip
    flags.add("--eval-dataset", "held-out data (default, with --eval-every: 2 %% of --dataset)",
              metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--columns", "names in the file (of several: where it has them), e.g. "
              "prompt=question,completion=answer")  # fmt: skip
    flags.add("--seq-len", "cut rows after so many tokens (default: "
              f"{training_settings.SEQ_LEN}, or the model's context if that is shorter)",
              type=int, metavar="T")  # fmt: skip
    flags.add("--packing", "several rows on a line of T tokens, which do not see each other: "
              "hardly any padding is computed; --batch-size counts lines",
              action="store_const", const=True)  # fmt: skip
    flags.add("--streaming", "read as it is needed what is too large to be read before: in its own "
              "order, shuffled among a few thousand rows; with --max-steps",
              action="store_const", const=True)  # fmt: skip


def add_sampling(flags: Flags) -> None:
    """--max-new-tokens, --temperature, --top-k, --top-p, --min-p."""
    flags.add("--max-new-tokens", "generate at most so many", type=int, metavar="N")
    flags.add("--temperature", "0 takes the likeliest token", type=float)
    flags.add("--top-k", "sample among the k likeliest; 0: all", type=int, metavar="K")
    flags.add("--top-p", "sample among the likeliest that sum to p", type=float, metavar="P")
    flags.add("--min-p", "… at least p times as likely as the likeliest", type=float, metavar="P")


def add_processes(flags: Flags) -> None:
    """--coordinator, --num-processes, --process-id."""
    flags.group("many processes (TPU slices, SLURM and Open MPI tell these)")
    flags.add("--coordinator", "a free port of process 0's host, the same for all",
              metavar="HOST:PORT")  # fmt: skip
    flags.add("--num-processes", "how many are started", type=int, metavar="N")
    flags.add("--process-id", "which of them this is, from 0", type=int, metavar="I")


def columns(text: str) -> dict[str, str]:
    """{"prompt": "question"} from "prompt=question"."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise errors.UserError(
            expected="FIELD=COLUMN pairs, e.g. prompt=question,completion=answer",
            found=repr(text),
            where="--columns",
        )
    return {ours: theirs for ours, _, theirs in pairs}


def weights(text: str) -> tuple[int, ...]:
    """(3, 1) from "3,1" or "0.75,0.25": the smallest whole numbers."""
    try:
        parts = [fractions.Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        parts = [fractions.Fraction(0)]
    whole = [int(part * math.lcm(*(p.denominator for p in parts))) for part in parts]
    smallest = tuple(part // (math.gcd(*whole) or 1) for part in whole)
    if min(smallest) <= 0 or sum(smallest) > MOST_WEIGHT:
        raise errors.UserError(
            expected="a positive number for each data set, such as 3,1 or 0.75,0.25, in whole "
            f"numbers no more than {MOST_WEIGHT} together",
            found=repr(text),
            where="--weights",
            do="round them, or leave out what has no weight",
        )
    return smallest


def check_data(settings: dict[str, Any]) -> None:
    """Raises UserError where the flags of add_data do not go together."""
    given, named = len(settings.get("weights", ())), len(settings["dataset"])
    if (given and given != named) or given == 1:
        raise errors.UserError(
            expected="a weight for each of several data sets",
            found=f"{given} in --weights, {named} in --dataset",
        )
    if settings.get("streaming") and named > 1 and not given:
        raise errors.UserError(
            expected="a weight for each of several streams, whose sizes are not known",
            found="--streaming of several data sets without --weights",
            do="--weights " + ",".join("1" * named),
        )


def seconds(text: str) -> float:
    """5400.0 from "1h30m", "90m" or "5400"."""
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.replace(" ", ""))
    found = parts and sum(
        int(number or 0) * unit
        for number, unit in zip(parts.groups(), (86400, 3600, 60, 1), strict=True)
    )
    if not found:
        raise errors.UserError(
            expected="a time such as 8h, 1h30m or 45m", found=repr(text), where="--max-time"
        )
    return float(found)


def join(typed: dict[str, Any]) -> dict[str, Any]:
    """`typed` without the flags of add_processes, once all processes are there.

    Process 0 alone prints from here on.
    """
    processes.start(cluster.find(*(typed.get(name) for name in PROCESSES)))
    if not processes.leads():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    kept = {name: value for name, value in typed.items() if name not in PROCESSES}
    processes.same("flags", kept)
    return kept


def quantization(typed: dict[str, Any]) -> dict[str, Any]:
    """`typed` with --use-4bit and --no-4bit replaced by the --quant they mean."""
    meant = {
        value
        for flag, value in (("use_4bit", "int4"), ("no_4bit", "none"))
        if typed.pop(flag, False)
    } | ({typed["quant"]} if "quant" in typed else set())
    if len(meant) > 1:
        raise errors.UserError(
            expected="one kind of quantization", found=", ".join(sorted(meant)),
            where="--quant, --use-4bit (int4), --no-4bit (none)", do="give one of them",
        )  # fmt: skip
    return {**typed, "quant": meant.pop()} if meant else typed


def check_quant_fast(settings: dict[str, Any]) -> None:
    """Raises UserError where --quant-fast would have no effect."""
    quant = settings.get("quant", "none")  # or as the checkpoint: nothing is searched for, either
    if settings.get("quant_fast") and not quant.startswith("int4"):
        raise errors.UserError(
            expected="flags that have an effect",
            found=f"--quant-fast with --quant {quant}",
            do="--quant int4, or leave it out",
        )


def run(main: Callable[[], int | None]) -> None:
    """Runs a script: exit code 2 and one message for what the user can put right."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no C++ log lines in between
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal has no ×
    before = signal.signal(signal.SIGINT, _end_at_once)
    try:
        code = main()
        sys.stdout.flush()
        processes.leave()
    except errors.UserError as error:
        code = fail(error)
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        processes.end(130, "stopped")
        print("\nstopped", file=sys.stderr)
        code = 130
    except Exception as error:
        from lora_jax.parallel import devices

        explained = devices.explain(error)
        if explained is None:
            processes.end(1, traceback.format_exc(), sure=False)
            raise
        code = fail(explained, sure=False)
    finally:
        signal.signal(signal.SIGINT, before)
    sys.exit(code)


def _end_at_once(*_: Any) -> NoReturn:
    """Ctrl-C while nothing is to be saved. An exception would be lost, or worse, in jax's import
    and in its garbage collection callback, where it arrives often."""
    os.write(2, b"\nstopped\n")
    os._exit(130)


def fail(error: errors.UserError, *, sure: bool = True) -> int:
    """Prints the message; gives the exit code. Of many processes it ends all."""
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    wrapped = [
        part
        for line in f"error:{error}".splitlines()
        for part in textwrap.wrap(
            line, width, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
        )
    ]
    code = processes.RESTART if isinstance(error, rendezvous.Missing) else 2
    processes.end(code, "\n".join(wrapped), sure=sure)
    print("\n".join(wrapped), file=sys.stderr)
    return code
