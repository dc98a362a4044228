"""The file of `generate --output-file`, which a second run continues."""

import fcntl
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from lora_jax import errors


class ResultsFile:
    """Appends a result for each prompt, in order: {index, prompt, text, finish_reason, …}.

    digest: of everything that the results depend on beside the prompts; each line has it. A last
    line that a killed run left incomplete is cut off, if it is the beginning of the next result.
    Raises: UserError if another process writes to the file, or if it is of other prompts or another
    digest; the file is then as it was.
    """

    def __init__(self, path: pathlib.Path, prompts: Sequence[str], digest: str):
        self._path, self._prompts, self._digest = path, prompts, digest
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: io.BufferedRandom = path.open("a+b")
        except OSError as error:
            raise errors.UserError(
                expected="a file that can be written", found=str(error.strerror), where=str(path)
            ) from None
        try:
            self.num_done = self._resume()
        except errors.UserError:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def _resume(self) -> int:
        """How many results are there."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise errors.UserError(
                expected="a file that no other process writes to", found="one that is in use",
                where=str(self._path), do="wait for it, or name another --output-file",
            ) from None  # fmt: skip
        self._file.seek(0)
        done, end = 0, 0
        for line in self._file:
            problem = self._problem(line, done)
            if not line.endswith(b"\n") and self._is_torn(line, done):
                break
            if problem:
                raise errors.UserError(
                    expected="the results of an earlier run with the same prompts, model and "
                    "settings, or no file",
                    found=problem,
                    where=f"{self._path}, line {done + 1}",
                    do="name another --output-file",
                )
            done, end = done + 1, end + len(line)
        self._file.truncate(end)
        return done

    def _is_torn(self, line: bytes, index: int) -> bool:
        """Whether a last line without an end is the beginning of this result."""
        if index >= len(self._prompts):
            return False
        own = self._line(index)[:-1]  # without the brace at its end
        size = min(len(own), len(line))
        return line[:size] == own[:size]

    def _line(self, index: int, **more: Any) -> bytes:
        line = {"index": index, "prompt": self._prompts[index], **more}
        return json.dumps(line, ensure_ascii=False).encode()

    def _problem(self, line: bytes, index: int) -> str:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "settings" not in found:
            return "another kind of file"
        if index >= len(self._prompts) or found.get("prompt") != self._prompts[index]:
            return "the result of another prompt"
        return (
            ""
            if found["settings"] == self._digest
            else "the result of another model or other settings"
        )

    def add(self, **result: Any) -> None:
        """Writes the next result."""
        index = self.num_done
        self._file.write(self._line(index, **result, settings=self._digest) + b"\n")
        self._file.flush()
        self.num_done += 1
