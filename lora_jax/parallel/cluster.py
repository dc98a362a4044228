"""This process's number among those of a run, from flags or from the cluster it runs on."""

import dataclasses
import glob
import os
import re
from typing import Any

from lora_jax import errors

WAIT = 300.0  # seconds for all processes to start


@dataclasses.dataclass(frozen=True)
class Process:
    """A process's number among those of its run, and where process 0 listens."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int
    detected: bool = False  # by the cluster, not given by flags


def find(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Process | None:
    """This process among those of its run, from flags, else from the cluster; None: it is alone.

    Raises: UserError for flags that are missing or out of range, and for a cluster whose settings
    cannot be read.
    """
    flags = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    typed = {flag: value for flag, value in flags.items() if value is not None}
    if not typed:
        return _detected()
    if typed == {"--num-processes": 1}:
        return None
    problems = [f"no {flag}" for flag in flags if flag not in typed]
    if coordinator is not None and not _is_address(coordinator):
        problems.append(f"--coordinator {coordinator}, not HOST:PORT")
    if num_processes is not None and num_processes < 1:
        problems.append(f"--num-processes {num_processes} (at least 1)")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        problems.append(f"--process-id {process_id} (from 0 to --num-processes − 1)")
    if problems:
        raise errors.UserError(
            expected="--coordinator HOST:PORT (the same for all, a free port of process 0's host), "
            "--num-processes N and --process-id 0 … N − 1",
            found=problems,
            do="give all three, or none on a cluster that jax detects",
        )
    return Process(coordinator, num_processes, process_id) if num_processes > 1 else None


def _is_address(text: str) -> bool:
    match = re.fullmatch(r"(.+):(\d{1,5})", text)
    return match is not None and 0 < int(match[2]) < 2**16


def _detected() -> Process | None:
    """What jax's own cluster detection finds; it runs only where there are signs of a cluster."""
    names = ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "JOB_COMPLETION_INDEX",
             "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")  # fmt: skip
    signs = [name for name in names if name in os.environ]
    signs += glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    # The shell of an allocation for several tasks, or a single task started in it.
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1" and "OMPI_MCA_orte_hnp_uri" not in signs:
        return None
    if not signs:
        return None
    from jax._src import clusters

    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or not _is_present(cluster):
            continue
        try:
            num_processes = cluster.get_process_count()
            if num_processes == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(int(WAIT), port)
            return Process(address, num_processes, cluster.get_process_id(), detected=True)
        except Exception as error:
            raise errors.UserError(
                expected="a cluster that gives each process its number and the coordinator",
                found=f"{cluster.__name__}: {error}",
                do="give --coordinator, --num-processes and --process-id, "
                "or --num-processes 1 to run a single process",
            ) from error
    return None


def _is_present(cluster: Any) -> bool:
    if cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
        return False  # a pod, but not one of an indexed job
    try:
        return cluster.is_env_present()
    except Exception:  # a TPU without Google's metadata server, a pod without an account
        return False
