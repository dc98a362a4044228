"""The memory that each feature saves: the same job, compiled with it and without it.

python benchmarks/features.py             all cases, each in its own process → features.md
python benchmarks/features.py CASE TARGET one case → one line of JSON

Needs pip install "lora-jax[train,aot]".
Nothing runs: memory is what the compiler plans for one device.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import architectures
import jax
import jax.numpy as jnp
import memory
import optax

from lora_jax.kernels import attention, cross_entropy
from lora_jax.parallel import mesh as sharding
from lora_jax.planning import chips, programs
from lora_jax.planning import job as jobs

TARGETS = ("gpu:h100",)
MODEL = "Llama-3.1-8B"
JOB = jobs.Job(
    memory.architecture(*architectures.MODELS[MODEL]), remat="full", batch_size=4, grad_accum=4
)
ONE = dict.fromkeys(sharding.AXES, 1)


def dense_attention(q, k, v, examples=None, **_):
    slots = jnp.arange(q.shape[1])
    visible = (slots[:, None] >= slots[None])[None] & (examples[:, :, None] == examples[:, None])
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])


def all_logits(hidden, head, targets, *_):
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, each, 0)


REPLACEABLE = {"self_attention": attention, "cross_entropy": cross_entropy}  # and their modules
CASES: dict[str, dict[str, Any]] = {  # the change: a field of the job, or a replaced function
    "all features": {},
    "weights in bfloat16 (--quant none)": {"quant": "none"},
    "only products kept (--remat dots)": {"remat": "dots"},
    "all activations kept (--remat none)": {"remat": "none"},
    "16 sequences at once instead of 4 × 4": {"batch_size": 16, "grad_accum": 1},
    "dense attention": {"self_attention": dense_attention},
    "all logits at once": {"cross_entropy": all_logits},
}


def compile_here(case: str, target: str) -> int:
    """Peak bytes of one device."""
    changes = dict(CASES[case])
    for name, module in REPLACEABLE.items():
        setattr(module, name, changes.pop(name, getattr(module, name)))
    job = dataclasses.replace(JOB, **changes)
    return programs.compile_here(job, target, ONE, "train").peak_bytes


def run(case: str, target: str) -> str:
    found = subprocess.run(
        [sys.executable, __file__, case, target],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},  # no device is used
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        if "RESOURCE_EXHAUSTED" in reason:
            asked = reason.partition("temporaries (")[2].partition(")")[0]
            return f"does not fit{asked and f': {asked} of temporaries'}"
        return reason
    return f"{json.loads(found.stdout.splitlines()[-1]) / 1e9:.2f} GB"


def main() -> None:
    for target in TARGETS:
        chips.check(target)
    lines = [
        "# What each feature saves",
        "",
        f"`python benchmarks/features.py`: {MODEL}, int4, adapters of rank 8 on q and v, a step of",
        f"{JOB.batch_size * JOB.grad_accum} sequences of {JOB.seq_len} tokens, {JOB.batch_size} at "
        f"a time, `--remat {JOB.remat}`; each row changes one thing.",
        "Nothing ran: the peak is what the compiler plans for one device.",
        "",
        f"| | {' | '.join(TARGETS)} |",
        "|---|" + "---|" * len(TARGETS),
    ]
    for case in CASES:
        lines.append(f"| {case} | {' | '.join(run(case, target) for target in TARGETS)} |")
        print(lines[-1], flush=True)
    pathlib.Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    print(compile_here(*sys.argv[1:])) if len(sys.argv) > 1 else main()
