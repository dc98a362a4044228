"""Files or hub data sets → rows of fields. Imports no jax.

A row is one of four kinds, the first whose fields are all present (see KINDS), or a preference.
"""

import hashlib
import itertools
import json
import pathlib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from lora_jax import errors, hub
from lora_jax.data import files

if typing.TYPE_CHECKING:
    import datasets

KINDS = (
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text",),
)
HEAD = 1000  # rows of a stream that are looked at before it is read
PREFERENCE = ("prompt", "chosen", "rejected")
_FIELDS = ("messages", "prompt", "completion", "instruction", "input", "output", "text",
           "chosen", "rejected")  # fmt: skip
# Where a row comes from ("train.jsonl:17"), for messages; no part of the content.
ORIGIN = "_origin"


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
    path = _local(source)
    if path is None:
        dataset = _from_hub(source)
        dataset = dataset.add_column(ORIGIN, _origins(source, range(1, len(dataset) + 1)))
    else:
        dataset = _table(list(files.rows(path)), source)
    if len(dataset) == 0:
        raise _empty(source)
    return _rename(dataset, columns, source) if columns else dataset


def load_all(
    sources: Sequence[str],
    columns: Mapping[str, str] | None = None,
    counts: Sequence[int | None] = (),
) -> "list[datasets.Dataset]":
    """As `load`, of each; of several, each is renamed by those of `columns` that it has.

    counts: how many rows of each are read, its first ones; None: all.
    """
    loaded = [
        load(source) if count is None else _head(source, count)
        for source, count in zip(sources, counts or [None] * len(sources), strict=True)
    ]
    nowhere = [
        f"no column {theirs}"
        for theirs in (columns or {}).values()
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
    pairs = zip(loaded, sources, strict=True)
    return [_rename_known(dataset, columns, source) for dataset, source in pairs]


def _head(source: str, count: int) -> "datasets.Dataset":
    found = [*itertools.islice(stream(source), count)]
    if not found:
        raise _empty(source)
    return _table(found, source)


def stream(source: str, start: files.Position = files.START) -> Iterator[files.Found]:
    """The rows of a file or of a hub data set from `start` on, as they are asked for."""
    path = _local(source)
    if path is None:
        return _stream_from_hub(source, start)
    if files.is_array(path):
        raise errors.UserError(
            expected="a file that can be read row by row",
            found="a JSON array, which can be read whole only",
            where=source,
            do="make it a .jsonl file, e.g. jq -c '.[]' in.json > out.jsonl",
        )
    return files.rows(path, start)


def table(
    found: Sequence[files.Found], columns: Mapping[str, str] | None, source: str
) -> "datasets.Dataset":
    """Some rows that `stream` gave, renamed by those of `columns` that they have."""
    return _rename_known(_table(found, source), columns, source)


def _local(source: str) -> pathlib.Path | None:
    """The path of a file, or None for what is of the hub. Raises: UserError without the file."""
    path = pathlib.Path(source).expanduser()
    if path.is_file():
        return path
    if path.suffix in files.FORMATS or hub.looks_like_path(source) or path.is_dir():
        raise errors.UserError(
            expected=f"a data file ({', '.join(files.FORMATS)}) or a hub id",
            found="a folder" if path.is_dir() else "no such file",
            where=str(path),
            do="check the path",
        )
    return None


def _empty(source: str) -> errors.UserError:
    return errors.UserError(
        expected="at least one row", found="an empty file", where=source, do="check the file"
    )


def _origins(source: str, numbers: Iterable[int]) -> list[str]:
    name = pathlib.Path(source).name if _local(source) else source
    return [f"{name}:{number}" for number in numbers]


def _table(found: Sequence[files.Found], source: str) -> "datasets.Dataset":
    """All rows in one table, in memory, without the cache of `datasets`: two runs at once cannot
    collide. A row has the fields of all, null where it has none."""
    import datasets
    import pyarrow

    if bad := [each for each in found if isinstance(each.row, str)]:
        files.refuse(pathlib.Path(source), bad)
    names = dict.fromkeys(name for _, row, _ in found for name in row)
    columns = {name: [row.get(name) for _, row, _ in found] for name in names}
    origins = _origins(source, (number for number, _, _ in found))
    try:
        return datasets.Dataset.from_dict({**columns, ORIGIN: origins})
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise errors.UserError(
            expected="values of one type in each column",
            found=str(error).splitlines()[0],
            where=source,
            do="make the types equal, e.g. write numbers as strings in every row",
        ) from error


def _from_hub(source: str, **how: bool) -> typing.Any:
    """What `datasets` makes of a hub id. how: streaming."""
    import datasets
    import huggingface_hub

    front, _, split = source.partition("@")
    name, _, config = front.partition(":")
    split = split or "train"
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # else each retry of six is told, twice
    with hub.readable_errors(name, None, kind="dataset"):
        try:
            return datasets.load_dataset(name, config or None, split=split, **how)
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


def _stream_from_hub(source: str, start: files.Position) -> Iterator[files.Found]:
    rows, (state, before) = _from_hub(source, streaming=True), start
    if before:
        rows.load_state_dict(state)
    with hub.readable_errors(_repository(source), None, kind="dataset"):
        for number, row in enumerate(rows, start=before + 1):
            yield files.Found(number, row, (rows.state_dict(), number))


def _repository(source: str) -> str:
    return re.split("[:@]", source)[0]


def _rename_known(
    dataset: "datasets.Dataset", columns: Mapping[str, str] | None, source: str
) -> "datasets.Dataset":
    names = dataset.column_names
    own = {ours: theirs for ours, theirs in (columns or {}).items() if theirs in names}
    return _rename(dataset, own, source) if own else dataset


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
    return [name for name in dataset.column_names if name not in (ORIGIN, files.STREAM)]


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
    if files.STREAM in dataset.column_names:
        order = np.arange(len(dataset))
    else:
        order = np.random.default_rng(seed).permutation(len(dataset))
    train, evaluation = np.sort(order[:-num_eval]), np.sort(order[-num_eval:])
    return (
        dataset.select(train, keep_in_memory=True),
        dataset.select(evaluation, keep_in_memory=True),
    )


def version(source: str) -> str:
    """What changes with a stream that need not be read for it: a file's size, the hub's commit."""
    if path := _local(source):
        return f"{path.stat().st_size} bytes"
    import huggingface_hub

    name = _repository(source)
    with hub.readable_errors(name, None, kind="dataset"):
        return f"commit {huggingface_hub.HfApi().dataset_info(name).sha}"


def fingerprint(*datasets: "datasets.Dataset") -> str:
    """16 hexadecimal digits that change with any field of any row or with the rows' order."""
    digest = hashlib.sha256()
    for row in itertools.chain(*datasets):
        row.pop(ORIGIN, None)
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
