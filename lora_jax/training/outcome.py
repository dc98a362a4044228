"""How a run ended. Imports no jax."""

import dataclasses
import pathlib
from collections.abc import Generator

from lora_jax.training.output import run_folder
from lora_jax.training.settings import groups


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    code: the exit code of the command: 0, or 130 after Ctrl-C, or 75 after SIGTERM or max_time
    (start it again). step: the last completed step. samples: answers "before" and "after" training.
    table: lines that compare the adapters of a sweep. report: the path of report.html, or why it
    was not written. continuations: one for each prompt. has_chats: whether the data had chats.
    """

    settings: groups.TrainSettings
    folder: pathlib.Path
    adapter: pathlib.Path
    num_steps: int
    step: int
    finished: bool
    code: int = 0
    samples: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    table: list[str] = dataclasses.field(default_factory=list)
    report: str = ""
    continuations: list[str] = dataclasses.field(default_factory=list)
    has_chats: bool = False


Steps = Generator[run_folder.Metrics, None, Outcome]
