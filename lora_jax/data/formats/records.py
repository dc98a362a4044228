"""What is read from a data file: records, and the lines of text files. Imports no jax."""

import codecs
import io
import pathlib
import typing
from collections.abc import Iterator, Mapping

from lora_jax import errors
from lora_jax.data.formats import compression, unicode

# Where an example starts: (byte, lines before it) in a text file, else (0, examples before it); in
# several files ([number of the file, byte], …).
Position = tuple[typing.Any, int]
START = (0, 0)


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

    Positions count the bytes in UTF-8, also of a file in UTF-16.
    Raises: UserError if the file is not Unicode.
    """
    byte, number = start
    with unicode.utf8(compression.opened(path)) as file:
        compression.skip(file, byte)
        for raw in file:
            if byte == 0 and raw.startswith(codecs.BOM_UTF8):
                byte, raw = len(codecs.BOM_UTF8), raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                raise errors.UserError(
                    expected="UTF-8, or UTF-16 with a byte order mark",
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
