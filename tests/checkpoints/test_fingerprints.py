"""Fingerprints: equal for copies of a base model, different for any other."""

import json
import pathlib
import shutil

import pytest
import safetensors.numpy

from lora_jax.checkpoints import fingerprints

LLAMA = pathlib.Path(__file__).parents[1] / "golden" / "models" / "llama"


@pytest.fixture
def folder(tmp_path):
    """A copy of the model, which may be changed."""
    return pathlib.Path(shutil.copytree(LLAMA, tmp_path / "model"))


def test_a_fingerprint_depends_on_the_model_and_not_on_the_folder(folder):
    original = fingerprints.fingerprint(LLAMA)
    assert fingerprints.fingerprint(folder) == original
    assert json.loads(json.dumps(original)) == original
    assert fingerprints.fingerprint(LLAMA.with_name("llama3")) != original
    tensors = safetensors.numpy.load_file(LLAMA / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:16]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert fingerprints.fingerprint(folder)["tensors"] != original["tensors"]


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_fingerprint_changes_with_values_of_the_same_shapes(folder, share):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path)
    original = fingerprints.fingerprint(folder)
    for name, value in tensors.items():
        changed = value.copy()
        # It covers the ends of a tensor of more than 4 KiB, but not all in between.
        position = share if changed.nbytes <= 4096 else round(share)
        changed.reshape(-1)[int(position * (changed.size - 1))] += 1
        safetensors.numpy.save_file(tensors | {name: changed}, path)
        found = fingerprints.fingerprint(folder)
        assert [part for part in found if found[part] != original[part]] == ["checksum"], name
