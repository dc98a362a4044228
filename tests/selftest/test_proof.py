"""Kernels that are faulty on purpose are found, left out, and the run ends with the right loss."""

import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import threading

import cases
import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from lora_jax import errors, training
from lora_jax.kernels import attention, choice, int4_matmul, platform
from lora_jax.kernels.attention import splash
from lora_jax.kernels.int4_matmul import forms
from lora_jax.parallel import mesh as sharding
from lora_jax.quant import formats
from lora_jax.selftest import (
    case,
    draws,
    int4_products,
    passed,
    proof,
    self_attention,
    vocabulary,
)

TPU_PRODUCT, TPU_ATTENTION = forms.Forms.tpu, splash.attend


@pytest.fixture(autouse=True)
def like_a_tpu(monkeypatch, tmp_path):
    """This device gets a TPU's kernels, interpreted; nothing is remembered of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(platform, "platform_here", lambda: "tpu")
    monkeypatch.setattr(forms.Forms, "tpu", functools.partialmethod(TPU_PRODUCT, interpret=True))
    monkeypatch.setattr(splash, "attend", functools.partial(TPU_ATTENTION, interpret=True))
    jax.clear_caches()  # of programs with XLA's operations
    with choice.restored():
        yield
    jax.clear_caches()


@functools.cache
def weight():
    return formats.quantize(jax.random.normal(jax.random.key(1), (256, 384)), "int4")


def product(rows=43, backward=True, packed=None):
    packed = weight() if packed is None else packed
    return int4_products.int4_product(packed, rows=rows, dtype=jnp.bfloat16, backward=backward)


def attended(**how):
    shape = {"batch": 2, "length": 300, "heads": 4, "kv_heads": 2, "width": 16}
    return self_attention.self_attention(**shape, dtype=jnp.float32, **how)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(attended, packed=True, window=50, soft_cap=1.0),
        *cases.long(product, attended, functools.partial(attended, packed=True)),
        lambda: vocabulary.vocabulary_loss(
            jax.random.normal(jax.random.key(0), (16, 500)),
            batch=2,
            length=400,
            dtype="float32",
            soft_cap=1.0,
        ),
        lambda: vocabulary.embedding_lookup(jnp.arange(32.0).reshape(8, 4), batch=2, length=9),
    ],
)
def test_right_kernels_pass(make):
    found = case.check(make())
    assert found.problem is None, found
    assert found.distance.whole < 5e-3


def swapped(self, x, packed, layer):
    """The nibbles of each byte are in the wrong order."""
    q = ((packed.q & 0x0F0F0F0F) << 4) | ((packed.q >> 4) & 0x0F0F0F0F)
    return TPU_PRODUCT(self, x, packed._replace(q=q), layer, interpret=True)


def without_a_tile(self, x, packed, layer):
    return TPU_PRODUCT(self, x, packed, layer, interpret=True).at[8:16, :128].set(0)


def without_a_group(self, x, packed, layer):
    """Of the summands of 128 columns."""
    y = TPU_PRODUCT(self, x, packed, layer, interpret=True)
    less = TPU_PRODUCT(self, x.at[:, :32].set(0), packed, layer, interpret=True)
    return y.at[:, :128].set(less[:, :128])


def not_a_number(self, x, packed, layer):
    return TPU_PRODUCT(self, x, packed, layer, interpret=True).at[0, 0].set(jnp.nan)


def an_exception(self, x, packed, layer):
    raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile")


def not_a_number_at_the_end(self, x, packed, layer):
    return TPU_PRODUCT(self, x, packed, layer, interpret=True).at[-1, -1].set(jnp.nan)


def without_the_last_rows(self, x, packed, layer):
    y = TPU_PRODUCT(self, x, packed, layer, interpret=True)
    return y.at[len(y) // 8 * 8 :].set(0)  # those of a tile that is not full


def with_the_scales_of_others(self, x, packed, layer):
    """Groups and columns are taken for each other."""
    scale = packed.scale
    turned = scale.swapaxes(-1, -2).reshape(scale.shape)
    return TPU_PRODUCT(self, x, packed._replace(scale=turned), layer, interpret=True)


def out_of_memory(self, x, packed, layer):
    y = TPU_PRODUCT(self, x, packed, layer, interpret=True)

    def fail(y):
        raise MemoryError("RESOURCE_EXHAUSTED: Out of memory")

    return jax.pure_callback(fail, jax.ShapeDtypeStruct(y.shape, y.dtype), y)


FAULTS = (swapped, without_a_tile, without_a_group, not_a_number, an_exception,
          not_a_number_at_the_end, without_the_last_rows, with_the_scales_of_others,
          out_of_memory)  # fmt: skip


@pytest.mark.parametrize("fault", [*FAULTS[2:5], *cases.long(*FAULTS[:2], *FAULTS[5:])])
def test_a_faulty_product_is_left_out(fault, monkeypatch):
    monkeypatch.setattr(forms.Forms, "tpu", fault)
    one = product()
    assert one.kernel == choice.INT4_TPU
    found = proof.run([one])
    (left_out,) = found.left_out
    assert left_out.kernel == choice.INT4_TPU and not found.kernels
    assert choice.refusal(choice.INT4_TPU) == left_out.problem
    (line,) = found.lines()
    assert "int4_matmul/pallas_tpu is left out" in line and left_out.problem in line
    x = jnp.ones((43, 256), jnp.bfloat16)
    y = int4_matmul.int4_matmul(x, weight())
    assert jnp.array_equal(y, int4_matmul.int4_matmul(x, weight(), implementation="xla"))
    assert product().kernel == choice.XLA
    assert not [*(cache() / "selftest").glob("[0-9a-f]*")]  # a failure is checked again


def test_a_product_that_is_wrong_at_its_second_call_is_left_out(monkeypatch):
    """As a kernel is that leaves something behind."""
    calls = itertools.count()

    def fault(self, x, packed, layer):
        y = TPU_PRODUCT(self, x, packed, layer, interpret=True)
        right = jax.ShapeDtypeStruct((), y.dtype)
        return y * jax.pure_callback(lambda: np.array(next(calls) < 1, right.dtype), right)

    monkeypatch.setattr(forms.Forms, "tpu", fault)
    (left_out,) = proof.run([product(backward=False)]).left_out
    assert left_out.kernel == choice.INT4_TPU and next(calls) == 2


@pytest.mark.parametrize("layer", [0, *cases.long(2)])
def test_a_product_that_is_wrong_in_the_first_or_last_layer_is_left_out(layer, monkeypatch):
    wrong = jnp.int32(layer)

    def fault(self, x, packed, layer):
        return TPU_PRODUCT(self, x, packed, layer, interpret=True) * (layer != wrong)

    stack = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), weight())
    monkeypatch.setattr(forms.Forms, "tpu", fault)
    one = int4_products.int4_product(stack, rows=8, dtype=jnp.bfloat16, layer=2)
    assert [each.kernel for each in proof.run([one]).left_out] == [choice.INT4_TPU]


def test_a_kernel_that_takes_too_long_to_compile_is_left_out(monkeypatch):
    ends = threading.Event()
    monkeypatch.setattr(case, "compiled", lambda program: ends.wait(30))
    monkeypatch.setattr(proof, "PATIENCE", 0.1)
    found = proof.run([product(backward=False)])
    ends.set()
    assert [each.kernel for each in found.left_out] == [choice.INT4_TPU]
    assert "not compiled after 0.1 seconds" in found.left_out[0].problem


def without_a_block(*arguments, **how):
    """The second half of the queries does not see the first half of the keys."""
    q, k, v, *rest = arguments
    half = q.shape[1] // 2
    out = TPU_ATTENTION(q, k, v, *rest, **how, interpret=True)
    blind = TPU_ATTENTION(q, k, v.at[:, :half].set(0), *rest, **how, interpret=True)
    return jnp.concatenate([out[:, :half], blind[:, half:]], axis=1)


def without_a_cap(*arguments, soft_cap, **how):
    return TPU_ATTENTION(*arguments, **how, interpret=True)


@pytest.mark.parametrize(
    "fault, how",
    [(without_a_block, {"packed": True}), *cases.long((without_a_cap, {"soft_cap": 1.0}))],
)
def test_faulty_attention_is_left_out(fault, how, monkeypatch):
    monkeypatch.setattr(splash, "attend", fault)
    found = proof.run([attended(**how), product()])
    assert [each.kernel for each in found.left_out] == [choice.ATTENTION_TPU]
    assert found.kernels == (choice.INT4_TPU,)
    q = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
    assert attention.kernel_of(q, q, q) == choice.XLA


def cache():
    return passed.devices.cache_folder()


def test_a_pass_is_remembered_for_the_same_case(monkeypatch):
    assert proof.run([product()]).num_run == 1
    monkeypatch.setattr(forms.Forms, "tpu", an_exception)
    found = proof.run([product()])
    assert found.num_run == 0 and found.kernels == (choice.INT4_TPU,) and not [*found.lines()]
    (record,) = (cache() / "selftest").iterdir()
    assert json.loads(record.read_text())["case"] == product().name
    monkeypatch.setattr(passed, "_where", lambda: {"driver": "another"})
    assert proof.run([product()]).left_out


def test_a_case_that_ended_the_process_is_not_tried_again(monkeypatch):
    """First the cases that were compiled at the same time run one by one; then not at all."""
    together, alone = passed.Mark(), passed.Mark(product())
    together.path.parent.mkdir(parents=True)
    together.path.touch()
    assert proof.run([product()]).kernels == (choice.INT4_TPU,)
    assert not together.path.exists() and not alone.path.exists()

    (cache() / "selftest").joinpath(passed._path(product()).name).unlink()
    together.path.touch()
    alone.path.touch()
    one = product()
    for _ in range(3):  # in each later process
        with choice.restored():
            (left_out,) = proof.run([one]).left_out
        assert str(alone.path) in left_out.problem


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_kernel_after_which_the_device_fails_is_left_out_the_next_time(one_by_one, monkeypatch):
    """As after an access to memory that is not there, on a GPU."""
    if one_by_one:
        passed.Mark().leave_behind()
    monkeypatch.setattr(forms.Forms, "tpu", an_exception)
    monkeypatch.setattr(proof, "device_works", lambda: False)
    one = product()
    with pytest.raises(errors.UserError, match=r"(?s)int4 product.*failed to compile.*start again"):
        proof.run([one])
    monkeypatch.setattr(case, "start", lambda _: pytest.fail("it runs again"))
    for _ in range(2):
        with choice.restored():
            (left_out,) = proof.run([one]).left_out
        assert "a process ended while it ran" in left_out.problem


def test_a_device_that_works_is_known_to():
    with jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])):
        assert proof.device_works()


def test_a_process_that_goes_on_has_not_ended():
    """With several at the same time, the last one removes the mark."""
    first, second = passed.Mark(), passed.Mark()
    with first:
        assert not second.is_left_behind()
        with second:
            assert not passed.Mark().is_left_behind()
        assert first.path.exists() and not second.is_left_behind()
    assert not first.path.exists()


def test_ctrl_c_is_no_fault_of_a_kernel():
    """Its handler may end the process before the context does."""
    mark, left = passed.Mark(product()), []
    handler = signal.signal(signal.SIGINT, lambda *_: left.append(mark.path.exists()))
    try:
        own = signal.getsignal(signal.SIGINT)
        with mark:
            assert mark.path.exists()
            signal.raise_signal(signal.SIGINT)
        assert left == [False] and signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("what", ["a file in its place", "a file above", "nothing can be written"])
def test_without_a_cache_folder_kernels_are_checked_each_time(what, monkeypatch, tmp_path):
    if what == "a file in its place":
        cache().mkdir(parents=True)
        (cache() / "selftest").write_text("x")
    elif what == "a file above":
        (tmp_path / "cache").write_text("x")
    else:

        def refuse(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
        monkeypatch.setattr(pathlib.Path, "write_text", refuse)
    one = vocabulary.embedding_lookup(jnp.arange(32.0).reshape(8, 4), batch=2, length=9)
    one = one._replace(kernel=choice.INT4_TPU)
    for _ in range(2):
        found = proof.run([one])
        assert (found.num_run, found.kernels, found.left_out) == (1, (choice.INT4_TPU,), ())


def test_a_weight_that_is_not_finite_is_no_fault_of_a_kernel():
    table = jnp.arange(32.0).reshape(8, 4).at[3].set(jnp.nan).at[5, 1].set(jnp.inf)
    assert case.check(vocabulary.embedding_lookup(table, batch=2, length=90)).problem is None


def test_an_operation_that_nothing_replaces_is_an_error(monkeypatch):
    one = vocabulary.embedding_lookup(jnp.arange(32.0).reshape(8, 4), batch=2, length=9)
    wrong = one._replace(compute=lambda table, ids, number: {"y": table[ids] + 1})
    with pytest.raises(errors.UserError, match="embedding by xla"):
        proof.run([wrong])
    failing = one._replace(compute=lambda *_: 1 / 0)
    (line,) = proof.run([failing]).lines()  # the job will say more, if it fails as well
    assert "could not be checked" in line and "division by zero" in line


@pytest.mark.long
def test_a_mesh_computes_as_the_job_does():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4])
    partition = sharding.partition(("q_proj",))
    with jax.set_mesh(mesh):
        one = int4_products.int4_product(
            weight(), rows=40, dtype=jnp.float32, partition=partition, backward=True
        )
        assert one.kernel == choice.INT4_TPU and "data=2 × tensor=2" in one.name
        other = sharding.partition(("o_proj",))  # of the same shape, but a pass of another case
        assert (
            one.name
            != int4_products.int4_product(
                weight(), rows=40, dtype=jnp.float32, partition=other, backward=True
            ).name
        )
        assert case.check(one).problem is None
        found = case.check(attended(packed=True, partition=partition))
        assert found.problem is None, found


@pytest.mark.parametrize("count", [1, 5, 129, 256, 300, 4096, 50_000, 100_001, 10**6])
def test_the_rows_that_are_compared_are_in_every_tile(count):
    rows = draws.some(count)
    assert min(count, 128) <= len(rows) <= 1025
    assert rows[0] >= 0 and rows[-1] == count - 1 and (np.diff(rows) > 0).all()
    if count <= 1024 * 128:
        assert {*(rows // 128)} == {*range(-(-count // 128))}


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A model of one layer with two kinds of products: all of its weights are [64, 64]."""
    folder = shutil.copytree(cli.BASE, tmp_path_factory.mktemp("models") / "square")
    changed = {"num_hidden_layers": 1, "intermediate_size": 64, "num_key_value_heads": 8}
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | changed))
    tensors = {}
    for name, array in safetensors.load_file(folder / "model.safetensors").items():
        if ".layers.0." in name and array.ndim == 2:
            array = np.resize(array, (64, 64))
        if ".layers." not in name or ".layers.0." in name:
            tensors[name] = array
    safetensors.save_file(tensors, folder / "model.safetensors")
    return folder


