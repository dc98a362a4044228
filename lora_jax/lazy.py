"""Packages that import their contents on first use, so that importing a package is cheap."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def names(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """(`__getattr__`, `__all__`) of a package.

    where: {name: "module" or "module:attribute"}, with full dotted paths of modules.
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = where[name].partition(":")
        try:
            loaded = importlib.import_module(module)
        except AttributeError as error:  # Python would say that the package has no such name
            raise ImportError(f"cannot import {module}: {error}") from error
        return getattr(loaded, attribute) if attribute else loaded

    return get, sorted(where)
