"""The parser of flags: it returns those that were typed, and lists all that cannot be read."""

import argparse
import pathlib
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from lora_jax import errors, extras
from lora_jax.training.settings import assemble, convert, groups, names

Given = dict[str, Any]  # {flag, with _ for -: value} of the typed flags

# Flags with a path on this machine.
_PATHS = ("model", "adapter", "dataset", "eval_dataset", "output_dir", "prompts_file",
          "output_file", "config", "chat_template", "init_adapter")  # fmt: skip


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
        if options.get("nargs") == "+":  # given twice, it has the values of both
            options = {"action": "extend", **options}
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
