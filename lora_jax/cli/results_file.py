"""The file of `generate --output-file`: JSON lines, which a run that was stopped goes on with.

Imports no jax.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_jax import errors

_SAMPLES, _SAMPLE = 64, 4096  # of each file of a base's weights: how many, and bytes of each

_SPACE = "free some space, then the same command goes on from here"


class ResultsFile:
    """The lines of a file, in the order of the prompts.

    {"index": of the prompt, from 0, "prompt", "text", "finish_reason", "num_tokens",
    "settings": a digest of what the text depends on, "chat_time": what the chat template prints, if
    it prints the time}

    Raises: UserError if the file cannot be written, or another process writes to it.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.num_done = 0
        with self._readable("choose another --output-file, or change its permissions"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+")
        try:
            with contextlib.suppress(OSError):  # some network drives have no locks
                self._lock()
        except errors.UserError:
            self._file.close()
            raise

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        try:
            self._file.close()
        except OSError as other:  # network drives may tell only now; else it was raised before
            if error is None:
                raise self._failed(other, _SPACE) from None

    def chat_time(self) -> str | None:
        """The time in the chat template of the run that began the file."""
        time = _parsed(next(iter(self._lines()), b"")).get("chat_time")
        return time if isinstance(time, str) else None

    def resume(self, begun: Sequence[Mapping[str, Any]]) -> int:
        """How many prompts are done. A line that is not complete, at the end, is removed.

        begun: of each prompt, what its line has whatever is generated.
        Raises: UserError if a line is that of another prompt or of other settings.
        """
        self.num_done, size = 0, 0
        for line in self._lines():
            number = self.num_done
            ours = begun[number] if number < len(begun) else None
            if not line.endswith(b"\n"):
                if ours is None or not _begins(line, ours):
                    raise self._other(number, "a line that no such run has written")
                break
            theirs = _parsed(line)
            if ours is None:
                raise self._other(number, f"more lines than the {len(begun)} prompts")
            if any(theirs.get(name) != ours[name] for name in ("index", "prompt")):
                raise self._other(number, f"not prompt {number} of this command")
            if any(theirs.get(name) != value for name, value in ours.items()):
                raise self._other(number, "its prompt, with another model, adapter or settings")
            self.num_done, size = number + 1, size + len(line)
        with self._readable("change the permissions of the file"):
            self._file.truncate(size)
        return self.num_done

    def add(self, begun: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Writes the line of the next prompt. begun: as for `resume`; found: what is new."""
        first = {name: begun[name] for name in ("index", "prompt")}
        line = json.dumps({**first, **found, **begun}, ensure_ascii=False)
        with self._readable(_SPACE):
            self._file.write(f"{line}\n".encode())
            self._file.flush()
        self.num_done += 1

    def _lines(self) -> Iterator[bytes]:
        self._file.seek(0)
        return iter(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.UserError(
                expected="an output file of its own for each run",
                found="another run is writing to it",
                where=str(self.path),
                do="wait for that run, or choose another --output-file",
            ) from None

    @contextlib.contextmanager
    def _readable(self, advice: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error, advice) from None

    def _failed(self, error: OSError, advice: str) -> errors.UserError:
        return errors.UserError(
            expected="an output file that can be written and read",
            found=error.strerror or str(error),
            where=str(self.path),
            do=advice,
        )

    def _other(self, number: int, found: str) -> errors.UserError:
        return errors.UserError(
            expected="a new file, or one that the same command has begun",
            found=found,
            where=f"{self.path}:{number + 1}",
            do="choose another --output-file, or repeat the command that began this one",
        )


def digest(*parts: Any) -> str:
    """Of JSON's types and bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        found.update(b"\0")
    return found.hexdigest()[:16]


def digest_of_base(folder: pathlib.Path) -> str:
    """Of a model folder: its name and configuration, and samples of its weights."""
    found = hashlib.sha256(folder.resolve().name.encode())
    found.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found.update(f"{path.name} {size}".encode())
            for number in range(_SAMPLES):
                file.seek(size * number // _SAMPLES)
                found.update(file.read(_SAMPLE))
    return found.hexdigest()


def digest_of_adapter(folder: pathlib.Path) -> str:
    """Of an adapter's configuration and weights."""
    found = hashlib.sha256()
    for path in sorted((*folder.glob("adapter*.json"), *folder.glob("*.safetensors"))):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _begins(line: bytes, begun: Mapping[str, Any]) -> bool:
    """Whether a line that was cut off is that of a prompt."""
    first = {name: begun[name] for name in ("index", "prompt")}
    whole = json.dumps(first, ensure_ascii=False).removesuffix("}").encode()
    return line.startswith(whole) or whole.startswith(line)
