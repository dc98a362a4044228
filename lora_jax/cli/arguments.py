"""The parser of flags, and the flags that commands share."""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from lora_jax import errors, extras
from lora_jax.parallel import cluster, processes
from lora_jax.training.output import run_folder
from lora_jax.training.settings import assemble, convert, groups, names

Given = dict[str, Any]  # {flag, with _ for -: value} of the typed flags

# Flags with a path on this machine.
_PATHS = ("model", "adapter", "dataset", "eval_dataset", "output_dir", "prompts_file",
          "output_file", "config", "chat_template", "init_adapter")  # fmt: skip
_PROCESSES = ("coordinator", "num_processes", "process_id")


class Flags:
    """An argparse parser that returns only the flags that were typed.

    The help of a flag ends with its default, which is that of the setting of the same name.
    """

    def __init__(
        self,
        description: str,
        defaults: Given | None = None,
        *,
        subparsers: Any = None,
        verb: str = "",
        short: Collection[str] = (),
    ):
        """subparsers, verb: argparse's subparsers to add the parser to, and its name there.

        short: the flags that --help shows; --help-all shows all. Empty: --help shows all.
        """
        form = {
            "usage": "%(prog)s [flags]",
            "description": description,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
            "add_help": not short,
        }
        name = pathlib.PurePath(sys.argv[0]).name
        made = subparsers.add_parser(verb, **form) if subparsers else Parser(prog=name, **form)
        self.parser: argparse.ArgumentParser = made
        self._defaults, self._group = defaults or {}, self.parser
        self._kinds: dict[str, Callable[[str], Any]] = {}
        self._short = short
        if short:
            page = Parser(prog=self.parser.prog, **{**form, "add_help": False})
            self._main = page.add_argument_group(
                "main flags (--help-all lists all; --config FILE reads them from YAML)"
            )
            self.parser.add_argument("-h", "--help", action=_Help, of=page,
                                     help="show the main flags and exit")  # fmt: skip
            self.parser.add_argument("--help-all", action=_Help, of=self.parser,
                                     help="show all flags and exit")  # fmt: skip

    def group(self, title: str) -> None:
        """The help lists the flags that are added from now on under `title`."""
        self._group = self.parser.add_argument_group(title)

    def add(self, flag: str, help: str, **options: Any) -> None:
        """Adds a flag; options: those of argparse."""
        name = flag.lstrip("-").replace("-", "_")
        default = self._defaults.get(name)
        if name not in self._defaults and name in groups.FIELDS:
            default = groups.FIELDS[name].default
        if default not in (None, "", (), {}, False) and name not in _NO_DEFAULT_SHOWN:
            shown = ",".join(default) if isinstance(default, tuple) else default
            help = f"{help} (default: {shown})"
        # Values are converted later, so that one error has all that is wrong.
        kind, choices = options.pop("type", None), groups.CHOICES.get(name)
        if kind or (name in groups.FIELDS and "choices" not in options):
            self._kinds[name] = kind or str
        if choices and "choices" not in options:
            options = {"metavar": f"{{{','.join(choices)}}}", **options}
        for each in [self._group, *([self._main] if flag in self._short else [])]:
            made = each.add_argument(flag, help=help, default=None, **options)
            if choices and not made.choices:
                made.completer = lambda choices=choices, **_: choices

    def switch(self, flag: str, help: str, **options: Any) -> None:
        """Adds a flag without a value."""
        self.add(flag, help, action="store_const", const=True, **options)

    def typed(self, argv: list[str] | None) -> Given:
        """{flag: value} of the typed flags. Raises: UserError that has all that cannot be read."""
        values, problems = self.raw(argv)
        for name in values.keys() & groups.FIELDS.keys() & self._kinds.keys():
            with errors.noted(problems):
                values[name] = assemble.one(name, values[name])
        if problems:
            raise errors.UserError.together(problems)
        return values

    def raw(self, argv: list[str] | None) -> tuple[Given, list[errors.UserError]]:
        """(the typed flags, what is wrong so far). Settings of a run are still texts."""
        known, unknown = self.parser.parse_known_args(argv)
        extras.require()  # after --help, which needs none of them
        typed = {name: value for name, value in vars(known).items() if value is not None}
        problems: list[errors.UserError] = []
        if unknown:
            with errors.noted(problems):
                self.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        with errors.noted(problems):
            _refuse_urls(typed)
        for name in typed.keys() & self._kinds.keys() - groups.FIELDS.keys():
            try:
                typed[name] = self._kinds[name](typed[name])
            except ValueError:
                problems.append(
                    errors.UserError(
                        expected=_KINDS[self._kinds[name]],
                        found=repr(typed[name]),
                        where=convert.flag(name),
                    )
                )
        return typed, problems


