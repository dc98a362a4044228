"""Text in UTF-8, UTF-16 or UTF-32 → UTF-8, as it is read. Imports no jax."""

import codecs
import io
import json

_CHUNK = 2**20


def encoding(first: bytes) -> str:
    """The Unicode encoding of a text that begins with these bytes, four if it has as many.

    A byte order mark tells it; without one, where the zeros are in the first two characters, which
    in JSON and in most headers of tables are ASCII.
    """
    return json.detect_encoding(first)


def utf8(file: io.BufferedIOBase) -> io.BufferedIOBase:
    """The text of a file in UTF-8, without the byte order mark of another encoding.

    Halves of characters stay what they are, so that what reads the UTF-8 finds them in their lines.
    Reading raises EOFError if the file ends within a character.
    """
    found = encoding(file.peek(4)[:4])  # type: ignore[attr-defined]  # what `opened` returns has it
    if found.startswith("utf-8"):
        return file
    return io.BufferedReader(_Recoded(file, found), _CHUNK)


class _Recoded(io.RawIOBase):
    """The bytes of a text in UTF-8."""

    def __init__(self, file: io.BufferedIOBase, found: str):
        self._file, self._rest = file, b""
        self._decoder = codecs.getincrementaldecoder(found)("surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, into: bytearray | memoryview) -> int:
        while not self._rest:
            chunk = self._file.read(_CHUNK)
            try:
                text = self._decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise EOFError("the file ends within a character") from error
            self._rest = text.encode("utf-8", "surrogatepass")
            if not chunk:
                break
        count = min(len(into), len(self._rest))
        into[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
