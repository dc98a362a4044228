"""What is read from a data file: records, and the lines of text files. Imports no jax."""

import codecs
import io
import pathlib
import typing
from collections.abc import Iterator, Mapping

from lora_jax import errors
from lora_jax.data import compression

# Where an example starts: (byte, lines before it) in a text file, else (0, examples before it); in
# several files ([number of the file, byte], …).
Position = tuple[typing.Any, int]
START = (0, 0)

_OTHER_UNICODE = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Record(typing.NamedTuple):
    """An example, or what is wrong with it; its number from 1; and the position after it.

    file: the name of its file, for messages. doubts: {column: problem} of values that may not be
    used, such as a key that the object has twice.
    """

    number: int
    example: dict[str, typing.Any] | str
    after: Position
    file: str = ""
    doubts: Mapping[str, str] = {}

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.number}"


def lines(path: pathlib.Path, start: Position, *, returns: bool) -> Iterator[Record]:
    """Lines with their line ends: \\n, and with `returns` also \\r. A byte order mark is removed.

    Raises: UserError if the file is not UTF-8.
    """
    byte, number = start
    with compression.opened(path) as file:
        compression.skip(file, byte)
        for raw in file:
            if byte == 0:
                _refuse_other_unicode(path, raw)
                if raw.startswith(codecs.BOM_UTF8):
                    byte, raw = len(codecs.BOM_UTF8), raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                raise errors.UserError(
                    expected="UTF-8",
                    found=f"byte 0x{error.object[error.start]:02x}",
                    where=f"{path}:{number + 1}",
                    do="convert it, e.g. iconv -f latin1 -t utf-8",
                ) from error
            end = byte + len(raw)
            pieces = [*io.StringIO(text, newline="")] if returns else [text]
            for piece in pieces[:-1]:
                byte, number = byte + len(piece.encode()), number + 1
                yield Record(number, piece, (byte, number))
            byte, number = end, number + 1
            yield Record(number, pieces[-1], (byte, number))


def _refuse_other_unicode(path: pathlib.Path, raw: bytes) -> None:
    name = next((name for mark, name in _OTHER_UNICODE.items() if raw.startswith(mark)), None)
    if name:
        raise errors.UserError(
            expected="UTF-8",
            found=name,
            where=str(path),
            do=f"convert it, e.g. iconv -f {name} -t utf-8",
        )
