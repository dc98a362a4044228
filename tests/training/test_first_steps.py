"""What a run says of its first steps, and of the base at its end."""

import ctypes
import json
import shutil

import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_run import FLAGS, at_step, checkpoints

from lora_jax.parallel import mesh as sharding
from lora_jax.training import digests, first_steps, frozen_base

Q, V = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"


def flip(part):
    """Flips a bit of an array on one device, as a damaged memory would."""
    ctypes.cast(part.unsafe_buffer_pointer(), ctypes.POINTER(ctypes.c_uint8))[5] ^= 1


@pytest.fixture
def cut_off(tmp_path):
    """Flags of a base whose attention in layer 3 has no effect, so that its q, k, v are idle."""
    base = shutil.copytree(cli.BASE, tmp_path / "base")
    (file,) = base.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    tensors["model.layers.3.self_attn.o_proj.weight"][:] = 0
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    return ("--model", base, "--dataset", cli.write_rows(tmp_path / "rows.jsonl", 40))


def test_idle_layers_are_named_and_a_base_that_changes_ends_the_run(cut_off, tmp_path, monkeypatch):
    held, init = [], frozen_base.FrozenBase.__init__

    def kept(self, frozen, *rest):
        held.append(frozen.base["model"]["layers"]["mlp"]["up_proj"]["kernel"])
        init(self, frozen, *rest)

    folder = tmp_path / "run"
    monkeypatch.setattr(frozen_base.FrozenBase, "__init__", kept)
    at_step(monkeypatch, 4, lambda: flip(held[0].addressable_shards[5].data))
    ended = cli.run("train", *FLAGS, *cut_off, "--output-dir", folder)
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    said = " ".join(ended.out.split())
    assert (f"warning 2 of 10 trained layers have no gradient after 5 steps and stay as they are: "
            f"{Q.format(3)}, {V.format(3)}") in said  # fmt: skip
    assert "check" not in ended.out.split()
    assert "found: base.model.layers.mlp.up_proj.kernel has changed" in " ".join(ended.err.split())
    assert checkpoints(folder) == [4, 6] and not (folder / "adapter").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "failed: base.model.layers.mlp.up_proj.kernel has changed"
    assert run["checks"] == {
        "trained_layers": 10,
        "without_gradient": [Q.format(3), V.format(3)],
        "changed_base": ["base.model.layers.mlp.up_proj.kernel"],
    }
    resumed = cli.refused("train", "--resume", "--output-dir", folder)
    assert "up_proj.kernel has changed" in resumed and not (folder / "adapter").exists()


@pytest.mark.parametrize("of_parts", [digests.of_parts, digests._of_parts_on_devices])
def test_one_bit_on_one_device_changes_the_digest_of_that_part_alone(of_parts):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    values = np.random.default_rng(0).normal(size=(3, 8, 4))
    tree = {
        "norm": {"weight": values[0].astype("bfloat16")},  # a copy on each device
        "q_proj": {"kernel": values.astype(np.float32)},  # split over fsdp and tensor
        "up_proj": {"q": values.view(np.uint32)},
        "down_proj": {"lora_mask": values > 0},
    }
    # Copied, because fake devices may share the memory of a host array.
    arrays = [jnp.copy(array) for array in jax.tree.leaves(sharding.place(tree, mesh))]
    before = of_parts(arrays, mesh)
    assert before.shape == (8, 4) and (of_parts(arrays, mesh) == before).all()
    for index, array in enumerate(arrays):
        flip(array.addressable_shards[6].data)
        changed = np.zeros((8, 4), bool)
        changed[6, : index + 1] = True
        np.testing.assert_array_equal(of_parts(arrays, mesh) != before, changed)


def seen(gradient, digest, lost):
    return first_steps.Seen([np.array(gradient, bool)], [[np.array(digest)]], np.array(lost, bool))


def test_members_of_a_sweep_that_are_lost_and_layers_left_out_are_not_named():
    trained = [first_steps.Trained(("q",), 1, ("q.0", "q.1", None, "q.3"))]
    before = seen(np.zeros((3, 4)), np.zeros((3, 4)), [0, 0, 0])
    gradient = [[1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0]]
    digest = [[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    found = first_steps.compared(trained, before, seen(gradient, digest, [0, 0, 1]))
    assert found == (["q.1"], ["q.3"])
    assert first_steps.compared(trained, before, seen(gradient, digest, [0, 1, 1])) == ([], [])


def test_names_of_a_stack_are_shown_as_ranges():
    names = [Q.format(n) for n in (0, 1, 2, 10, 3)] + ["lm_head", V.format(7), "model.norm"]
    assert first_steps.ranges(names) == (
        "model.layers.0-3,10.self_attn.q_proj, lm_head, model.layers.7.self_attn.v_proj, model.norm"
    )
    assert first_steps.ranges([*names, "a.1.b", "c.2.d"]).endswith("model.norm, … and 2 more")
