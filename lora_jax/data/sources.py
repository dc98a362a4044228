"""Files or hub data sets → examples of fields. Imports no jax."""

import hashlib
import itertools
import json
import pathlib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from lora_jax import errors, hub
from lora_jax.data import bad_rows, fields, folders, hub_datasets, rows, slices
from lora_jax.data.examples import kinds
from lora_jax.data.formats import arrow_files, files, records

if typing.TYPE_CHECKING:
    import pyarrow

HEAD = 1000  # examples of a stream that are read and checked in advance


def load(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    bad: bad_rows.BadRows | None = None,
) -> rows.Rows:
    """The examples of local files or of a hub data set.

    Args:
      source: a data file, a folder or a pattern of them, a folder of `save_to_disk`, or a hub id
        `owner/name`, followed by `:config` if it has configs. A folder or an id may be followed by
        `@split` for another split than train, and each by a part of one: `@train[:1000]`,
        `@train[-20%:]`.
      columns: {field: column of the file}, e.g. {"prompt": "question"}.
      bad: counts the rows that are skipped; None: a bad row is an error.

    Raises:
      errors.UserError: the source is missing, empty or malformed (with all bad lines), a column is
        unknown, …
    """
    loaded = _whole(source, columns, bad or bad_rows.BadRows())
    return fields.rename(loaded, columns, source) if columns else loaded


def load_all(
    sources: Sequence[str],
    columns: Mapping[str, str] | None = None,
    counts: Sequence[int | None] = (),
    bad: bad_rows.BadRows | None = None,
) -> list[rows.Rows]:
    """`load` for each source; in each, those of `columns` that it has are renamed.

    counts: how many examples of each are read, from its start; None: all.
    """
    bad = bad or bad_rows.BadRows()
    loaded = [
        _whole(source, columns, bad) if count is None else _head(source, count, columns, bad)
        for source, count in zip(sources, counts or [None] * len(sources), strict=True)
    ]
    nowhere = [
        f"no column {column}"
        for column in (columns or {}).values()
        if not any(column in one.column_names for one in loaded)
    ]
    if nowhere:
        known = dict.fromkeys(itertools.chain(*map(fields.names_of, loaded)))
        raise errors.UserError(
            expected=f"columns among {', '.join(known)}",
            found=nowhere,
            where=list(sources),
            do="correct --columns",
        )
    pairs = zip(loaded, sources, strict=True)
    return [fields.rename_known(one, columns, source) for one, source in pairs]


def _whole(source: str, columns: Mapping[str, str] | None, bad: bad_rows.BadRows) -> rows.Rows:
    """All rows of a source; its texts are kept in memory, and its tables where they are."""
    found = folders.find(source)
    if found is None:
        dataset = hub_datasets.load(source)
        parts: list[rows.Part] = [rows.Table(dataset.data.table, source, source)]
    else:
        parts = []
        for path, name in zip(found.paths, found.names, strict=True):
            if files.is_table(path):
                parts.append(rows.Table(_table_of(path), name, str(path)))
            else:
                read = _named(files.read(path), name)
                parts.append(rows.Texts(_usable(read, path, columns, bad)))
    loaded = rows.Rows(parts)
    if (part := slices.rows_of(source, len(loaded))) is not None:
        loaded = loaded.select(part)
    if len(loaded) == 0:
        raise _empty(source)
    return loaded


def _table_of(path: pathlib.Path) -> "pyarrow.Table":
    import pyarrow

    try:
        if path.is_file():
            hub.refuse_lfs_pointer(path)
        return arrow_files.table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise arrow_files.damaged(path, error) from error


def _head(
    source: str, count: int, columns: Mapping[str, str] | None, bad: bad_rows.BadRows
) -> rows.Rows:
    found = [*itertools.islice(stream(source), count)]
    loaded = rows.Rows([rows.Objects([*_usable(found, source, columns, bad)])])
    if len(loaded) == 0:
        raise _empty(source)
    return loaded


def stream(source: str, start: records.Position = records.START) -> Iterator[records.Record]:
    """The examples of files or of a hub data set from `start`, read as they are consumed."""
    bounds = slices.bounds_of(source)
    if bounds is None:
        raise errors.UserError(
            expected="a part of a stream in rows, whose total is not known, such as [:1000]",
            found=source,
            do=f"{slices.whole(source)}; --max-steps says how much is read",
        )
    if bounds != (0, None):
        return _part(source, *bounds, start)
    found = folders.find(source)
    if found is None:
        return hub_datasets.stream(source, start)
    if whole := [str(path) for path in found.paths if files.is_document(path)]:
        raise errors.UserError(
            expected="files that can be read example by example",
            found="a JSON array or another JSON document, which can only be read whole",
            where=whole,
            do="convert it to a .jsonl file, e.g. jq -c '.[]' in.json > out.jsonl",
        )
    if len(found.paths) == 1:
        return _named(files.read(found.paths[0], start), found.names[0])
    return _one_by_one(found, start)


