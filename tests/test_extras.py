"""What the core imports, and what happens where the packages of the extra `train` are missing."""

import ast
import importlib.metadata
import re
import sys
import tomllib

import cli
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from lora_jax import config, errors, extras, hub, lazy, linen, lora, peft, tokenizer, training
from lora_jax.cli import main

PROJECT = tomllib.loads((cli.ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"orbax-checkpoint": "orbax", "pyyaml": "yaml"}  # packages whose module has another name
PIP = 'pip install "lora-jax[train]"'


def modules(requirements):
    """The modules of a list of requirements: "jax>=0.9.2" → jax."""
    names = [re.match(r"[\w-]+", each)[0] for each in requirements]
    return {MODULES.get(name, name) for name in names}


CORE = modules(PROJECT["dependencies"])
TRAIN = modules(PROJECT["optional-dependencies"]["train"])


@pytest.fixture
def core_alone(monkeypatch):
    """No package of the extra can be imported."""
    for name in [*TRAIN, *extras.TRAIN.values()]:
        monkeypatch.setitem(sys.modules, name, None)


def imported_at_once(tree):
    """The top-level names that importing a module imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (name for each in node.orelse for name in imported_at_once(each))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported_at_once(node)


def test_importing_any_module_but_a_runs_checkpoints_and_the_server_takes_the_core_alone():
    known = CORE | sys.stdlib_module_names | {"lora_jax"}
    more = {
        path.relative_to(cli.ROOT).as_posix(): found
        for path in (cli.ROOT / "lora_jax").rglob("*.py")
        if (found := {*imported_at_once(ast.parse(path.read_text()))} - known)
    }
    assert more == {
        "lora_jax/training/output/snapshots.py": {"orbax", "tensorstore"},
        "lora_jax/serving/app.py": {"starlette"},
        "lora_jax/serving/run.py": {"uvicorn"},
    }


def test_the_extras_are_those_of_pyproject():
    assert {module.partition(".")[0] for module in extras.TRAIN.values()} == TRAIN
    assert not TRAIN & CORE
    optional = PROJECT["optional-dependencies"]
    assert {*extras.SERVE} == modules(optional["serve"]) - {"lora-jax"}
    assert {*extras.GPU_KERNELS} == modules(optional["gpu-kernels"])
    assert "lora-jax[train]" in optional["serve"] and "lora-jax[serve]" in optional["test"]


@pytest.mark.parametrize("verb", [verb for verb in main.VERBS if verb != "doctor"])
def test_a_command_without_the_extra_says_what_installs_it(core_alone, verb):
    flags = ["runs/mine"] if verb == "report" else ["--quant", "int4"] if verb == "plan" else []
    message = cli.refused(verb, *flags)
    assert PIP in message
    assert f"not installed: {', '.join(extras.TRAIN)} to do" in message
    assert "usage:" in cli.run(verb, "--help").out


def test_serving_names_the_extra_that_it_needs_beside(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    message = cli.refused("serve", "--port", "0")
    assert "found: not installed: uvicorn to do:" in message and "lora-jax[serve]" in message


def test_a_command_names_only_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = cli.refused("train", "--max-steps", "1")
    assert "found: not installed: tokenizers to do:" in message


def test_a_folder_with_the_name_of_a_package_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "datasets").mkdir()
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(errors.UserError, match="not installed: datasets"):
        extras.require("datasets")


@pytest.mark.parametrize("start", [lambda: cli.refused("train", "--max-steps", "1"),
                                   lambda: tokenizer.load(cli.BASE),
                                   lambda: training.run(training.settings.TrainSettings()),
                                   lambda: training.resume("runs/mine")])  # fmt: skip
def test_an_older_package_is_named_with_both_versions(monkeypatch, start):
    needed = ["jax>=99", 'transformers>=5.4; extra == "train"', 'ruff>=99; extra == "test"']
    versions = {"transformers": "4.57.6"}
    monkeypatch.setattr(importlib.metadata, "requires", {"lora-jax": needed}.__getitem__)
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    try:
        message = start()
    except errors.UserError as error:
        message = " ".join(str(error).split())
    assert f"found: transformers 4.57.6, which is not >=5.4 to do: {PIP}" in message

    versions["transformers"] = "5.4.0rc1.dev0"
    with pytest.raises(errors.UserError):
        extras.require()
    versions["transformers"] = "5.5.0.dev0"
    extras.require()
    extras.require("transformers")


@pytest.mark.parametrize("get", [hub.adapter_folder, hub.config_folder, hub.tokenizer_folder])
def test_a_download_needs_the_hubs_client_in_any_version(monkeypatch, core_alone, get):
    with pytest.raises(errors.UserError) as caught:
        get("owner/name")
    assert "not installed: huggingface_hub" in str(caught.value) and PIP in str(caught.value)
    assert "transformers" not in str(caught.value)

    monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["huggingface_hub>=99"])
    extras.require("huggingface_hub", any_version=True)


def test_an_nnx_model_learns_and_its_adapter_is_saved_and_loaded(core_alone, tmp_path):
    def base():
        return nnx.Dict(up=nnx.Linear(8, 16, rngs=nnx.Rngs(0)),
                        down=nnx.Linear(16, 1, rngs=nnx.Rngs(1)))  # fmt: skip

    x = jax.random.normal(jax.random.key(0), (32, 8))

    def run(model):
        return model.down(nnx.relu(model.up(x)))

    def loss(model):
        return (run(model) ** 2).mean()

    model, settings = base(), config.LoRAConfig(rank=2, targets=("up", "down"))
    lora.inject(model, settings, rngs=nnx.Rngs(2))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=lora.LoRAParam)
    before = loss(model)
    for _ in range(5):
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, lora.LoRAParam))(model))
    assert loss(model) < 0.9 * before
    peft.save(tmp_path / "adapter", model, settings)
    again = base()
    peft.load(again, tmp_path / "adapter")
    np.testing.assert_allclose(run(again), run(model), atol=1e-6)


def test_a_linen_model_learns_and_its_adapter_is_saved_and_loaded(core_alone, tmp_path):
    module, x = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(1)]), jnp.ones((4, 8))
    params = module.init(jax.random.key(0), x)["params"]
    adapted = linen.adapt(module, config.LoRAConfig(rank=2, targets="all-linear"), x)
    variables = adapted.init(jax.random.key(1), params)

    def loss(trained):
        return (adapted.apply({**variables, "lora": trained}, x) ** 2).mean()

    before = loss(variables["lora"])
    for _ in range(5):
        step = jax.tree.map(lambda leaf: -0.01 * leaf, jax.grad(loss)(variables["lora"]))
        variables = {**variables, "lora": optax.apply_updates(variables["lora"], step)}
    assert loss(variables["lora"]) < 0.9 * before
    peft.write(tmp_path / "adapter", adapted.collect(variables))
    adapter = peft.read(tmp_path / "adapter")
    fresh = linen.adapt(module, adapter.config, x, strict=False)
    np.testing.assert_allclose(
        fresh.apply(fresh.attach(params, adapter), x), adapted.apply(variables, x), atol=1e-6
    )


def test_a_package_of_another_version_is_named_as_the_cause(tmp_path, monkeypatch):
    """Such as Flax beside a jax that it was not made for."""
    (tmp_path / "broken.py").write_text("import json\njson.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    get, _ = lazy.names("package", {"thing": "broken"})
    with pytest.raises(ImportError, match=r"cannot import broken: module 'json' has no attribute"):
        get("thing")
