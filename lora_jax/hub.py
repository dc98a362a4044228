"""A model's name → the local folder with its files, downloaded if necessary. Imports no jax."""

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Iterator

from lora_jax import errors, extras

# Files that the loaders read. Never a pickle (*.bin, *.pth), never code (*.py).
_BESIDE_WEIGHTS = [
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    # Of composite models: for other programs, which read a merged one with all its parts.
    "chat_template.json",
    "*processor_config.json",
]
_CONFIG = ["config.json", "quantize_config.json", "quant_config.json"]
_ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"]
_WANTED = [
    "model*.safetensors",
    "model.safetensors.index.json",
    *_CONFIG,
    *_ADAPTER,
    *_BESIDE_WEIGHTS,
]
_UNWANTED = ["model*/*", "tokenizer*/*", "*.bin", "*.py"]
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
_MODEL_FILES = (".safetensors", ".gguf", ".json", *_PICKLES)


def model_folder(
    name: str, revision: str | None = None, *, named_by: pathlib.Path | None = None
) -> pathlib.Path:
    """The folder with the files of model `name`; a hub id is downloaded first.

    Args:
      name: an existing local folder, or a Hugging Face id such as `huggyllama/llama-7b`.
      revision: branch, tag or commit on the hub; None means main.
      named_by: the adapter that names it as its base, if so.

    Raises:
      errors.UserError: the folder or repository does not exist, is gated or cannot be reached, has
        only pickles, …
    """
    return _local_folder(name, "model", named_by) or _downloaded(name, revision, "model")


def adapter_folder(name: str, revision: str | None = None) -> pathlib.Path:
    """As `model_folder`, for an adapter."""
    return _local_folder(name, "adapter") or _downloaded(name, revision, "adapter")


def _downloaded(name: str, revision: str | None, kind: str) -> pathlib.Path:
    folder = _snapshot(name, revision, kind, _WANTED)
    if not any(folder.glob("*.safetensors")):
        raise errors.UserError(
            expected="weights in *.safetensors files",
            found=_other_weights(name, revision, kind) or "no weights at all",
            where=f"the hub repository {name} (revision {revision or 'main'})",
            do="pickles are never opened: choose a repository or a --revision with safetensors "
            "(often refs/pr/N), or convert the weights with safetensors elsewhere",
        )
    return folder


def _snapshot(name: str, revision: str | None, kind: str, wanted: list[str]) -> pathlib.Path:
    """The folder with the wanted files of a repository, which are downloaded."""
    extras.require("huggingface_hub", any_version=True)
    import huggingface_hub

    with readable_errors(name, revision, kind=kind):
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED
            )
        )


def config_folder(name: str, revision: str | None = None) -> pathlib.Path:
    """As `model_folder`, but of a hub id only config.json is downloaded."""
    if local := _local_folder(name):
        return local

    extras.require("huggingface_hub", any_version=True)
    import huggingface_hub

    with readable_errors(name, revision, kind="model"):
        return pathlib.Path(
            huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
        ).parent


def tokenizer_folder(name: str, revision: str | None = None) -> pathlib.Path:
    """As `model_folder`, but of a hub id only config.json and the tokenizer are downloaded."""
    wanted = [*_CONFIG, *_BESIDE_WEIGHTS]
    return _local_folder(name) or _snapshot(name, revision, "model", wanted)


def beside_weights(folder: pathlib.Path) -> list[pathlib.Path]:
    """The tokenizer and generation files in a model folder; no code, no pickles."""
    found = {path for pattern in _BESIDE_WEIGHTS for path in folder.glob(pattern)}
    return sorted(path for path in found
                  if path.is_file() and path.suffix not in (".py", *_PICKLES))  # fmt: skip


_LOCAL = {  # what such a folder holds, which folder to pass, and an example id
    "model": ("config.json and *.safetensors", "that holds the model's files",
              "huggyllama/llama-7b"),
    "adapter": ("adapter_config.json and adapter_model.safetensors",
                "that a training run wrote as OUTPUT_DIR/adapter", "owner/name"),
}  # fmt: skip


def _local_folder(
    name: str, kind: str = "model", named_by: pathlib.Path | None = None
) -> pathlib.Path | None:
    """The existing folder `name`; None if it may be a hub id. Raises: UserError if neither."""
    folder = pathlib.Path(name).expanduser()
    if os.path.isdir(folder):  # is_dir() raises for names that are too long
        return folder
    if os.path.isfile(folder) or looks_like_path(name) or folder.suffix in _MODEL_FILES:
        holds, which, such_as = _LOCAL[kind]
        do = f"pass the folder {which}, or an id such as {such_as}"
        if similar := errors.similar_path(folder):
            do = f"{similar} Or {do}"
        if os.path.isfile(folder) and folder.suffix in (".json", ".safetensors"):
            do = f"pass its folder, {folder.parent}"
        raise errors.UserError(
            expected=f"a folder with {holds}, or a Hugging Face id",
            found="a file" if os.path.isfile(folder) else "no such folder",
            where=name if named_by is None else f"{name}, the base that {named_by} names",
            do=do if named_by is None else f"with --model {do}",
        )
    return None


