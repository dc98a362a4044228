"""The mesh, and the sharding that the rules give each kind of array."""

import jax
import pytest

from lora_jax import errors
from lora_jax.parallel import mesh as sharding

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
PROJECTION = ("model", "layers", "self_attn", "q_proj")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MESH)


def test_a_mesh_is_read_from_a_flag():
    assert sharding.parse("tensor=2, data=4", 8) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert sharding.parse("fsdp=-1,tensor=2", 8) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert sharding.parse("data=-1", 1) == {"data": 1, "fsdp": 1, "tensor": 1}


WRONG = "data=2 data=8,data=1 model=8 data=0 data fsdp=9 data=-1,fsdp=-1 data=-1,tensor=3 data=-2"


@pytest.mark.parametrize("text", WRONG.split())
def test_an_invalid_mesh_is_refused(text):
    with pytest.raises(errors.UserError, match="--mesh"):
        sharding.parse(text, 8)


def test_the_default_mesh_splits_the_base_only_as_far_as_necessary():
    def axes(base, memory, num_devices=8):
        sizes = sharding.default(num_devices, base, memory)
        return sizes["data"], sizes["fsdp"], sizes["tensor"]

    assert axes(4, 8) == axes(10**12, None) == (8, 1, 1)
    assert axes(5, 8) == (4, 2, 1)
    assert axes(9, 8) == (2, 4, 1)
    assert axes(9, 8, num_devices=6) == (3, 2, 1)
    assert axes(1000, 8) == (1, 8, 1)  # it does not fit at all; the compiler will report that


def test_a_mesh_may_have_other_and_fewer_devices():
    few = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1}, jax.devices()[4:])
    assert list(few.devices.flat) == jax.devices()[4:6]


@pytest.mark.parametrize(
    "path, ndim, spec",
    [
        ((*PROJECTION, "kernel"), 3, (None, "fsdp", "tensor")),
        ((*PROJECTION, "base", "q"), 3, (None, "fsdp", "tensor")),
        ((*PROJECTION, "base", "scale"), 3, (None, "fsdp", "tensor")),
        ((*PROJECTION, "base", "column_scale"), 3, (None, None, "tensor")),
        ((*PROJECTION, "base", "group_bias"), 3, (None, "fsdp", "tensor")),
        ((*PROJECTION, "base", "nested_scale"), 2, (None, None)),
        ((*PROJECTION, "base", "layer"), 1, (None,)),
        ((*PROJECTION, "base", "bias"), 2, (None, "tensor")),
        ((*PROJECTION, "lora_A"), 3, (None, None, None)),  # the input axis is never on fsdp
        ((*PROJECTION, "lora_B"), 3, (None, None, "tensor")),
        (("model", "layers", "mlp", "down_proj", "lora_A"), 3, (None, "tensor", None)),
        ((*PROJECTION, "bank_A"), 3, (None, "fsdp", None)),
        ((*PROJECTION, "bank_stretch"), 3, (None, None, "tensor")),
        (("model", "layers", "mlp", "down_proj", "bank_B"), 3, (None, None, "fsdp")),
        ((*PROJECTION, "scaling"), 3, (None, None, None)),
        (("model", "embed_tokens", "embedding"), 2, ("tensor", "fsdp")),
        (("model", "norm", "weight"), 1, (None,)),
    ],
)
def test_arrays_are_sharded_by_their_paths(mesh, path, ndim, spec):
    assert tuple(sharding.of(path, ndim, mesh).spec) == spec


def test_a_batch_is_split_if_that_is_even(mesh):
    assert tuple(sharding.rows(8, mesh).spec) == (sharding.BATCH,)
    assert tuple(sharding.rows(6, mesh).spec) == ()
    assert [sharding.round_up(n, mesh) for n in (1, 4, 5)] == [4, 4, 8]
    sharding.check_batch(8, mesh)
    with pytest.raises(errors.UserError, match="--batch-size 8"):
        sharding.check_batch(6, mesh)
    with pytest.raises(errors.UserError, match="--batch-size 4 --grad-accum 3, or another"):
        sharding.check_batch(6, mesh, sequences_per_step=12)
    with pytest.raises(errors.UserError, match="to do:    another --mesh"):
        sharding.check_batch(6, mesh, sequences_per_step=6)


def test_a_tree_is_placed_by_its_paths(mesh):
    tree = {"q_proj": {"lora_B": jax.numpy.zeros((4, 8)), "scaling": jax.numpy.zeros(())}}
    placed = sharding.place(tree, mesh)["q_proj"]
    assert placed["lora_B"].sharding.shard_shape((4, 8)) == (4, 4)
    assert placed["scaling"].sharding.is_fully_replicated
