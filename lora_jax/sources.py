"""Files or hub data sets → rows of fields. Imports no jax.

A row is one of four kinds, the first whose fields are all present (see KINDS), or a preference.
"""

import csv
import hashlib
import io
import itertools
import json
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_jax import errors, hub

if typing.TYPE_CHECKING:
    import datasets

KINDS = (
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text",),
)
PREFERENCE = ("prompt", "chosen", "rejected")
_FIELDS = ("messages", "prompt", "completion", "instruction", "input", "output", "text",
           "chosen", "rejected")  # fmt: skip
# Where a row comes from ("train.jsonl:17"), for messages; no part of the content.
ORIGIN = "_origin"
# A line of a .txt file.
STREAM = "_stream"


def load(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
) -> "datasets.Dataset":
    """The rows of a local file (.jsonl, .json, .csv, .parquet, .txt) or of a hub data set.

    Args:
      source: a path, or a hub id `owner/name`, with `:config` behind it where it has configs, and
        with `@split` for another split than train.
      columns: {our field: column of the file}, e.g. {"prompt": "question"}.

    Raises:
      errors.UserError: missing, empty or malformed (all bad lines named), unknown column, …
    """
    path = pathlib.Path(source).expanduser()
    if path.is_file():
        dataset = _local(path)
    elif path.suffix in _READERS or hub.looks_like_path(source) or path.is_dir():
        raise errors.UserError(
            expected=f"a data file ({', '.join(_READERS)}) or a hub id",
            found="a folder" if path.is_dir() else "no such file",
            where=str(path),
            do="check the path",
        )
    else:
        dataset = _from_hub(source)
    if len(dataset) == 0:
        raise errors.UserError(
            expected="at least one row", found="an empty file", where=source, do="check the file"
        )
    return _rename(dataset, columns, source) if columns else dataset


def load_all(
    sources: Sequence[str], columns: Mapping[str, str] | None = None
) -> "list[datasets.Dataset]":
    """As `load`, of each. Of several, each is renamed by those of `columns` that it has."""
    if len(sources) == 1 or not columns:
        return [load(source, columns=columns) for source in sources]
    loaded = [load(source) for source in sources]
    nowhere = [
        f"no column {theirs}"
        for theirs in columns.values()
        if not any(theirs in dataset.column_names for dataset in loaded)
    ]
    if nowhere:
        known = dict.fromkeys(itertools.chain(*map(fields_of, loaded)))
        raise errors.UserError(
            expected=f"columns among {', '.join(known)}",
            found=nowhere,
            where=list(sources),
            do="correct --columns",
        )
    own = [
        {ours: theirs for ours, theirs in columns.items() if theirs in dataset.column_names}
        for dataset in loaded
    ]
    return [
        _rename(dataset, mapped, source) if mapped else dataset
        for source, dataset, mapped in zip(sources, loaded, own, strict=True)
    ]


def _local(path: pathlib.Path) -> "datasets.Dataset":
    """Reads in memory, without the cache of `datasets`: two runs at once cannot collide."""
    import datasets
    import pyarrow

    if path.suffix not in _READERS:
        raise errors.UserError(
            expected=f"a data file ending in {', '.join(_READERS)}",
            found=path.suffix or "no suffix",
            where=str(path),
            do="convert the file, or rename it if only its name is wrong",
        )
    hub.refuse_lfs_pointer(path)
    rows = _READERS[path.suffix](path)
    names = dict.fromkeys(name for _, row in rows for name in row)
    table = {name: [row.get(name) for _, row in rows] for name in names}
    try:
        return datasets.Dataset.from_dict(
            {**table, ORIGIN: [f"{path.name}:{number}" for number, _ in rows]}
        )
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise errors.UserError(
            expected="values of one type in each column",
            found=str(error).splitlines()[0],
            where=str(path),
            do="make the types equal, e.g. write numbers as strings in every row",
        ) from error


Rows = list[tuple[int, dict]]  # (line or row number, counted from 1; fields)


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise errors.UserError(
            expected="UTF-8",
            found=f"byte 0x{error.object[error.start]:02x}",
            where=f"{path}:{line}",
            do="convert it, e.g. iconv -f latin1 -t utf-8",
        ) from error


def _read_jsonl(path: pathlib.Path) -> Rows:
    rows, found, where = [], [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__} instead of an object")
            rows.append((number, row))
        except ValueError as error:
            found.append(f"line {number}: {error}")
            where.append(f"{path}:{number}")
    if found:
        raise errors.UserError(
            expected='one JSON object in each line, such as {"prompt": "…", "completion": "…"}',
            found=found,
            where=where,
            do="correct these lines",
        )
    return rows


