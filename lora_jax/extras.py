"""The packages of the extras: `train`, for commands and whole runs, not for adapters in a model of
one's own; `serve`, for the server; and `gpu-kernels`, which are used where they are installed."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator

from lora_jax import errors

TRAIN = {  # {package: its module}
    "datasets": "datasets",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "orbax-checkpoint": "orbax.checkpoint",
    "pyyaml": "yaml",
    "tensorstore": "tensorstore",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
    "transformers": "transformers",
}
SERVE = {name: name for name in ("starlette", "uvicorn", "llguidance")}
GPU_KERNELS = {"tokamax": "tokamax"}
_EXTRAS = {"train": TRAIN, "serve": SERVE, "gpu-kernels": GPU_KERNELS}


def require(*packages: str, extra: str = "train", any_version: bool = False) -> None:
    """Raises UserError if one of these packages, of all without any, is missing or too old."""
    modules = _EXTRAS[extra]
    packages = packages or tuple(modules)
    if missing := [name for name in packages if not _is_installed(modules[name])]:
        wrong = [f"not installed: {', '.join(missing)}"]
    else:
        wrong = [] if any_version else [*_too_old(packages, extra)]
    if wrong:
        raise errors.UserError(
            expected=f"the packages of the extra `{extra}`",
            found=wrong,
            do=f'pip install "lora-jax[{extra}]"',
        )


def _is_installed(module: str) -> bool:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package that the module is in
        return False
    return found is not None and found.origin is not None  # else a folder with the same name


def _too_old(packages: Iterable[str], extra: str) -> Iterator[str]:
    """Those with another version than lora-jax's own metadata, which pip wrote, ask for."""
    from packaging import requirements  # huggingface_hub and others bring it

    # Not found: lora-jax or the package is a source tree that is not installed.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for each in map(requirements.Requirement, importlib.metadata.requires("lora-jax") or ()):
            if each.name in packages and each.marker and each.marker.evaluate({"extra": extra}):
                version = importlib.metadata.version(each.name)
                if not each.specifier.contains(version, prereleases=True):
                    yield f"{each.name} {version}, which is not {each.specifier}"