def commit(folder: str | pathlib.Path) -> str | None:
    """The commit hash of a folder in the hub's cache; None for any other folder."""
    folder = pathlib.Path(folder).resolve()
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def refuse_lfs_pointer(path: str | pathlib.Path) -> None:
    """Raises errors.UserError if `path` is a git-lfs pointer instead of the file it stands for."""
    with open(path, "rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            raise errors.UserError(
                expected="the file itself",
                found="a git-lfs pointer (a few lines of text that stand for the file)",
                where=str(path),
                do="run `git lfs install && git lfs pull` in that folder",
            )


def looks_like_path(name: str) -> bool:
    """Whether `name` cannot be a hub id (`name` or `owner/name`)."""
    first = pathlib.Path(name).parts[:1]
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name
        or ("/" in name and os.path.isdir(pathlib.Path(*first)))
    )


@contextlib.contextmanager
def readable_errors(name: str, revision: str | None, kind: str) -> Iterator[None]:
    """Converts errors of the hub's client about the repository `name` into errors.UserError.

    kind: "model", "adapter" or "dataset".
    """
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        explained = _explain(error, name, revision, kind)
        if explained is None:
            raise
        raise explained from error


def _explain(
    error: Exception, name: str, revision: str | None, kind: str
) -> errors.UserError | None:
    """A UserError for `error` or one that caused it; None if it is not about the hub."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    causes = _chain(error)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    where = f"{name} (revision {revision or 'main'}) at {constants.ENDPOINT}"
    network = next((e for e in reversed(causes) if _is_network(e)), None)

    def seen(kind_of_error: type[Exception]) -> bool:
        return any(isinstance(e, kind_of_error) for e in causes)

    if seen(hub_errors.HFValidationError):
        found = "neither a local path nor a valid id (owner/name)"
        do = "check the spelling"
    elif seen(hub_errors.GatedRepoError):  # a subclass of RepositoryNotFoundError, so first
        found = "a gated repository that this account may not read"
        do = f"accept the licence at {page}, then run `hf auth login` or set HF_TOKEN"
    elif seen(hub_errors.RepositoryNotFoundError):
        found = "no such local path, and no such repository on the hub (or a private one)"
        do = "check the spelling; for a private repository run `hf auth login` or set HF_TOKEN"
    elif seen(hub_errors.RevisionNotFoundError):
        found = "no such revision"
        do = f"choose a branch, tag or commit from {page}/tree/main"
    elif any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in causes):
        found = "no space left on the disk"
        where = f"the download cache {constants.HF_HUB_CACHE}"
        do = "free some space, or set HF_HOME to a folder on a larger disk"
    elif denied := next((e for e in causes if isinstance(e, PermissionError)), None):
        found = f"{denied.strerror or denied}: {denied.filename}"
        where = f"the download cache {constants.HF_HUB_CACHE}"
        do = "change its permissions, or set HF_HOME to a folder that can be written"
    elif network is not None and constants.HF_HUB_OFFLINE:
        found = "HF_HUB_OFFLINE is set, and the files are not (all) in the cache"
        where = f"{name} in {constants.HF_HUB_CACHE}"
        do = f"unset HF_HUB_OFFLINE, or pass a local {kind}"
    elif network is not None:
        reason = f"{type(network).__name__}: {_first_line(network)}"
        found = f"no such local path, and the hub cannot be reached or refused: {reason}"
        do = (
            "check the network, HTTPS_PROXY and HF_ENDPOINT and run again (a download resumes), "
            f"or pass a local {kind}"
        )
    else:
        return None
    local = "no such local path" in found and errors.similar_path(name)
    if local:
        do = f"{local} Or {do}"
    return errors.UserError(
        expected=f"the {kind} {name}, from a local path or from the hub",
        found=found,
        where=where,
        do=do,
    )


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and its causes, nearest first. (The chains of `datasets` have cycles.)"""
    chain: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        current = ahead.pop(0)
        if current is not None and not any(current is e for e in chain):
            chain.append(current)
            ahead += [current.__cause__, current.__context__]
    return chain


def _is_network(error: BaseException) -> bool:
    from huggingface_hub import errors as hub_errors

    known = (
        ConnectionError,
        TimeoutError,
        hub_errors.HfHubHTTPError,
        hub_errors.LocalEntryNotFoundError,
    )
    # huggingface_hub has changed its HTTP library more than once.
    return isinstance(error, known) or type(error).__module__.startswith(("httpx", "requests"))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


def _other_weights(name: str, revision: str | None, kind: str) -> list[str]:
    """Names of the repository's weight files that are not safetensors."""
    import huggingface_hub

    # Asked of the hub: huggingface_hub reads the listing in its cache only from 1.23 on.
    with readable_errors(name, revision, kind=kind):
        names = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
    return [f for f in names if f.endswith((".gguf", *_PICKLES)) and "/" not in f]
