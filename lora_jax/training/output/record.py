"""run.json and report.html: what is written when a run starts, fails and ends."""

import contextlib
import importlib.metadata
import textwrap
from collections.abc import Iterator

import lora_jax
from lora_jax import errors
from lora_jax.checkpoints import fingerprints
from lora_jax.parallel import devices, processes
from lora_jax.planning import memory as device_memory
from lora_jax.training import monitor, planned, setup
from lora_jax.training.output import run_folder
from lora_jax.training.report import page
from lora_jax.training.settings import assemble

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
_MAX_REASON = 200  # characters of an error in run.json


def make(job: setup.Job) -> run_folder.Record:
    """The record of a run that starts."""
    settings, architecture = job.settings, job.base.architecture
    flat = assemble.absolute(settings.flat())
    plan, target = planned.job_and_target(settings, architecture, job.mesh)
    num_bytes = device_memory.memory(plan, dict(job.mesh.shape), target.chip).total
    if target.platform == "cpu":  # there, peak_bytes is that of the process, not of one device
        num_bytes *= len(job.mesh.local_devices)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return run_folder.Record(
        status="starting",
        settings=flat,
        num_steps=job.num_steps,
        versions={"lora-jax": lora_jax.__version__, **versions},
        device=devices.describe(),
        mesh=dict(job.mesh.shape),
        memory={"planned_bytes": num_bytes, "bytes_before": job.held},
        base={"id": flat["model"], **fingerprints.fingerprint(job.base.folder)},
        data=job.data.fingerprints | ({"adapter": job.start.digest()} if job.start else {}),
    )


def note_end(
    job: setup.Job,
    record: run_folder.Record,
    compilations: monitor.Compilations,
    *,
    finished: bool,
    step: int,
) -> None:
    """Writes how the run ended, and what it used, into run.json."""
    record.status = "finished" if finished else f"stopped at step {step}"
    record.seconds = {name: round(value, 2) for name, value in job.watch.seconds.items()}
    record.compile_seconds = round(compilations.seconds + (record.compile_seconds or 0), 2)
    record.peak_bytes = max(devices.peak_bytes(), record.peak_bytes or 0)
    job.folder.write_run(record)


@contextlib.contextmanager
def failure_recorded(job: setup.Job, record: run_folder.Record) -> Iterator[None]:
    """Writes an exception into run.json as the reason why the run ended, if it has started."""
    try:
        yield
    except Exception as error:
        known = error if isinstance(error, errors.UserError) else devices.explain(error)
        text = known.found if known else f"{type(error).__name__}: {error}"
        if record.status == "running":
            shown = textwrap.shorten(str(text), _MAX_REASON, placeholder=" …")
            record.status = f"failed: {shown}"
            with contextlib.suppress(OSError):  # such as a full disk, which is then `error` itself
                job.folder.write_run(record)
                report(job.folder)
        raise


def report(folder: run_folder.RunFolder) -> str:
    """Writes report.html; returns its path, or why it was not written, which is no failure."""
    if not processes.leads():
        return ""
    try:
        return str(page.write(folder.path))
    except errors.UserError as error:
        return f"not written: {error.found}; to write it later, use lora-jax report"