def _read_json(path: pathlib.Path) -> Rows:
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        return _read_jsonl(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise errors.UserError(
            expected="a JSON array of objects",
            found=error.msg,
            where=f"{path}:{error.lineno}",
            do="correct the file",
        ) from error
    bad = [n for n, row in enumerate(rows, start=1) if not isinstance(row, dict)]
    if bad:
        raise errors.UserError(
            expected="a JSON array of objects",
            found=[f"a {type(rows[n - 1]).__name__}" for n in bad],
            where=[f"{path}, element {n}" for n in bad],
            do="correct these elements",
        )
    return list(enumerate(rows, start=1))


def _read_csv(path: pathlib.Path) -> Rows:
    # All values stay text: a column of numbers is as good a completion as any other.
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows, bad = [], []
    try:
        header = next(reader, [])
        for fields in reader:
            if len(fields) == len(header):
                rows.append((reader.line_num, dict(zip(header, fields, strict=True))))
            elif fields:
                bad.append((reader.line_num, f"{len(fields)} fields, {len(header)} in the header"))
    except csv.Error as error:
        bad.append((reader.line_num, str(error)))
    if bad:
        raise errors.UserError(
            expected="a header and comma-separated rows with as many fields",
            found=[f"line {number}: {problem}" for number, problem in bad],
            where=[f"{path}:{number}" for number, _ in bad],
            do="correct these lines (a field with commas, quotes or newlines needs quotes)",
        )
    return rows


def _read_parquet(path: pathlib.Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise errors.UserError(
            expected="a parquet file",
            found=str(error).splitlines()[0],
            where=str(path),
            do="check that the file is complete",
        ) from error


def _read_txt(path: pathlib.Path) -> Rows:
    lines = io.StringIO(_read_text(path), newline="")  # ends at \n and \r only, and keeps them
    return [(number, {STREAM: line}) for number, line in enumerate(lines, start=1)]


_READERS: dict[str, Callable[[pathlib.Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _from_hub(source: str) -> "datasets.Dataset":
    import datasets
    import huggingface_hub

    front, _, split = source.partition("@")
    name, _, config = front.partition(":")
    split = split or "train"
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # else each retry of six is told, twice
    with hub.readable_errors(name, None, kind="dataset"):
        try:
            dataset = datasets.load_dataset(name, config or None, split=split)
        except datasets.exceptions.DatasetNotFoundError:
            # `datasets` drops the reason; the hub's client raises gated or missing.
            huggingface_hub.auth_check(name, repo_type="dataset")
            raise
        except ValueError as error:
            if type(error) is not ValueError:
                raise  # the hub's own
            raise errors.UserError(
                expected=f"the split {split} of the data set {name}",
                found=str(error).strip(),
                where=source,
                do="choose a config and one of its splits, as in owner/name:config@split",
            ) from error
    origin = [f"{source}:{n}" for n in range(1, len(dataset) + 1)]
    return dataset.add_column(ORIGIN, origin)


def _rename(
    dataset: "datasets.Dataset", columns: Mapping[str, str], source: str
) -> "datasets.Dataset":
    """Renames as asked, and drops fields of other kinds: what the user mapped decides the kind."""
    ours = [name for name in columns if name not in _FIELDS]
    theirs = [name for name in columns.values() if name not in dataset.column_names]
    if ours or theirs or len(set(columns.values())) < len(columns):
        raise errors.UserError(
            expected=f"FIELD=COLUMN with each FIELD among {', '.join(_FIELDS)} and each COLUMN "
            f"(once) among {', '.join(fields_of(dataset))}",
            found=[f"no field {name}" for name in ours] + [f"no column {name}" for name in theirs]
            or "a column used twice",
            where=source,
            do="correct --columns",
        )
    kinds = [kind for kind in (*KINDS, PREFERENCE) if set(kind) & set(columns)]
    keep = {"input", *(field for kind in kinds for field in kind)} - set(columns)
    drop = set(_FIELDS) - keep - set(columns.values())
    drop |= set(columns) - set(columns.values())  # a column whose name a renamed one takes over
    dataset = dataset.remove_columns([name for name in dataset.column_names if name in drop])
    # In two steps, so that {"prompt": "completion", "completion": "prompt"} works.
    dataset = dataset.rename_columns({theirs: f"_{ours}" for ours, theirs in columns.items()})
    return dataset.rename_columns({f"_{ours}": ours for ours in columns})


def fields_of(dataset: "datasets.Dataset") -> list[str]:
    """The names of the columns that came from the file."""
    return [name for name in dataset.column_names if name not in (ORIGIN, STREAM)]


def holdout(
    dataset: "datasets.Dataset", share: float, seed: int
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval): a seeded random `share` of the rows, at least one, goes to eval.

    Of a .txt file it is the end: its lines belong together.
    """
    num_eval = max(1, round(share * len(dataset)))
    if num_eval >= len(dataset):
        raise errors.UserError(
            expected="at least two rows (lines of a .txt file), to hold some out for evaluation",
            found=f"{len(dataset)} rows, of which {num_eval} would be held out",
            do="give more data, or an evaluation set of its own",
        )
    if STREAM in dataset.column_names:
        order = np.arange(len(dataset))
    else:
        order = np.random.default_rng(seed).permutation(len(dataset))
    train, evaluation = np.sort(order[:-num_eval]), np.sort(order[-num_eval:])
    return (
        dataset.select(train, keep_in_memory=True),
        dataset.select(evaluation, keep_in_memory=True),
    )


def fingerprint(*datasets: "datasets.Dataset") -> str:
    """16 hexadecimal digits that change with any field of any row or with the rows' order."""
    digest = hashlib.sha256()
    for row in itertools.chain(*datasets):
        row.pop(ORIGIN, None)
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
