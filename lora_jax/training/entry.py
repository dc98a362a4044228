"""Starts or resumes a run. The output folder is checked before jax is imported."""

import pathlib

from lora_jax import assets, console, extras
from lora_jax.console import say
from lora_jax.parallel import processes
from lora_jax.training import outcome
from lora_jax.training.output import run_folder
from lora_jax.training.settings import assemble, groups
from lora_jax.training.settings import resume as resume_settings


def run(settings: groups.TrainSettings) -> outcome.Steps:
    """Starts a new run: yields the metrics of each step and evaluation, and returns its Outcome.

    The settings are checked at this call; the model is loaded and trained by iterating. The output
    folder gets the same files as from `lora-jax train` with these settings. If the caller stops
    iterating, the run saves a checkpoint and stops; `resume` continues from there.
    Raises: UserError if the settings do not suit each other, the model, the data or the devices.
    """
    extras.require()
    return _run(assemble.checked(settings))


def _run(settings: groups.TrainSettings) -> outcome.Steps:
    path = settings.run.output_dir or str(run_folder.default_path())
    with run_folder.opened(pathlib.Path(processes.broadcast(path)), resume=False) as folder:
        if not {"model", "dataset"} & settings.given and settings.loop.max_steps != 0:
            flat = settings.flat()
            shown = {name: flat[name] for name in assets.settings()
                     if name in flat and name != settings.loop.swept}  # fmt: skip
            say("settings", "the demo's: " + console.pairs(shown))
        from lora_jax.training import stages

        return (yield from stages.load_and_run(settings, folder, resuming=False))


def resume(output_dir: str, **given: groups.Value) -> outcome.Steps:
    """Resumes the run in `output_dir`: yields and returns the same as `run`.

    given: settings that may change when a run is resumed, see settings.resumed. They are checked at
    this call.
    """
    extras.require()
    return _resume(output_dir, assemble.given_to_resume(given))


def _resume(output_dir: str, given: groups.Flat) -> outcome.Steps:
    path = pathlib.Path(processes.broadcast(output_dir))
    with run_folder.opened(path, resume=True) as folder:
        record, where = folder.read_run()["settings"], str(folder.path / "run.json")
        settings = resume_settings.resumed(record, {**given, "output_dir": output_dir}, where)
        from lora_jax.training import stages

        return (yield from stages.load_and_run(settings, folder, resuming=True))
