"""The command `lora-jax`: its verbs, their help, suggestions for typing errors, completion."""

import os
import re
import subprocess
import sys

import cli
import pytest

import lora_jax
from lora_jax.cli import main


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `lora-jax …` in this process; returns (exit code, what it printed)."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lora-jax", *words])
        code = 0
        try:
            main.main()
        except SystemExit as ended:
            code = ended.code or 0
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def python(*words, **environment):
    """Runs Python in a process of its own; returns its exit code and output."""
    return subprocess.run(
        [sys.executable, *words], cwd=cli.ROOT, env={**os.environ, **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


def flags_in(text):
    return re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.MULTILINE)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_without_a_verb_it_lists_the_verbs(command, words):
    code, out = command(*words)
    listed = re.findall(r"^  ([a-z]+)  +\S.*$", out, re.MULTILINE)
    assert code == 0 and listed == list(main.VERBS)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_it_has_a_version(command, word):
    assert command(word) == (0, f"{lora_jax.__version__}\n")
    assert "--version" in command()[1]


def test_help_is_a_word_too(command):
    assert command("help") == command("--help")
    assert command("help", "merge") == command("merge", "--help")
    code, printed = command("help", "trian")
    assert code == 2 and "did you mean train?" in printed


def test_the_help_of_plan_starts_with_its_own_flags_and_fits_on_a_page(command):
    code, out = command("plan", "--help")
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80
    assert flags_in(out)[:5] == ["serve", "target", "hbm", "no-compile", "json"]
    assert {"seq-len", "batch-size", "rank", "remat"} < set(flags_in(out))
    assert set(flags_in(out)) < set(flags_in(command("plan", "--help-all")[1]))


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (("trian",), "did you mean train?"),
        (("--rank", "8"), "the verb first, such as lora-jax train"),
        (("quantise",), "did you mean quantize?"),
        (("train", "--rnak", "8"), "did you mean --rank?"),
        (("train", "--evalevery", "8"), "did you mean --eval-every?"),
        (("generate", "--promt", "Tom"), "did you mean --prompt?"),
        (("xyz",), "expected: one of train, generate,"),
    ],
)
def test_a_typing_error_gets_a_suggestion(command, words, suggestion):
    code, printed = command(*words)
    assert code == 2 and printed.startswith("error:\n") and "Traceback" not in printed
    assert suggestion in " ".join(printed.split())


def test_a_word_like_no_verb_gets_no_suggestion(command):
    assert "did you mean" not in command("xyz")[1]


def test_the_help_of_train_fits_on_a_page(command):
    code, out = command("train", "--help")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "usage: lora-jax train [flags]"
    assert len(lines) <= 50 and max(map(len, lines)) <= 80
    shown = flags_in(out)
    assert len(shown) == len(set(shown)) == 15
    assert len(re.findall(r"^  lora-jax train ", out, re.MULTILINE)) == 3  # examples


def test_help_all_of_train_has_every_group(command):
    code, out = command("train", "--help-all")
    groups = re.findall(r"^([a-z]+)\b.*:$", out, re.MULTILINE)
    assert code == 0 and groups == [
        "options", "model", "data", "adapter", "training", "run", "generating", "several",
        "planning",
    ]  # fmt: skip
    assert set(flags_in(command("train", "--help")[1])) < set(flags_in(out))


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_verb_has_help(command, verb):
    code, out = command(verb, "--help")
    assert code == 0 and out.startswith(f"usage: lora-jax {verb} [flags]\n")
    assert f"\n  lora-jax {verb} " in out  # an example


def test_python_m_lora_jax_is_the_same_command():
    ended = python("-m", "lora_jax", "report", "--help")
    assert ended.returncode == 0 and ended.stderr == ""
    assert ended.stdout.startswith("usage: python -m lora_jax report [flags]\n")


@pytest.mark.parametrize(
    ("line", "completion"),
    [
        ("lora-jax tr", "train"),
        ("lora-jax train --gra", "--grad-accum"),
        ("lora-jax train --schedule li", "linear"),
    ],
)
def test_a_shell_completes_verbs_and_flags(line, completion, tmp_path):
    pytest.importorskip("argcomplete", reason="argcomplete is not installed")
    answer = tmp_path / "answer"
    python(
        "-m", "lora_jax", _ARGCOMPLETE="1", _ARGCOMPLETE_IFS="\n", COMP_LINE=line,
        COMP_POINT=str(len(line)), _ARGCOMPLETE_STDOUT_FILENAME=str(answer),
    )  # fmt: skip
    assert answer.read_text().split() == [completion]