def _part(
    source: str, first: int, end: int | None, start: records.Position
) -> Iterator[records.Record]:
    """The examples from number `first` to before `end`. Their positions hold how many were read.

    Raises: UserError if there are none.
    """
    at, before = start
    number, at = at if isinstance(at, list) else (0, at)
    for each in stream(slices.whole(source), (at, before)) if number != end else ():
        number += isinstance(each.example, dict)  # rows that are bad are none, as in `_whole`
        if number > first:
            yield each._replace(after=([number, each.after[0]], each.after[1]))
        if number == end:
            break
    if number <= first:
        raise _empty(source)


def _one_by_one(found: folders.Found, start: records.Position) -> Iterator[records.Record]:
    """The examples of several files. Their positions hold the number of the file."""
    at, before = start
    number, at = at if isinstance(at, list) else (0, at)
    for n in range(number, len(found.paths)):
        for each in _named(files.read(found.paths[n], (at, before)), found.names[n]):
            yield each._replace(after=([n, each.after[0]], each.after[1]))
        at, before = records.START


def table(
    found: Sequence[records.Record],
    columns: Mapping[str, str] | None,
    source: str,
    bad: bad_rows.BadRows | None = None,
) -> rows.Rows:
    """Examples from `stream`; those of `columns` that they have are renamed."""
    good = [*_usable(found, source, columns, bad or bad_rows.BadRows())]
    return fields.rename_known(rows.Rows([rows.Objects(good)]), columns, source)


def note(source: str) -> str:
    """What a user should know about the choice of files in a folder; "" if there was none."""
    found = folders.find(source)
    return found.note if found else ""


def _named(found: Iterable[records.Record], name: str) -> Iterator[records.Record]:
    return (each._replace(file=name) for each in found)


def _usable(
    found: Iterable[records.Record],
    where: str | pathlib.Path,
    columns: Mapping[str, str] | None,
    bad: bad_rows.BadRows,
) -> Iterator[records.Record]:
    """The records without a problem in what may be used.

    where: their file, or the source. Raises: UserError with all others, if they may not be skipped.
    """
    used = {*kinds.FIELDS, *(columns or {}).values()}
    wrong = []
    for each in found:
        problem = each.example if isinstance(each.example, str) else None
        for column, doubt in each.doubts.items():
            if column in used:
                problem = doubt
        if problem is None:
            yield each
        else:
            wrong.append(each._replace(example=problem))
    if wrong and not bad.skip({each.origin: str(each.example) for each in wrong}):
        _refuse(wrong, where)


def _refuse(wrong: Sequence[records.Record], where: str | pathlib.Path) -> typing.NoReturn:
    """Raises: UserError with all records that have a problem."""
    found = folders.find(str(where))
    paths = dict(zip(found.names, found.paths, strict=True)) if found else {}
    form = files.form_of(paths.get(wrong[0].file, pathlib.Path(where)))
    raise errors.UserError(
        expected=form.expected,
        found=[f"line {each.number}: {each.example}" for each in wrong],
        where=[f"{paths.get(each.file, where)}:{each.number}" for each in wrong],
        do=f"{form.do}, or skip them with --skip-bad-rows N",
    )


def _empty(source: str) -> errors.UserError:
    if slices.whole(source) != source:
        found, do = "none in this part", "choose another part"
    else:
        found, do = "an empty file", "check the file"
    return errors.UserError(expected="at least one example", found=found, where=source, do=do)


def holdout(found: rows.Rows, size: float, seed: int) -> tuple[rows.Rows, rows.Rows]:
    """(train, eval): seeded random examples go to eval, `size` of them, or that share of all if it
    is below 1, but at least one.

    For a .txt file it is the end of the file, because its lines belong together.
    """
    num_eval = max(1, round(size if size >= 1 else size * len(found)))
    if num_eval >= len(found):
        raise errors.UserError(
            expected="at least two examples (lines of a .txt file), to hold out some of them",
            found=f"{len(found)} examples, of which {num_eval} would be held out",
            do="a smaller --eval-size, more data, or a separate evaluation set",
        )
    if files.STREAM in found.column_names:
        order = np.arange(len(found))
    else:
        order = np.random.default_rng(seed).permutation(len(found))
    train, evaluation = np.sort(order[:-num_eval]), np.sort(order[-num_eval:])
    return found.select(train), found.select(evaluation)


def version(source: str) -> str:
    """The commit of a hub data set, which needs no reading; "" for files.

    A file may change: a row that ended the run is corrected. See stream.Stream.keep.
    """
    return "" if folders.find(source) else hub_datasets.version(source)


def fingerprint(*found: Iterable[Mapping[str, typing.Any]]) -> str:
    """16 hexadecimal digits that depend on every field of every example and on their order, and not
    on where they are from."""
    digest = hashlib.sha256()
    for example in itertools.chain(*found):
        content = {name: value for name, value in example.items() if name != kinds.ORIGIN}
        digest.update(json.dumps(content, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
