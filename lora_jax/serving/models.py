"""The names that requests may use in `model`: the base and its adapters, now and at run time."""

import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.serving import refusal, settings

_NAME = re.compile(r"[^\s/\\\x00-\x1f][^\x00-\x1f]{0,255}")


class Models:
    """The base and the adapters of an engine's pool, by name.

    base: the name of the base. typed: the name that the command gave, which is as good.
    """

    def __init__(
        self,
        pool: Any,
        base: str,
        context: int,
        limits: settings.ServeSettings,
        typed: str | None = None,
        folders: Mapping[str, str] = {},
    ):
        self._pool, self.base, self._context = pool, base, context
        self._limits, self._typed = limits, typed or base
        self._created = int(time.time())
        self._loaded = {name: (self._created, folder) for name, folder in folders.items()}

    def adapters(self) -> list[str]:
        return [] if self._pool is None else [*self._pool.names()]

    def chosen(
        self, model: str | None, mixture: Mapping[str, float]
    ) -> tuple[str, dict[str, float]]:
        """(the name to answer with, the weight of each adapter). Raises: Refusal."""
        known = self.adapters()
        if unknown := [name for name in mixture if name not in known]:
            raise refusal.Refusal(
                f"adapters: there is no adapter {', '.join(map(repr, unknown))}", param="adapters"
            )
        if not model or model in (self.base, self._typed):
            return model or self.base, {name: each for name, each in mixture.items() if each}
        if model not in known:
            raise refusal.unknown_model(model)
        if mixture:
            raise refusal.Refusal(
                f"adapters: give the base in model, which is {self.base!r}, or no adapters",
                param="adapters",
            )
        return model, {model: 1.0}

    def listed(self) -> list[dict[str, Any]]:
        """The models as /v1/models lists them."""
        base = self._listed(self.base, self._created, self._typed, None)
        loaded = [
            (name, *self._loaded.get(name, (self._created, name))) for name in self.adapters()
        ]
        return [base, *(self._listed(*each, self.base) for each in loaded)]

    def one(self, name: str) -> dict[str, Any]:
        """Raises: Refusal if there is no such model."""
        name = self.base if name == self._typed else name
        for each in self.listed():
            if each["id"] == name:
                return each
        raise refusal.unknown_model(name)

    def _listed(self, name: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "lora_jax",
            "root": root,
            "parent": parent,
            "max_model_len": self._context,
        }

    def load(self, name: str, path: str, *, replace: bool) -> None:
        """Loads an adapter; it can be used when this returns. Raises: Refusal.

        Files are only read below the adapters' folder, whatever links there are.
        """
        if not _NAME.fullmatch(name) or name in (self.base, self._typed):
            raise refusal.Refusal(f"{name!r} cannot be the name of an adapter", param="lora_name")
        if name in self.adapters() and not replace:
            raise refusal.Refusal(
                f"The adapter `{name}` is loaded already; load_inplace: true replaces it.",
                param="lora_name",
            )
        folder = self._folder(path)
        try:
            self._pool.load(name, folder, replace=replace)
        except errors.UserError as error:
            raise refusal.of(error, "lora_path") from None
        self._loaded[name] = int(time.time()), path

    def unload(self, name: str) -> None:
        """Requests that use the adapter go on to their end. Raises: Refusal if there is none."""
        if name not in self.adapters():
            raise refusal.Refusal(
                f"The adapter `{name}` does not exist.", status=404, param="lora_name"
            )
        self._pool.unload(name)
        self._loaded.pop(name, None)

    def check_runtime(self) -> None:
        """Raises: Refusal if adapters may not be loaded and unloaded at run time."""
        if not self._limits.allow_runtime_lora:
            raise refusal.Refusal(
                "Adapters cannot be loaded at run time: the server was started without "
                "--allow-runtime-lora.",
                status=403,
            )
        if self._pool is None:
            raise refusal.Refusal("This server has no room for adapters.", status=403)

    def _folder(self, path: str) -> pathlib.Path:
        """The folder at `path`, relative to the adapters' folder. Raises: Refusal."""
        assert self._limits.adapters_dir is not None
        allowed = self._limits.adapters_dir.resolve()
        outside = refusal.Refusal(
            "lora_path: only folders below --adapters-dir can be loaded",
            status=403,
            param="lora_path",
        )
        try:
            folder = (allowed / path).resolve()
            if not folder.is_relative_to(allowed):
                raise outside
            if not folder.is_dir():
                raise refusal.Refusal(
                    f"No adapter is found at {path!r}.", status=404, param="lora_path"
                )
            if not all(each.resolve().is_relative_to(allowed) for each in folder.iterdir()):
                raise outside
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, a loop of links
            raise refusal.Refusal(
                f"No adapter is found at {path[:200]!r}.", status=404, param="lora_path"
            ) from None
        return folder
