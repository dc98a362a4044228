"""What the planner predicts from shapes, against what XLA compiles."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import cases
import cli
import jax
import pytest

from lora_jax import errors
from lora_jax.generation import config as generation_config
from lora_jax.kernels.int4_matmul import triton_gpu
from lora_jax.lora import config
from lora_jax.models import config as model_config
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import (
    chips,
    hlo,
    memory,
    operations,
    programs,
    proposals,
    resident,
    serving,
    serving_memory,
)
from lora_jax.planning import job as jobs

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture(scope="module", autouse=True)
def _shapes_once():
    """Most tests are of the same few models, whose shapes take longer than what is tested."""
    with cli.kept_programs():
        yield


def architecture(hidden, ffn, layers, heads, kv_heads, vocab, **more) -> model_config.LlamaConfig:
    return model_config.from_dict(
        {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            **more,
        }
    )


TINY = jobs.Job(architecture(64, 160, 3, 4, 2, 512), batch_size=2, seq_len=100, grad_accum=2)
LLAMA_7B = jobs.Job(architecture(4096, 11008, 32, 32, 32, 32000))
PAIRS_7B = dataclasses.replace(LLAMA_7B, seq_len=1024, beta=0.1)
FUSED_7B = dataclasses.replace(LLAMA_7B.architecture, fused_projections=True)
LLAMA_70B = jobs.Job(architecture(8192, 28672, 80, 64, 8, 128256))
# With tied heads of large vocabularies, and more norms than LLaMA has.
GEMMA_1B, QWEN_06B = (
    jobs.Job(
        model_config.from_dict(
            dict(model_type=model_type, hidden_size=width, intermediate_size=ffn, vocab_size=vocab,
                 num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                 sliding_window=512, tie_word_embeddings=True, dtype="bfloat16")
        )
    )
    for model_type, width, ffn, layers, heads, kv, vocab in (
        ("gemma3_text", 1152, 6912, 26, 4, 1, 262144),
        ("qwen3", 1024, 3072, 28, 16, 8, 151936),
    )
)  # fmt: skip

PHI_4B = jobs.Job(  # fused layers
    architecture(3072, 8192, 32, 24, 8, 200064, model_type="phi3", tie_word_embeddings=True),
    lora=config.LoRAConfig(targets=("qkv_proj",)),
)


def dot_flops(program):
    """Floating point operations of the matrix products that run; a multiply-add counts as 2.

    It counts `dot` instructions: all products on a CPU, but not those of kernels or libraries.
    """
    total = 0
    for instruction, times, _ in program:
        if instruction.opcode != "dot":
            continue
        (_, result, _), (_, left, _) = (
            next(hlo.arrays(shape)) for shape in (instruction.shape, instruction.operand)
        )
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)[1]
        summed = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
        total += 2 * times * math.prod(result) * summed
    return total


@pytest.mark.long
@pytest.mark.parametrize(
    # shared: products of attention that XLA may compute only once, because there is a single block;
    # that of jax 0.10 does, that of 0.12 does not
    "remat, names, beta, shared",
    [("full", "all-linear", None, 1), *cases.long(("dots", ("q_proj", "v_proj"), 0.1, 0))],
)
def test_the_compiled_step_has_the_planned_operations_and_bytes(remat, names, beta, shared):
    adapters = config.LoRAConfig(targets=names)
    job = dataclasses.replace(TINY, remat=remat, lora=adapters, beta=beta).of_length(100)
    mesh = sharding.make_mesh(ONE)
    with jax.set_mesh(mesh):
        program = programs.train_step(job, mesh)
    compiled = program.lower(mesh).compile()
    planned = operations.operations(job)
    shared *= planned.attention // 9  # its products
    counted = dot_flops(hlo.parse(compiled.as_text()))
    assert counted in (planned.total, planned.total - shared)
    stays = sum(memory.memory(job, ONE, "cpu").resident.values())
    # To the byte, except for layer indices and step counts.
    taken = compiled.memory_analysis().argument_size_in_bytes
    assert stays == pytest.approx(taken, abs=200)


@pytest.mark.long
def test_a_step_of_32k_tokens_has_no_array_of_quadratic_size():
    job = dataclasses.replace(TINY, batch_size=1, grad_accum=1, seq_len=32768)
    mesh = sharding.make_mesh(ONE)
    with jax.set_mesh(mesh):
        compiled = programs.train_step(job, mesh).lower(mesh).compile()
    sizes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, size.split(","))) for size in sizes)
    assert largest <= job.seq_len * 512  # the logits of 512 tokens over the vocabulary too
    # Nor of smaller entries: all temporaries together take less than a byte per pair of tokens.
    assert compiled.memory_analysis().temp_size_in_bytes < job.seq_len**2 / 4


@pytest.mark.long
def test_useful_operations_are_what_xla_counts_for_a_step_without_recomputation():
    """For a dense model whose layers all have trained inputs and outputs, and short sequences."""
    adapters = config.LoRAConfig(targets=("q_proj", "embed_tokens"), modules_to_save=("o_proj",))
    shallow = architecture(64, 160, 1, 4, 2, 512)
    job = jobs.Job(shallow, "float32", "none", adapters, remat="none", batch_size=8, seq_len=16)
    mesh = sharding.make_mesh(ONE)
    with jax.set_mesh(mesh):
        program = programs.train_step(job, mesh)
    counted = program.lower(mesh).compile().cost_analysis()["flops"]
    assert (
        operations.useful(job) < counted < 1.1 * operations.useful(job)
    )  # elementwise ones are a few more
    # They do not depend on recomputation, and are proportional to the number of sequences.
    twice = dataclasses.replace(job, remat="full", grad_accum=2)
    assert (
        operations.useful(twice) == 2 * operations.useful(job) < operations.operations(twice).total
    )


def test_pairs_need_a_second_adapter():
    alone, pairs = (memory.memory(job, ONE, "gpu:h100").resident for job in (LLAMA_7B, PAIRS_7B))
    assert pairs == alone | {"A and B, reference": alone["A and B"]}


def test_the_rows_of_trained_tokens_are_counted_with_a_and_b():
    tokens = config.LoRAConfig(trainable_token_indices=(5, 9))
    jobs_of = (LLAMA_7B, dataclasses.replace(LLAMA_7B, lora=tokens))
    without, found = (resident.resident(job, ONE, "gpu:h100").arrays for job in jobs_of)
    assert found["A and B"] - without["A and B"] == 2 * 4096 * 4
    assert found["their moments"] - without["their moments"] == 2 * 2 * 4096 * 4


def test_memory_is_split_by_the_mesh():
    whole = resident.resident(LLAMA_7B, ONE, "gpu:h100").arrays
    assert whole["packed words"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008) // 2
    assert whole["A and B"] == 4 * 32 * 2 * 8 * (4096 + 4096)
    for axis in ("fsdp", "tensor"):
        parts = resident.resident(LLAMA_7B, ONE | {axis: 4}, "gpu:h100").arrays
        assert parts["packed words"] == whole["packed words"] // 4


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"dropout": 0.1}], ids=str)
@pytest.mark.parametrize("remat", model_config.REMAT)
def test_fused_layers_keep_what_their_parts_do(lora, remat):
    """But with dropout, each adapter has its own input, and there are three adapters fewer."""
    adapters = config.LoRAConfig(targets="all-linear", **lora)
    parts = dataclasses.replace(LLAMA_7B, remat=remat, lora=adapters)
    fused = dataclasses.replace(parts, architecture=FUSED_7B)
    kept = [memory.kept_by_layer(job, memory.dims_of(job, ONE, "gpu")) for job in (parts, fused)]
    dropped = 3 if remat == "none" and "dropout" in lora else 0  # with a byte for each mask
    assert kept[0] - kept[1] == dropped * 2048 * 4096 * (2 + 1)


def test_fused_layers_have_the_weights_of_their_parts():
    fused = jobs.Job(FUSED_7B, lora=config.LoRAConfig(targets="all-linear"))
    parts = dataclasses.replace(fused, architecture=LLAMA_7B.architecture)
    found, expected = (memory.memory(job, ONE, "gpu:h100") for job in (fused, parts))
    assert found.resident["packed words"] == expected.resident["packed words"]
    assert found.resident["A and B"] < expected.resident["A and B"]
    assert found.work == pytest.approx(expected.work)
    assert operations.operations(fused).base == operations.operations(parts).base


def test_less_recomputation_keeps_more():
    kept = [
        sum(memory.memory(dataclasses.replace(LLAMA_7B, remat=remat), ONE, "tpu:v5e").kept.values())
        for remat in model_config.REMAT
    ]
    assert kept == sorted(kept) and len(set(kept)) == 3


@pytest.mark.parametrize(
    "job, sizes, chip, remat, batch_size, peak",
    [  # XLA's plans for these: benchmarks/plan.md
        (LLAMA_7B, ONE, "gpu:h100", "full", 1, 5.070e9),
        (LLAMA_7B, ONE, "gpu:h100", "full", 4, 7.630e9),
        (LLAMA_7B, ONE, "gpu:h100", "dots", 4, 29.765e9),
        (LLAMA_7B, ONE, "gpu:h100", "none", 1, 14.377e9),
        (LLAMA_7B, ONE, "tpu:v5e", "full", 4, 7.777e9),
        (LLAMA_7B, ONE, "tpu:v6e", "none", 1, 14.144e9),
        (PAIRS_7B, ONE, "gpu:h100", "full", 4, 7.647e9),
        (PAIRS_7B, ONE, "gpu:h100", "dots", 1, 10.659e9),
        (PAIRS_7B, ONE, "gpu:h100", "none", 1, 14.412e9),
        (PAIRS_7B, ONE, "tpu:v5e", "full", 1, 4.931e9),
        (LLAMA_7B, ONE | {"tensor": 4}, "tpu:v5e", "full", 1, 2.049e9),
        (LLAMA_70B, ONE | {"fsdp": 8}, "gpu:h100", "full", 8, 12.242e9),
        (LLAMA_70B, ONE | {"fsdp": 16}, "tpu:v5e", "full", 16, 8.060e9),
        (GEMMA_1B, ONE, "gpu:h100", "full", 1, 1.933e9),
        (GEMMA_1B, ONE, "tpu:v5e", "dots", 1, 3.926e9),
        (GEMMA_1B, ONE, "gpu:h100", "none", 1, 6.300e9),
        (QWEN_06B, ONE, "tpu:v5e", "none", 1, 4.937e9),
    ],
)
def test_the_total_is_near_what_xla_planned(job, sizes, chip, remat, batch_size, peak):
    job = dataclasses.replace(job, remat=remat, batch_size=batch_size)
    assert memory.memory(job, sizes, chip).total == pytest.approx(peak, rel=0.05)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["gpu:h100", "tpu:v5e"])
@pytest.mark.parametrize(
    "job", [LLAMA_7B, PAIRS_7B, GEMMA_1B, PHI_4B], ids=["texts", "pairs", "gemma", "phi"]
)
def test_the_total_is_near_what_xla_plans_now(target, job):
    chips.check(target)
    compiled = programs.compiled(job, target, ONE)
    assert not isinstance(compiled, str), compiled
    planned = memory.memory(job, ONE, target).total
    assert planned == pytest.approx(compiled.peak_bytes, rel=0.1)


def test_the_proposals_are_the_largest_that_fit():
    there = resident.resident(LLAMA_7B, ONE, "gpu:rtx4080")
    found = proposals.propose(LLAMA_7B, ONE, "gpu:rtx4080", 14e9, there)

    def total(job):
        return memory.memory(job, ONE, "gpu:rtx4080", there).total

    most = proposals.HEADROOM * 14e9
    more = dataclasses.replace(found.batch_size, batch_size=found.batch_size.batch_size + 1)
    assert total(found.batch_size) <= most < total(more)
    longer = dataclasses.replace(found.seq_len, seq_len=found.seq_len.seq_len + 128)
    assert total(found.seq_len) <= most < total(longer) or longer.seq_len > 4096
    assert found.remat.remat == "dots"


@pytest.mark.parametrize(
    "limit, chosen",
    [(15.5e9, "none"), (15.2e9, "dots"), (11.4e9, "dots"), (11.1e9, "full"), (1e9, "full")],
)
def test_auto_recomputes_the_least_that_fits(limit, chosen):
    found, needs = proposals.choose_remat(LLAMA_7B, ONE, "gpu:rtx4080", limit)
    assert found == chosen and list(needs)[-1] == chosen
    with_remat = {name: dataclasses.replace(LLAMA_7B, remat=name) for name in needs}
    tried = {name: memory.memory(with_remat[name], ONE, "gpu:rtx4080").total for name in needs}
    assert needs == tried and all(
        (need <= proposals.HEADROOM * limit) == (name == chosen and limit > 1e9)
        for name, need in needs.items()
    )


def test_auto_is_full_if_memory_is_unknown():
    assert proposals.choose_remat(LLAMA_7B, ONE, "gpu:rtx4080", None) == ("full", {})
    assert proposals.choose_remat(LLAMA_7B, ONE, "cpu", 1e15) == ("full", {})


def test_changes_are_proposed_for_a_job_that_does_not_fit():
    job = dataclasses.replace(LLAMA_70B, quant="none")
    there = resident.resident(job, ONE, "gpu:h100")
    ways = dict(proposals.changes(job, ONE, "gpu:h100", 80e9, there))
    assert "--quant int4" in ways
    assert any(flags.startswith("--mesh data=1,fsdp=") for flags in ways)
    assert all(found.need() <= 80e9 for found in ways.values())


def test_proposed_changes_save_memory_and_their_mesh_is_valid():
    sizes = ONE | {"tensor": 4}
    job = dataclasses.replace(LLAMA_7B, batch_size=9)
    there = resident.resident(job, sizes, "gpu:h100")
    limit = 2 * memory.memory(job, sizes, "gpu:h100", there).total
    ways = dict(proposals.changes(job, sizes, "gpu:h100", limit, there))
    # int8 is larger than the job's int4, so it saves nothing even if both fit.
    assert not any("int8" in flags for flags in ways)
    (mesh,) = (flags for flags in ways if flags.startswith("--mesh"))
    assert mesh == "--mesh data=1,fsdp=2,tensor=4 --batch-size 10 on 8 such devices"
    assert sharding.parse(mesh.split()[1], 8) == {"data": 1, "fsdp": 2, "tensor": 4}


def test_generation_counts_if_it_needs_more_than_a_step():
    there = resident.resident(LLAMA_7B, ONE, "tpu:v5e")
    few, many = (
        memory.memory(dataclasses.replace(LLAMA_7B, generation=asked), ONE, "tpu:v5e", there)
        for asked in ((1, 16, 16), (64, 512, 0))
    )
    assert few.need() == few.total > few.generating and few.need(2**40) == 2**40
    cache = 64 * 512 * 32 * 2 * 4096 * 2  # tokens · layers · keys and values · width · bytes
    cache += 64 * 9 * 32000  # and the sampling state of each slot and token of the vocabulary
    assert many.need() == many.generating == sum(many.resident.values()) + cache > many.total
    # Held-out prompts are as long as an example: shorter examples make room.
    scored = dataclasses.replace(LLAMA_7B, generation=(64, LLAMA_7B.seq_len, 0))
    shorter = proposals.propose(scored, ONE, "tpu:v5e", 16e9, there).seq_len
    assert shorter.generation == (64, shorter.seq_len, 0) and shorter.seq_len < LLAMA_7B.seq_len
    assert memory.memory(shorter, ONE, "tpu:v5e", there).need() <= proposals.HEADROOM * 16e9


LLAMA_8B = serving.Serving(
    architecture(4096, 14336, 32, 32, 8, 128256), context=1024, adapters=8, span=512
)


@pytest.mark.parametrize(
    "chip, slots, arguments, temporaries",
    [  # XLA's plans for these; on an H100 the words and their scales before the copy come on top
        ("gpu:h100", 8, 7_613_255_320 + 3_489_660_928 + 223_596_544, 523_539_704),
        ("gpu:h100", 64, 15_194_100_928 + 3_489_660_928 + 223_596_544, 523_539_704),
        ("gpu:a100", 64, 15_194_101_824, 523_539_704),
        ("tpu:v5e", 8, 7_613_273_088, 20_776_960),
        ("tpu:v6e", 64, 15_194_119_168, 103_310_016),
    ],
)
def test_the_memory_of_serving_is_what_xla_planned(chip, slots, arguments, temporaries):
    job = dataclasses.replace(LLAMA_8B, slots=slots)
    found = serving_memory.of(job, ONE, chip, serving_memory.known(job, ONE, chip))
    assert sum(found.resident.values()) == pytest.approx(arguments, rel=1e-3)
    assert found.total == pytest.approx(arguments + temporaries, rel=0.01)


@pytest.mark.parametrize(
    "quant, slots, unpacks", [("int4", 128, False), ("int4", 129, True), ("nf4", 8, True)]
)
def test_a_step_on_an_a100_unpacks_what_its_kernel_does_not_read(quant, slots, unpacks):
    assert memory.GPU_ROWS == triton_gpu.MOST_ROWS
    job = dataclasses.replace(LLAMA_8B, slots=slots, quant=quant)
    known = serving_memory.known(job, ONE, "gpu:a100")
    found = serving_memory.of(job, ONE, "gpu:a100", known).work["decode"]
    keys_and_values = 2 * 512 * 1024 * 2 * slots
    logits = 3 * 4 * 128256 * slots
    without = max(keys_and_values, logits)
    assert found == without + (known.words + known.dense if unpacks else 0)


def test_an_engine_holds_what_serving_plans():
    """Nearly to the byte, on the devices of a mesh too."""
    like = serving.Serving(TINY.architecture, slots=4, context=64, adapters=3, rank=4)
    in_int8 = dataclasses.replace(like, kv_dtype="int8")
    two = ONE | {"tensor": 2}
    for small, sizes in ((like, ONE), (like, ONE | {"data": 2}), (like, two), (in_int8, two)):
        known = serving_memory.known(small, sizes, "tpu:v5e")
        planned = serving_memory.of(small, sizes, "tpu:v5e", known).resident
        shapes = serving.shapes(small, sharding.mesh_of(sizes), form=None)
        held = sum(map(resident.local_bytes, jax.tree.leaves((shapes.weights, shapes.state))))
        assert sum(planned.values()) == pytest.approx(held, abs=1000)


def test_serving_proposes_the_most_slots_and_the_longest_context():
    known = serving_memory.known(LLAMA_8B, ONE, "tpu:v5e")

    def total(**changes):
        job = dataclasses.replace(LLAMA_8B, span=None, **changes)
        return serving_memory.of(job, ONE, "tpu:v5e", known).total

    most = serving_memory.HEADROOM * 16e9
    job = dataclasses.replace(LLAMA_8B, span=None)
    slots = serving_memory.most_slots(job, ONE, "tpu:v5e", 16e9, known)
    assert total(slots=slots) <= most < total(slots=slots + 1)
    job = dataclasses.replace(job, slots=32)
    context = serving_memory.longest_context(job, ONE, "tpu:v5e", 16e9, known)
    assert total(slots=32, context=context) <= most < total(slots=32, context=context + 128)
    assert serving_memory.most_slots(job, ONE, "tpu:v5e", 6e9, known) == 0


def test_the_speed_of_serving_is_bound_by_the_bytes_of_a_step():
    """At one slot: packed weights, scales, head, bank and 1024 tokens of keys and values."""
    job = dataclasses.replace(LLAMA_8B, slots=1, adapters=0)
    known = serving_memory.known(job, ONE, "gpu:h100")
    entries = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    step = entries * (1 / 2 + 1 / 32) + 2 * 4096 * 128256 + 1024 * 2**17
    speed = serving_memory.tokens_per_second(job, ONE, chips.parse("gpu:h100"), known, 1024)
    assert speed == pytest.approx(3350e9 / step, rel=0.01)


def test_a_serving_job_survives_json():
    job = dataclasses.replace(LLAMA_8B, targets=("q_proj", "v_proj"))
    assert serving.serving_from(json.loads(json.dumps(dataclasses.asdict(job)))) == job


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(errors.UserError, match="divide the model") as caught:
        memory.memory(TINY, ONE | {"tensor": 3}, "cpu")
    assert "q_proj" in str(caught.value)


def test_the_floor_is_the_slowest_part():
    target = chips.parse("tpu:v5e-4")
    collectives = {"all-reduce": {"count": 1, "bytes": int(1e12)}}
    floor = operations.floor(int(4 * 197e12), int(819e9), collectives, target)
    assert floor == pytest.approx((1, 1, 10))
    assert floor.seconds == floor.communication


def test_a_job_survives_json():
    linear = {"rope_type": "linear", "factor": 2}
    longrope = {"rope_type": "longrope", "short_factor": 8 * [1.0], "long_factor": 8 * [2.0]}
    for rope in (linear, longrope):
        own = architecture(64, 160, 3, 4, 2, 512, rope_scaling=rope)
        job = dataclasses.replace(TINY, architecture=own, generation=(2, 16, 8), beta=0.1)
        assert jobs.job_from(json.loads(json.dumps(dataclasses.asdict(job)))) == job


@pytest.fixture
def folder(tmp_path):
    """A model folder with config.json alone."""
    written = {"model_type": "llama", "vocab_size": 128, "hidden_size": 32,
               "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "max_position_embeddings": 512, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(written))
    return tmp_path


@pytest.mark.long
def test_the_script_plans_and_compiles_without_weights(folder):
    flags = ("--model", folder, "--use-4bit", "--target", "cpu:2", "--hbm", "4MB", "--json")
    flags += ("--batch-size", 2, "--seq-len", 64)
    found = json.loads(cli.run("plan", *flags).out)
    assert found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1} and found["fits"]
    resident = sum(found["memory"]["resident"].values())
    assert found["xla"]["argument_bytes"] == pytest.approx(resident, abs=200)
    assert found["xla"]["collectives"]["all-reduce"]["bytes"] > 0
    assert found["proposals"]["batch_size"] > 2
    assert found["proposal_xla"]["peak_bytes"] > found["xla"]["peak_bytes"]


def test_train_plans_too_and_trains_nothing(folder, monkeypatch):
    monkeypatch.chdir(folder)
    flags = ("--plan", "--no-compile", "--model", folder, "--target", "tpu:v5e-4", "--prompt", "a")
    ended = cli.run("train", *flags)
    assert ended.code == 0, ended
    assert "fits: " in ended.out and "tokens/s, at most" in ended.out and "KV cache" in ended.out
    assert "--remat none " in ended.out and "\n--remat auto is none: " in ended.out
    assert max(map(len, ended.out.splitlines()[1:])) <= 80
    assert not (folder / "runs").exists()


def test_preferences_are_planned_with_their_reference(folder):
    flags = ("--no-compile", "--model", folder, "--target", "tpu:v5e-4", "--seq-len", 64)
    told = cli.run("plan", *flags, "--dpo", "--dataset", "pairs.jsonl").out
    assert "--seq-len 64 --dpo\n" in told and "\n  A and B, reference  " in told
    flags += ("--json", "--dataset", "pairs.jsonl")
    alone, pairs = (json.loads(cli.run("plan", *flags, *more).out) for more in ((), ("--dpo",)))
    assert pairs["memory"]["resident"]["batch"] == 2 * alone["memory"]["resident"]["batch"]
    least = [found["tokens_per_second_at_most"] for found in (pairs, alone)]
    assert least[0] < least[1]


@pytest.mark.parametrize("peak, fits", [(3_999_999, True), (4_000_001, False)])
def test_xla_decides_whether_it_fits(folder, monkeypatch, peak, fits):
    monkeypatch.setattr(programs, "compiled", lambda *_: programs.Compiled(peak, 0, 0, 1.0, {}))
    flags = ("--model", folder, "--target", "cpu:1", "--hbm", "4MB", "--seq-len", 64)
    found = json.loads(cli.run("plan", *flags, "--json").out)
    assert (found["need"], found["fits"], "changes" in found) == (peak, fits, not fits)
    told = cli.run("plan", *flags).out
    assert max(map(len, told.splitlines())) <= 80
    assert ("\nfits: " in told, "\ndoes not fit: " in told) == (fits, not fits)
    assert ("to make it fit" in told) != fits


def test_whether_it_fits_includes_generation(folder):
    flags = ("--no-compile", "--model", folder, "--target", "cpu:1", "--seq-len", 64)
    flags += ("--batch-size", 1, "--hbm", "1MB")
    assert json.loads(cli.run("plan", *flags, "--json").out)["fits"]
    flags += (*["--prompt", "a"] * 64, "--max-new-tokens", 400)
    told = cli.run("plan", *flags).out
    assert "does not fit: " in told and "of 1 MB, when generating" in told


def test_a_server_is_planned(folder, monkeypatch):
    made = programs.Compiled(0, 0, 10**6, 1.0, {})
    monkeypatch.setattr(programs, "compiled", lambda *_: made)
    monkeypatch.setattr(chips, "check", lambda _: None)
    flags = ("--serve", "--model", folder, "--use-4bit", "--target", "tpu:v5e", "--slots", 4)
    flags += ("--adapters", 2)
    told = cli.run("plan", *flags)
    assert told.code == 0 and max(map(len, told.out.splitlines()[1:])) <= 80, told
    for part in ("bank of adapters", "KV cache", "prefill of 512", "upper bound of the speed"):
        assert part in told.out
    found = json.loads(cli.run("plan", *flags, "--json").out)
    assert found["need"] == sum(found["memory"]["resident"].values()) + 10**6 and found["fits"]
    assert found["proposals"]["slots"] > 4 and found["proposals"]["context"] == 512
    monkeypatch.setattr(generation_config, "DEFAULT_CONTEXT", 256)  # as `serve` without --context
    assert "--context 256" in cli.run("plan", *flags).out
    in_int8 = json.loads(cli.run("plan", *flags, "--kv-cache-dtype", "int8", "--json").out)
    assert in_int8["job"]["kv_dtype"] == "int8"
    wide = json.loads(cli.run("plan", *flags, "--json").out)["memory"]["resident"]["KV cache"]
    # A head has 8 values of 2 bytes; in int8 of one, and a scale of 4.
    assert in_int8["memory"]["resident"]["KV cache"] / wide == (8 + 4) / 16
    refused = cli.refused("plan", *flags, "--context", 0, "--rank", 0)
    assert "--context 0" in refused and "--rank 0" in refused
    assert "--context 600" in cli.refused("plan", *flags, "--context", 600)


def test_prompts_that_train_would_refuse_are_refused(folder):
    flags = ("--no-compile", "--model", folder, "--target", "cpu:1", "--prompt", "a")
    assert "--max-new-tokens 511" in cli.refused("plan", *flags, "--max-new-tokens", 5000)


def test_the_share_of_a_gpu_is_reported_unless_its_memory_is_given(folder):
    flags = ("--no-compile", "--model", folder, "--target", "gpu:rtx4080")
    told = cli.run("plan", *flags).out
    assert "of 12 GB\n" in told and "XLA_PYTHON_CLIENT_MEM_FRACTION" in told
    told = cli.run("plan", *flags, "--hbm", "16GB").out
    assert "of 16 GB\n" in told and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in told


def test_flags_of_several_processes_are_refused_in_planning():
    told = cli.refused("train", "--plan", "--num-processes", 2, "--process-id", 0)
    assert "--num-processes with --plan" in told and "--process-id with --plan" in told


def test_planning_flags_without_plan_are_refused():
    assert "--target" in cli.refused("train", "--target", "tpu:v5e")


@pytest.mark.parametrize("size", ["16", "16 GB", "16GiB", "0.5tib"])
def test_a_memory_size_is_read(size):
    from lora_jax.cli import plan_output as script

    exact = {"16": 16, "16 GB": 16 * 10**9, "16GiB": 2**34, "0.5tib": 2**39}
    assert script.num_bytes(size) == exact[size]


@pytest.mark.parametrize("size", ["", "GB", "16XB", "-1GB", "1e9"])
def test_an_invalid_memory_size_is_refused(folder, size):
    with pytest.raises(errors.UserError, match="16GiB"):
        from lora_jax.cli import plan_output as script

        script.num_bytes(size)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_stops_the_compiler_too(folder):
    """Within a second or two, although the compiler returns to Python only later."""
    command = [sys.executable, cli.ROOT / "scripts/plan.py", "--model", folder, "--target", "cpu:1"]
    environment = os.environ | {"PYTHONPATH": str(cli.ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while "on cpu:1" not in process.stdout.readline():
            assert process.poll() is None
        children = ""
        while not children:
            children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            time.sleep(0.3)  # the parent must be waiting for it
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        process.wait(timeout=20)
        assert process.returncode == 130 and time.monotonic() - start < 5
    for child in children.split():
        state = pathlib.Path(f"/proc/{child}/stat")
        # Gone, or dead and not yet waited for by the process that inherits it.
        assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_the_comparison_is_reported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(cli.ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("compare", cli.ROOT / "benchmarks/plan.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    fits, large = compare.FITS[0], compare.FITS[-1]
    runs = {"FITS": (fits,), "ERRORS": (large,), "SCALING": (fits,), "versions": lambda: ["jax"]}
    for name, value in runs.items():
        monkeypatch.setattr(compare, name, value)
    job = fits.job
    planned = memory.memory(job, fits.sizes, "gpu:rtx4080").total
    made = programs.Compiled(planned, 0, 0, 1.0, {})
    kept = compare.compiled(fits, tmp_path, cached_only=True)
    assert kept == "not compiled yet"
    text = "\n".join(compare.report([(fits, made), (large, kept)]))
    assert "1 runs, largest error 0.0%" in text and "not compiled yet" in text
    assert f"| {planned / 1e9:.2f} GB | {planned / 1e9:.2f} GB | +0.0% |" in text
