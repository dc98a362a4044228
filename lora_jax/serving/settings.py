"""What the server may do, and how much of it. Imports no jax, because `--help` reads these."""

import dataclasses
import pathlib
from collections.abc import Iterator

from lora_jax import errors


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """The address of the server, who may use it, and the limits of a request.

    Args:
      host: the address to listen on.
      port: its port; 0 takes a free one.
      served_model_name: the base's name in `model`; None: the last part of its path or hub id.
      api_key: what clients must send as a bearer token; None: anyone may ask.
      allow_origin: the origins whose pages may read answers, "*" for all; none: no page may.
      adapters_dir: the folder below which adapters may be loaded at run time.
      allow_runtime_lora: adapters can be loaded and unloaded at run time.
      max_body: the most bytes of a request's body.
      max_prompt: the most tokens of a prompt; None: those of the context.
      max_tokens: the most tokens a request may generate; None: those of the context.
      max_n: the most choices for a prompt.
      max_queue: the most choices that wait for a slot; more are refused with 429.
      timeout: seconds after which a request ends with an error.
      drain: seconds that requests have to end after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: str | None = None
    allow_origin: tuple[str, ...] = ()
    adapters_dir: pathlib.Path | None = None
    allow_runtime_lora: bool = False
    max_body: int = 8 * 1024 * 1024
    max_prompt: int | None = None
    max_tokens: int | None = None
    max_n: int = 16
    max_queue: int = 1024
    timeout: float = 600.0
    drain: float = 60.0

    def __post_init__(self):
        if problems := [*self._problems()]:
            raise errors.UserError.together(problems)

    def _problems(self) -> Iterator[errors.UserError]:
        wrong = [
            f"--{name.replace('_', '-')} {getattr(self, name)}"
            for name, least in (
                ("max_body", 1), ("max_prompt", 1), ("max_tokens", 1), ("max_n", 1),
                ("max_queue", 0), ("timeout", 0.001), ("drain", 0),
            )
            if getattr(self, name) is not None and not getattr(self, name) >= least
        ]  # fmt: skip
        if self.api_key == "":
            wrong.append("--api-key with an empty key")
        if not 0 <= self.port <= 65535:
            yield errors.UserError(expected="a port from 0 to 65535", found=f"--port {self.port}")
        if wrong:
            yield errors.UserError(expected="limits that allow something", found=wrong)
        if self.allow_runtime_lora and self.adapters_dir is None:
            yield errors.UserError(
                expected="the folder below which adapters may be loaded",
                found="--allow-runtime-lora without --adapters-dir",
                do="--adapters-dir FOLDER",
            )
        if self.adapters_dir is not None and not self.adapters_dir.is_dir():
            yield errors.UserError(
                expected="a folder",
                found="no such folder",
                where=str(self.adapters_dir),
                do=errors.similar_path(self.adapters_dir),
            )
        if self.adapters_dir is not None and not self.allow_runtime_lora:
            yield errors.UserError(
                expected="flags that have an effect",
                found="--adapters-dir without --allow-runtime-lora",
                do="add --allow-runtime-lora, or leave it out",
            )
