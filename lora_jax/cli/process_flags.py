"""The flags of a command that runs as several processes, and how these find each other."""

import os

from lora_jax import errors
from lora_jax.cli import arguments
from lora_jax.parallel import cluster, processes
from lora_jax.training.settings import convert

_NAMES = ("coordinator", "num_processes", "process_id")


def add(flags: arguments.Flags) -> None:
    """--coordinator, --num-processes, --process-id."""
    flags.group("several processes (set by TPU slices, SLURM and Open MPI)")
    flags.add("--coordinator", "a free port on the host of process 0",
              metavar="HOST:PORT")  # fmt: skip
    flags.add("--num-processes", "number of processes", type=int, metavar="N")
    flags.add("--process-id", "index of this process, from 0", type=int, metavar="I")


def join(typed: arguments.Given) -> arguments.Given:
    """`typed` without these flags, once all processes are connected.

    From then on only process 0 prints.
    """
    processes.start(cluster.find(*(typed.get(name) for name in _NAMES)))
    if not processes.leads():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    kept = {name: value for name, value in typed.items() if name not in _NAMES}
    processes.same("flags", kept)
    return kept


def refuse(typed: arguments.Given, why: str) -> None:
    """Raises UserError if one of these flags was typed. why: what makes it useless."""
    if pointless := [name for name in _NAMES if name in typed]:
        raise errors.UserError(
            expected="flags that have an effect",
            found=[f"{convert.flag(name)} with {why}" for name in pointless],
            do="leave them out, and name the devices of all processes with --target",
        )
