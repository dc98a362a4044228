"""JSON files → examples: an object in each line, or one document. Imports no jax.

A document is an array of objects or of strings; one object, which may be written over many lines;
objects one after the other; an object that holds the array under one of its keys; or columns, as
{"prompt": ["…", "…"], "completion": ["…", "…"]} and as pandas writes them.
"""

import collections
import itertools
import json
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

from lora_jax import errors
from lora_jax.data.examples import kinds
from lora_jax.data.formats import records
from lora_jax.data.formats.records import START, Position, Record

_DEEPEST = 200  # levels of nesting; Python's own limit depends on who calls
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = " \t\r\n\ufeff"
_SEGMENTS = "segments"  # the parts of one text, of axolotl


def read(path: pathlib.Path, start: Position) -> Iterator[Record]:
    """The examples of a file of lines or of a document."""
    yield from _document(path, start) if is_document(path) else _lines(path, start)


def is_document(path: pathlib.Path) -> bool:
    """Whether the file is one document, which is read whole, instead of one object a line."""
    found = (line.example for line in records.lines(path, START, returns=False))
    written = (line for line in found if line.strip(_SPACE))
    first = next(written, "").strip(_SPACE)
    if not first.startswith("{"):
        return first.startswith("[")
    try:
        example = json.loads(first)
    except json.JSONDecodeError as error:
        return error.pos >= len(first)  # it goes on in the next line
    except (ValueError, RecursionError):
        return False
    return not is_row(example) and next(written, None) is None


def is_row(document: Mapping[str, typing.Any]) -> bool:
    """Whether an object is an example, and not a document of examples."""
    return not any(find(document) for find in (_wrapped, _columns, _pandas_columns, _pandas_split))


def _lines(path: pathlib.Path, start: Position) -> Iterator[Record]:
    for number, line, after, *_ in records.lines(path, start, returns=False):
        line = typing.cast(str, line).strip(_SPACE)
        if line:
            try:
                example, doubts = _parsed(line)
                if not isinstance(example, dict):
                    example = f"{_a(example)}, not an object"
            except (ValueError, RecursionError) as error:
                example, doubts = _problem(error), {}
            yield Record(number, example, after, doubts=doubts)


