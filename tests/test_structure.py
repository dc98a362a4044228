"""The house rules that a machine can check: imports, style, and the examples."""

import pathlib
import runpy
import subprocess
import sys

import pytest

from lora_jax.lora import peft

ROOT = pathlib.Path(__file__).parents[1]


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


LONG = ("gpt2_fused_qkv", "vit_linen", "vmapped_stack")  # whose kinds other tests have


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] * (path.stem in LONG))
        for path in sorted((ROOT / "examples").glob("*.py"))
    ],
)
def test_examples_learn(path, tmp_path):
    """They assert themselves that base and saved adapter are all that there is to the model."""
    losses = runpy.run_path(str(path))["main"](tmp_path)
    assert losses[-1] < 0.1 * losses[0]
    (folder,) = (file.parent for file in tmp_path.rglob("adapter_config.json"))
    peft.read(folder).check_effect(str(folder))
