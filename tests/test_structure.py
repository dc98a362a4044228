"""The house rules that a machine can check: imports, style, the README's and examples' code."""

import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from lora_jax.cli import generate, inspect, train
from lora_jax.lora import peft

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_imports_point_down():
    checked = subprocess.run(
        [pathlib.Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


def test_style():
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


def test_importing_the_package_imports_no_jax():
    code = (
        "import sys, lora_jax, lora_jax.data.encoding, lora_jax.assets; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_package_gives_its_modules():
    import lora_jax

    for name in lora_jax.__all__:
        room = getattr(lora_jax, name)
        assert room.__name__.split(".")[0] == "lora_jax" and room.__doc__
        for inside in getattr(room, "__all__", ()):
            assert getattr(room, inside) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = lora_jax.nothing


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_learn(path, tmp_path):
    """They assert themselves that base and saved adapter are all that there is to the model."""
    losses = runpy.run_path(str(path))["main"](tmp_path)
    assert losses[-1] < 0.1 * losses[0]
    (folder,) = (file.parent for file in tmp_path.rglob("adapter_config.json"))
    peft.read(folder).check_effect(str(folder))


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_readme_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_readme_commands_have_flags_that_exist():
    parsers = {"train": train.parse, "generate": generate.parse, "inspect_data": inspect.parse}
    commands = re.findall(r"scripts/(train|generate|inspect_data)\.py ([^`\n|]*)", README)
    assert commands
    for name, rest in commands:
        if "--help" not in rest:
            parsers[name](shlex.split(rest, comments=True))