def _document(path: pathlib.Path, start: Position) -> Iterator[Record]:
    text = "".join(str(line.example) for line in records.lines(path, START, returns=False))
    try:
        values = [*_values(text)]
    except json.JSONDecodeError as error:
        if text.lstrip(_SPACE).startswith("{"):
            found = [*_lines(path, START)]
            if any(not isinstance(each.example, str) for each in found):
                yield from found  # lines, of which the first is damaged
                return
        raise _refusal(error.msg, f"{path}:{error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(_problem(error), str(path)) from error
    suspicious = bool(_SURROGATE.search(text))
    for number, example in enumerate(_examples(values, path), start=1):
        if number > start[1]:
            doubts = _doubts(example, suspicious)
            yield Record(number, _plain(example), (0, number), doubts=doubts)


def _values(text: str) -> Iterator[typing.Any]:
    """The JSON values of a text, one after the other."""
    decoder, at = json.JSONDecoder(object_pairs_hook=_object), 0
    space = re.compile(f"[{_SPACE}]*")
    while (at := space.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        value, at = decoder.raw_decode(text, at)
        _check_depth(text, value)
        yield value


def _examples(values: Sequence[typing.Any], path: pathlib.Path) -> Sequence[dict[str, typing.Any]]:
    """The examples in the values of a file."""
    array, what = values, "object"
    if len(values) == 1:
        (document,) = values
        if isinstance(document, list):
            array, what = document, "element"
            if array and all(isinstance(each, str) for each in array):
                array = [{"text": each} for each in array]
        elif isinstance(document, dict):
            array = _rows_in(document, path)
    bad = [n for n, each in enumerate(array, start=1) if not isinstance(each, dict)]
    if bad:
        raise errors.UserError(
            expected="a JSON array of objects",
            found=[_a(array[n - 1]) for n in bad],
            where=[f"{path}, {what} {n}" for n in bad],
            do="correct these elements",
        )
    return array


def _rows_in(document: dict[str, typing.Any], path: pathlib.Path) -> Sequence[typing.Any]:
    """The examples that an object holds; the object itself if it is one."""
    wrapped = _wrapped(document)
    if len(wrapped) > 1:
        raise errors.UserError(
            expected="one list of examples in a JSON object",
            found=f"{len(wrapped)} lists of objects: {', '.join(wrapped)}",
            where=str(path),
            do="write each into a file of its own, e.g. "
            f"jq -c '.[\"{wrapped[0]}\"][]' in.json > out.jsonl",
        )
    if wrapped:
        return document[wrapped[0]]
    if _pandas_split(document):
        return [dict(zip(document["columns"], row, strict=True)) for row in document["data"]]
    if columns := _columns(document):
        sizes = {name: len(document[name]) for name in columns}
        if len(set(sizes.values())) > 1:
            raise errors.UserError(
                expected="columns with as many values each",
                found=[f"{size} in {name}" for name, size in sizes.items()],
                where=str(path),
                do="correct the file",
            )
        rows = zip(*document.values(), strict=True)
        return [dict(zip(document, row, strict=True)) for row in rows]
    if _pandas_columns(document):
        numbers = next(iter(document.values()))
        return [{name: document[name][number] for name in document} for number in numbers]
    return [document]


def _wrapped(document: Mapping[str, typing.Any]) -> list[str]:
    """The keys under which an object holds lists of examples: `data`, or those that are no fields
    of an example."""
    if any(name in kinds.FIELDS for name in document):
        return []
    held = [name for name, value in document.items()
            if _all(value, dict) and not _chat(value) and name != _SEGMENTS]  # fmt: skip
    return ["data"] if "data" in held else held


def _chat(value: Sequence[Mapping[str, typing.Any]]) -> bool:
    """Whether a list of objects is the messages of a chat."""
    return all("role" in each or "from" in each for each in value)


def _columns(document: Mapping[str, typing.Any]) -> list[str]:
    """The keys of an object whose values are all columns: lists, none of them of messages, nor the
    token ids of one example."""
    if _all(document.get("input_ids"), int):
        return []
    if not any(name in kinds.FIELDS for name in document):
        lists = [value for value in document.values() if isinstance(value, list)]
        if len(lists) < max(2, len(document)) or len({*map(len, lists)}) > 1:
            return []
    columns = [
        name for name, value in document.items()
        if isinstance(value, list) and value and not (_all(value, dict) and _chat(value))
    ]  # fmt: skip
    return columns if len(columns) == len(document) else []


def _pandas_columns(document: Mapping[str, typing.Any]) -> bool:
    """Whether an object is what DataFrame.to_json() writes: {column: {"0": value, "1": …}}."""
    values = [*document.values()]
    return _all(values, dict) and all(
        bool(value) and value.keys() == values[0].keys() and all(map(str.isdecimal, value))
        for value in values
    )


def _pandas_split(document: Mapping[str, typing.Any]) -> bool:
    """Whether an object is what DataFrame.to_json(orient="split") writes."""
    names, rows = document.get("columns"), document.get("data")
    return (
        document.keys() <= {"columns", "index", "data"}
        and _all(names, str)
        and _all(rows, list)
        and all(len(row) == len(names) for row in rows)  # type: ignore[arg-type, union-attr]
    )


def _all(value: typing.Any, kind: type) -> bool:
    """Whether a value is a list with something in it, all of a kind."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)


class _Twice(dict):
    """An object that has a key twice; `key` is the first such key."""

    key: str


def _object(pairs: list[tuple[str, typing.Any]]) -> dict[str, typing.Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    counts = collections.Counter(name for name, _ in pairs)
    twice = _Twice(made)
    twice.key = next(name for name, count in counts.items() if count > 1)
    return twice


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parsed(line: str) -> tuple[typing.Any, Mapping[str, str]]:
    """(value, doubts) of a line. Raises: ValueError or RecursionError if it is not JSON."""
    value = _DECODER.decode(line)
    _check_depth(line, value)
    return _plain(value), _doubts(value, bool(_SURROGATE.search(line)))


def _check_depth(text: str, value: typing.Any) -> None:
    if text.count("[") + text.count("{") <= _DEEPEST:
        return
    level, depth = [value], 0
    while level:
        depth += 1
        below = (each.values() if isinstance(each, dict) else each for each in level
                 if isinstance(each, dict | list))  # fmt: skip
        level = [*itertools.chain.from_iterable(below)]
    if depth > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} levels deep")


def _doubts(value: typing.Any, suspicious: bool) -> Mapping[str, str]:
    """{column: problem} of an object's values that Python reads, but that are not sound.

    suspicious: its text may have halves of characters.
    """
    if not isinstance(value, dict):
        return {}
    doubts = {
        name: f"the key {key} twice"
        for name, column in value.items()
        if (key := _key_twice(column)) is not None
    }
    if isinstance(value, _Twice):
        doubts[value.key] = f"the key {value.key} twice"
    if suspicious:
        for name, column in value.items():
            try:
                json.dumps(column, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                code = ord(error.object[error.start])
                doubts.setdefault(name, f"half of a character in {name}: \\u{code:04x}")
    return doubts


def _key_twice(value: typing.Any) -> str | None:
    """The first key within a value that an object has twice."""
    if isinstance(value, _Twice):
        return value.key
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return next((key for key in map(_key_twice, parts) if key is not None), None)
    return None


def _plain(value: typing.Any) -> typing.Any:
    """A top-level object as a plain dict."""
    return dict(value) if isinstance(value, _Twice) else value


def _problem(error: Exception) -> str:
    deep = isinstance(error, RecursionError)
    return f"nested more than {_DEEPEST} levels deep" if deep else str(error)


def _a(value: typing.Any) -> str:
    return f"a {type(value).__name__}"


def _refusal(found: str, where: str) -> errors.UserError:
    return errors.UserError(
        expected="a JSON array of objects, or one object in each line",
        found=found,
        where=where,
        do="correct the file",
    )
