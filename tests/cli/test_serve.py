"""The flags of `serve`."""

import pathlib
import subprocess
import sys

import cli
import pytest

from lora_jax import errors
from lora_jax.cli import serve


def settings(*flags):
    return serve.settings_of(serve.parse([str(flag) for flag in flags]))


def test_without_flags_it_listens_on_this_machine_alone(monkeypatch):
    monkeypatch.delenv(serve.KEY, raising=False)
    found = settings()
    assert (found.model, found.adapters, found.slots, found.context) == (None, {}, 8, None)
    assert found.server.host == "127.0.0.1" and found.server.api_key is None


def test_flags_are_settings(tmp_path):
    found = settings(
        "--model", "owner/name", "--slots", 4, "--context", 512, "--port", 0, "--api-key", "k",
        "--allow-origin", "https://a.example", "--allow-origin", "https://b.example",
        "--allow-runtime-lora", "--adapters-dir", tmp_path, "--max-tokens", 9, "--timeout", 1.5,
    )  # fmt: skip
    assert (found.model, found.slots, found.context) == ("owner/name", 4, 512)
    server = found.server
    assert server.allow_origin == ("https://a.example", "https://b.example")
    assert (server.api_key, server.max_tokens, server.timeout) == ("k", 9, 1.5)
    assert server.allow_runtime_lora and server.adapters_dir == tmp_path


def test_the_key_may_be_in_the_environment(monkeypatch):
    monkeypatch.setenv(serve.KEY, "hidden")
    assert settings().server.api_key == "hidden"
    assert settings("--api-key", "typed").server.api_key == "typed"


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["a=runs/x/adapter"], {"a": "runs/x/adapter"}),
        (["runs/x/adapter"], {"x": "runs/x/adapter"}),  # the run's name
        (["runs/x/adapter/"], {"x": "runs/x/adapter/"}),
        (["some/name"], {"name": "some/name"}),
        (["a=b=c"], {"a": "b=c"}),
        (["runs/lr=1e-4/adapter"], {"lr=1e-4": "runs/lr=1e-4/adapter"}),
        (["a=x", "b=x"], {"a": "x", "b": "x"}),
    ],
)
def test_names_of_adapters(typed, found):
    assert serve.named(typed) == found


def test_a_folder_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a=b").mkdir()
    assert serve.named(["a=b"]) == {"a=b": "a=b"}


def test_two_adapters_with_a_name_are_refused():
    with pytest.raises(errors.UserError, match="NAME=PATH"):
        serve.named(["runs/x/adapter", "x=other"])


def test_an_adapter_that_is_part_of_the_model_has_its_name():
    one = settings("--adapter", "a=x/y")
    assert serve.names_of(one, "o/base", alone=False) == ("base", "o/base", {"a": "x/y"})
    assert serve.names_of(one, "o/base", alone=True) == ("a", "x/y", {})
    with pytest.raises(errors.UserError, match="of the base and of an adapter"):
        serve.names_of(one, "o/a", alone=False)
    named = settings("--adapter", "a=x/y", "--served-model-name", "b")
    assert serve.names_of(named, "o", alone=True)[0] == "b"


def test_all_that_is_wrong_is_one_message(tmp_path):
    message = cli.refused(
        "serve", "--slots", 0, "--port", 70000, "--max-n", 0, "--adapter", "a=x", "--adapter",
        "a=y", "--allow-runtime-lora",
    )  # fmt: skip
    for part in ("--slots 0", "--port 70000", "--max-n 0", "a=y and a=x", "--adapters-dir FOLDER"):
        assert part in message
    assert "did you mean" in cli.refused("serve", "--adapters-dirs", tmp_path)
    assert "no such folder" in cli.refused(
        "serve", "--allow-runtime-lora", "--adapters-dir", tmp_path / "none"
    )
    assert "without --allow-runtime-lora" in cli.refused("serve", "--adapters-dir", tmp_path)


def test_help_imports_no_jax_and_no_web_framework():
    code = (
        "import sys, lora_jax.cli.serve as s\n"
        "try: s.parse(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'starlette', 'uvicorn', 'transformers'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=cli.ROOT, capture_output=True)
    assert ended.returncode == 0, ended.stderr