_KINDS = {int: "a whole number", float: "a number"}
_NO_DEFAULT_SHOWN = ("model", "dataset")  # the demo's, which their help says


class _Help(argparse.Action):
    """Prints the help of the parser `of`, and exits."""

    def __init__(self, option_strings, dest, of: argparse.ArgumentParser, help: str):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self._of = of

    def __call__(self, parser, *_: Any) -> NoReturn:
        self._of.prog = parser.prog
        self._of.print_help()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Raises UserError if flags cannot be parsed, with the flags that were probably meant."""

    def error(self, message: str) -> NoReturn:
        known = [*self._option_string_actions]
        words = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        meant = [names.meant_by_flag(word, known) for word in words]
        raise errors.UserError(
            expected="flags and values as in --help",
            found=message,
            where=self.prog,
            do="; ".join(each for each in meant if each) or None,
        )


_HUB_PAGE = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface|hf)\.co/|hf://)(?:datasets/)?([\w.-]+/[\w.-]+)"
)


def _refuse_urls(typed: Given) -> None:
    """Raises UserError if a path is a URL such as gs://…, s3://… or hf://…"""
    urls = {
        convert.flag(name): value
        for name in _PATHS
        if name in typed
        for value in ([typed[name]] if isinstance(typed[name], str) else typed[name])
        if re.match(r"\w[\w+.-]*://", value)
    }
    if urls:
        raise errors.UserError(
            expected="local paths, or ids of the Hugging Face hub (owner/name)",
            found=[f"{flag} {url}" for flag, url in urls.items()],
            do="; ".join(dict.fromkeys(map(_in_place_of, urls.values()))),
        )


def _in_place_of(url: str) -> str:
    """What to pass in place of a URL."""
    if page := _HUB_PAGE.match(url):
        return f"pass its id, {page[1]}"
    if url.startswith(("http://", "https://", "file://")):
        return "download the file, and pass its path"
    return (
        "copy the files to a local disk (gcloud storage cp -r gs://bucket/folder . ), or mount the "
        "bucket with gcsfuse and give the path there"
    )