def run(model, tmp_path, name, **how):
    """The losses of a run."""
    data = tmp_path / "rows.jsonl"
    data = data if data.exists() else cli.write_rows(data, 16)
    made = training.settings.build(
        model=str(model), dataset=str(data), max_steps=1, batch_size=8, grad_accum=1,
        seq_len=32, rank=4, quant="int4", dtype="float32", packing=True,
        output_dir=str(tmp_path / name), **how,
    )  # fmt: skip
    return [metrics["loss"] for metrics in training.run(made)]


def test_a_run_with_faulty_kernels_falls_back(square, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forms.Forms, "tpu", swapped)
    monkeypatch.setattr(splash, "attend", without_a_block)
    faulty = run(square, tmp_path, "faulty")
    out = " ".join(capsys.readouterr().out.split())
    with choice.restored():
        assert run(square, tmp_path, "xla", kernels="xla") == faulty
        assert choice.refusal(choice.ATTENTION_CUDNN) == "--kernels xla"
        choice.use("auto")  # as the next run in this process does
        assert choice.refusal(choice.ATTENTION_CUDNN) is None
    assert "\nkernels " not in capsys.readouterr().out
    for kernel in (choice.INT4_TPU, choice.ATTENTION_TPU):
        assert f"{kernel} is left out" in out


@pytest.mark.long
def test_generate_falls_back(square, monkeypatch):
    monkeypatch.setattr(forms.Forms, "tpu", an_exception)
    command = ("generate", "--model", square, "--quant", "int4", "--prompt", "Once", "--slots", 8,
               "--max-new-tokens", 4)  # fmt: skip
    faulty = cli.run(*command)
    assert faulty.code == 0 and "Mosaic failed to compile" in faulty.err
    with choice.restored():
        plain = cli.run(*command, "--kernels", "xla")
    assert plain.out == faulty.out and "left out" not in plain.err
