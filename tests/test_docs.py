"""README.md and docs/: their code runs, their commands parse, their links and file names exist."""

import functools
import importlib
import pathlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import cli
import pytest
import yaml

import lora_jax
from lora_jax import assets, errors
from lora_jax.training import settings

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "sh", "yaml", "json", "text")
# How a page says that a block is not run: `<!-- not run: why -->` right before it.
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")

# ---------------------------------------------------------------------- commands, in one place

SCRIPTS = {"inspect_data": "inspect"}  # scripts whose name is not their verb's
VERBS = ("train", "plan", "generate", "chat", "serve", "merge", "quantize", "inspect", "report",
         "doctor")  # fmt: skip


def verb_and_flags(command: str) -> tuple[str, list[str]] | None:
    """The verb of `lora-jax` that a shell command runs, and its flags; None if it runs another."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment variables
        words.pop(0)
    if words[:1] == ["lora-jax"]:
        return words[1], words[2:]
    if words[:1] and re.fullmatch(r"(.*/)?python3?", words[0]):
        if words[1:3] == ["-m", "lora_jax"]:
            return words[3], words[4:]
        script = re.fullmatch(r"scripts/(\w+)\.py", words[1])
        if script and script[1] != "pretrain_demo":
            return SCRIPTS.get(script[1], script[1]), words[2:]
    return None


def parse(verb: str, flags: list[str]) -> None:
    """Raises where the command has no such verb, flag or value."""
    if "--config" in flags:  # a file that a reader has
        at = flags.index("--config")
        flags = flags[:at] + flags[at + 2 :]
    if not {"--help", "--help-all"} & set(flags):
        importlib.import_module(f"lora_jax.cli.{verb}").parse(flags)


def exists(flag: str) -> bool:
    """Whether some command has this flag."""

    def unknown(verb: str) -> bool:
        try:
            parse(verb, [flag])
        except errors.UserError as error:
            return "unrecognized arguments" in str(error) or "are required" in str(error)
        return False

    return flag == "--help-all" or not all(map(unknown, VERBS))


def run(command: str) -> None:
    """Runs a command of a shell block in the current folder."""
    if found := verb_and_flags(command):
        ended = cli.run(found[0], *found[1])
        assert ended.code == 0, (command, ended.err)
    else:
        subprocess.run(["bash", "-euc", command], check=True)


# ---------------------------------------------------------------------- reading the pages


class Block(NamedTuple):
    """A fenced block: where it begins, its language, its text, and whether it is to be run."""

    page: pathlib.Path
    line: int
    language: str
    text: str
    runs: bool

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@functools.cache
def blocks(page: pathlib.Path) -> list[Block]:
    found, lines, before = [], page.read_text().splitlines(), ""
    numbered = iter(enumerate(lines, start=1))
    for number, line in numbered:
        if line.startswith("```"):
            text = []
            for _, inside in numbered:
                if inside == "```":
                    break
                text.append(inside)
            runs = not NOT_RUN.fullmatch(before)
            found.append(Block(page, number, line[3:], "\n".join(text) + "\n", runs))
        before = line if line.strip() else before
    return found


def of_language(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block: lines, with those that continue them or are their input."""
    lines = iter(text.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines)
        if here := re.search(r"<<'(\w+)'$", line):
            for more in lines:
                line += "\n" + more
                if more == here[1]:
                    break
        if line.strip() and not line.startswith("#"):
            yield line


def prose(page: pathlib.Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor of a heading, as forges and mkdocs make it."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain).strip())


def anchors(page: pathlib.Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


# ---------------------------------------------------------------------- tests


def runs(page: pathlib.Path) -> bool:
    return any(block.runs and block.language in ("python", "sh") for block in blocks(page))


# Whose commands the tests of the commands run too, and whose calls those of the rooms.
LONG = dict.fromkeys(("getting-started", "python-api", "quantization"), pytest.mark.long)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=LONG.get(page.stem, ()))
        for page in filter(runs, PAGES)
    ],
)
def test_code_runs(page, tmp_path, monkeypatch):
    """The blocks of a page in their order: in one folder, Python's in one namespace."""
    monkeypatch.chdir(tmp_path)
    for name in ("my.jsonl", "more.jsonl"):  # which the pages take for granted
        cli.write_rows(tmp_path / name, 8)
    for name, rows in {"TRAIN": 64, "EVAL": 8}.items():  # the demo's, cut short
        lines = getattr(assets, name).read_text().splitlines(keepends=True)[:rows]
        (tmp_path / f"demo-{name}.jsonl").write_text("".join(lines))
        monkeypatch.setattr(assets, name, tmp_path / f"demo-{name}.jsonl")
    names = {"__name__": page.stem}
    for block in blocks(page):
        if block.runs and block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        if block.runs and block.language == "sh":
            for command in commands(block.text):
                run(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_have_a_language(page):
    wrong = [b.where for b in blocks(page) if b.language not in LANGUAGES]
    assert not wrong, f"expected one of {LANGUAGES}"


def test_python_compiles():
    for block in of_language("python"):
        compile("\n" * block.line + block.text, str(block.page), "exec")


def test_commands_have_flags_that_exist():
    found = 0
    for block in of_language("sh"):
        for command in commands(block.text):
            for part in command.split(" && "):
                if asked := verb_and_flags(part):
                    parse(*asked)
                    found += 1
    assert found > 20


def test_the_table_of_the_python_api_has_every_public_name():
    text = (ROOT / "docs/python-api.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE))
    for room in rows:
        module = getattr(lora_jax, room)
        listed = set(re.findall(r"`(\w+)", rows[room]))
        assert not [name for name in listed if not hasattr(module, name)], room
        assert set(getattr(module, "__all__", ())) <= listed, room
    assert len(rows) > 10


def test_settings_in_yaml_can_be_built():
    found = 0
    for block in of_language("yaml"):
        settings.build(**yaml.safe_load(block.text))
        found += 1
    assert found


def test_named_flags_exist():
    """Flags in the text are flags of some command, but for another program's."""
    pages = [page for page in PAGES if page.name != "coming-from.md"]
    code = " ".join(text for page in pages for text in re.findall(r"`([^`\n]+)`", prose(page)))
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", code))
    assert len(flags) > 40
    assert not [flag for flag in sorted(flags) if not exists(flag)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


def test_named_files_exist():
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(r"`((?:lora_jax|tests|scripts|benchmarks|examples)/[\w/.]+)`",
                               prose(page))
    }  # fmt: skip
    assert named
    assert not [each for each in named if not (ROOT / each[1]).exists()]


def test_rooms_are_described():
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = {path.stem for path in (ROOT / "lora_jax").iterdir()
             if not path.name.startswith("_")}  # fmt: skip
    assert not [room for room in sorted(rooms) if f"**`{room}`**" not in page]


def test_messages_are_those_of_the_code():
    """What troubleshooting.md says a message contains is in a string of the package."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    code = "\n".join(path.read_text() for path in (ROOT / "lora_jax").rglob("*.py"))
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 20
    assert len(set(quoted)) == len(quoted)
    assert not [text for text in quoted if text not in code]


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])