def add_model(flags: Flags) -> None:
    """--model, --revision, --quant, --use-4bit, --dtype, --mesh and others."""
    flags.group("model")
    flags.add("--model", "folder or Hugging Face id (default: the demo model)",
              metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--revision", "branch, tag or commit of a hub model", metavar="REV")
    formats = ", ".join(groups.CHOICES["quant"])
    flags.add("--quant", f"format of the frozen linear layers: {formats} (default: the "
              "checkpoint's)", metavar="FORMAT")  # fmt: skip
    flags.switch("--quant-fast", "int4 without the search for scales: loads faster, with 3 %% "
                 "more error")  # fmt: skip
    flags.switch("--use-4bit", "same as --quant int4")
    flags.switch("--no-4bit", "same as --quant none")
    flags.add("--dtype", "compute dtype (default: that of config.json; float16 becomes bfloat16)")
    flags.add("--mesh", "devices by axis, e.g. data=-1,fsdp=8,tensor=1 (default: fsdp if the base "
              "does not fit on one device, else data)")  # fmt: skip
    flags.add("--kernels", "auto: those for this device, if they are right on it; xla: none")


def add_data(flags: Flags) -> None:
    """--dataset, --weights, --dpo, --eval-dataset, --columns, --seq-len, --split-texts,
    --train-on-inputs, --packing, --streaming, --skip-bad-rows, --as-chat, --chat-template,
    --add-special-tokens, --add-tokens, --chat-time."""
    flags.group("data")
    flags.add("--dataset", ".jsonl, .json, .csv, .parquet, .txt, a folder of them or hub id; "
              "examples with text, "
              "prompt/completion, instruction/output or chat messages; several are mixed",
              nargs="+", metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--weights", "share of each data set in the sequences, e.g. 3,1; an epoch keeps its "
              "length (default: each example once an epoch)", metavar="W,W")  # fmt: skip
    flags.switch("--dpo", "train on preferences (DPO): examples with prompt, chosen and rejected, "
                 "as strings or message lists")  # fmt: skip
    flags.add("--eval-dataset", "held-out data (default, with --eval-every: --eval-size of "
              "--dataset)", metavar="PATH|HUB_ID")  # fmt: skip
    flags.add("--columns", "map fields to columns with other names, e.g. "
              "prompt=question,completion=answer")  # fmt: skip
    flags.add("--seq-len", f"cut examples after T tokens (default: {groups.SEQ_LEN}, or the "
              "model's context if that is shorter)", type=int, metavar="T")  # fmt: skip
    flags.switch("--split-texts", "cut examples with text into several of T tokens, instead of "
                 "leaving out their ends")  # fmt: skip
    flags.switch("--train-on-inputs", "train prompts and all messages of chats, not the answers "
                 "alone")  # fmt: skip
    flags.switch("--packing", "pack several examples into each sequence of T tokens; attention "
                 "stays within an example; --batch-size counts sequences")  # fmt: skip
    flags.switch("--streaming", "read the data during training, in order, shuffled within "
                 "blocks of a few thousand examples; needs --max-steps")  # fmt: skip
    flags.add("--skip-bad-rows", "skip and report up to N rows that cannot be read or trained on",
              type=int, metavar="N")  # fmt: skip
    flags.switch("--as-chat", "put prompt/completion, instruction/output and preferences of "
                 "strings into the chat template, with system and history")  # fmt: skip
    add_chat_template(flags)
    flags.add("--add-special-tokens", "new tokens that separate, such as those of a chat template "
              "that the tokenizer does not have; their embeddings are trained", nargs="+",
              metavar="TOKEN")  # fmt: skip
    flags.add("--add-tokens", "new tokens that are text, such as words; their embeddings are "
              "trained", nargs="+", metavar="TOKEN")  # fmt: skip
    flags.add("--chat-time", "the time that a chat template prints, e.g. 2026-01-31 (default: when "
              "the run starts)", metavar="TIME")  # fmt: skip


def add_chat_template(flags: Flags) -> None:
    """--chat-template."""
    flags.add(
        "--chat-template",
        "a Jinja file, the folder or hub id of a model whose chat template is used, or a template "
        "(default: the tokenizer's)",
        metavar="FILE|PATH|HUB_ID",
    )


def add_processes(flags: Flags) -> None:
    """--coordinator, --num-processes, --process-id."""
    flags.group("several processes (set by TPU slices, SLURM and Open MPI)")
    flags.add("--coordinator", "a free port on the host of process 0",
              metavar="HOST:PORT")  # fmt: skip
    flags.add("--num-processes", "number of processes", type=int, metavar="N")
    flags.add("--process-id", "index of this process, from 0", type=int, metavar="I")


def join(typed: Given) -> Given:
    """`typed` without the flags of add_processes, once all processes are connected.

    From then on only process 0 prints.
    """
    processes.start(cluster.find(*(typed.get(name) for name in _PROCESSES)))
    if not processes.leads():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    kept = {name: value for name, value in typed.items() if name not in _PROCESSES}
    processes.same("flags", kept)
    return kept


def refuse_processes(typed: Given, why: str) -> None:
    """Raises UserError if a flag of add_processes was typed. why: what makes it useless."""
    if pointless := [name for name in _PROCESSES if name in typed]:
        raise errors.UserError(
            expected="flags that have an effect",
            found=[f"{convert.flag(name)} with {why}" for name in pointless],
            do="leave them out, and name the devices of all processes with --target",
        )


def quantization(typed: Given) -> Given:
    """`typed` with --use-4bit and --no-4bit replaced by --quant."""
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


def note_other_base(adapter: pathlib.Path, quant: str) -> None:
    """Prints how to use the base that a run's adapter was trained on, if `quant` is another."""
    trained_on = run_folder.quantization_of(adapter)
    if trained_on not in (None, quant):
        print(f"note: the adapter was trained with --quant {trained_on}, and this is --quant "
              f"{quant}; use --quant {trained_on} for the same base", file=sys.stderr)  # fmt: skip
