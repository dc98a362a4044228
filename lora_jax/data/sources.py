"""Files or hub data sets → examples of fields. Imports no jax."""

import hashlib
import itertools
import json
import pathlib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from lora_jax import errors, hub
from lora_jax.data import files, kinds

if typing.TYPE_CHECKING:
    import datasets

HEAD = 1000  # examples of a stream that are read and checked in advance


def load(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
) -> "datasets.Dataset":
    """The examples of a local file (.jsonl, .json, .csv, .parquet, .txt) or of a hub data set.

    Args:
      source: a path, or a hub id `owner/name`, followed by `:config` if it has configs, and by
        `@split` for another split than train.
      columns: {field: column of the file}, e.g. {"prompt": "question"}.

    Raises:
      errors.UserError: the source is missing, empty or malformed (with all bad lines), a column is
        unknown, …
    """
    path = _local(source)
    if path is None:
        dataset = _from_hub(source)
        dataset = dataset.add_column(kinds.ORIGIN, _origins(source, range(1, len(dataset) + 1)))
    else:
        dataset = _table(list(files.read(path)), source)
    if len(dataset) == 0:
        raise _empty(source)
    return _rename(dataset, columns, source) if columns else dataset


def load_all(
    sources: Sequence[str],
    columns: Mapping[str, str] | None = None,
    counts: Sequence[int | None] = (),
) -> "list[datasets.Dataset]":
    """`load` for each source; in each, those of `columns` that it has are renamed.

    counts: how many examples of each are read, from its start; None: all.
    """
    loaded = [
        load(source) if count is None else _head(source, count)
        for source, count in zip(sources, counts or [None] * len(sources), strict=True)
    ]
    nowhere = [
        f"no column {column}"
        for column in (columns or {}).values()
        if not any(column in dataset.column_names for dataset in loaded)
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
    records = [*itertools.islice(stream(source), count)]
    if not records:
        raise _empty(source)
    return _table(records, source)


def stream(source: str, start: files.Position = files.START) -> Iterator[files.Record]:
    """The examples of a file or of a hub data set from `start`, read as they are consumed."""
    path = _local(source)
    if path is None:
        return _stream_from_hub(source, start)
    if files.is_array(path):
        raise errors.UserError(
            expected="a file that can be read example by example",
            found="a JSON array, which can only be read whole",
            where=source,
            do="convert it to a .jsonl file, e.g. jq -c '.[]' in.json > out.jsonl",
        )
    return files.read(path, start)


def table(
    records: Sequence[files.Record], columns: Mapping[str, str] | None, source: str
) -> "datasets.Dataset":
    """Examples from `stream` as one data set; those of `columns` that it has are renamed."""
    return _rename_known(_table(records, source), columns, source)


def _local(source: str) -> pathlib.Path | None:
    """The path of a file; None for a hub id. Raises: UserError if the file does not exist."""
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
        expected="at least one example", found="an empty file", where=source, do="check the file"
    )


def _origins(source: str, numbers: Iterable[int]) -> list[str]:
    name = pathlib.Path(source).name if _local(source) else source
    return [f"{name}:{number}" for number in numbers]


def _table(records: Sequence[files.Record], source: str) -> "datasets.Dataset":
    """All examples in one table in memory, without the cache of `datasets`, so that two runs cannot
    collide. Every example has the fields of all, null where it lacks one."""
    import datasets
    import pyarrow

    if bad := [record for record in records if isinstance(record.example, str)]:
        files.refuse(pathlib.Path(source), bad)
    names = dict.fromkeys(name for _, example, _ in records for name in example)
    columns = {name: [example.get(name) for _, example, _ in records] for name in names}
    origins = _origins(source, (number for number, _, _ in records))
    try:
        return datasets.Dataset.from_dict({**columns, kinds.ORIGIN: origins})
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise errors.UserError(
            expected="values of one type in each column",
            found=str(error).splitlines()[0],
            where=source,
            do="make the types equal, e.g. write numbers as strings in every example",
        ) from error


def _from_hub(source: str, **how: bool) -> typing.Any:
    """The data set that `datasets` loads for a hub id. how: streaming."""
    import datasets
    import huggingface_hub

    front, _, split = source.partition("@")
    name, _, config = front.partition(":")
    split = split or "train"
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # otherwise it reports each of six retries twice
    with hub.readable_errors(name, None, kind="dataset"):
        try:
            return datasets.load_dataset(name, config or None, split=split, **how)
        except datasets.exceptions.DatasetNotFoundError:
            # `datasets` drops the reason; the hub's client raises gated or missing.
            huggingface_hub.auth_check(name, repo_type="dataset")
            raise
        except ValueError as error:
            if type(error) is not ValueError:
                raise  # an error of the hub's client
            raise errors.UserError(
                expected=f"the split {split} of the data set {name}",
                found=str(error).strip(),
                where=source,
                do="choose a config and one of its splits, as in owner/name:config@split",
            ) from error


def _stream_from_hub(source: str, start: files.Position) -> Iterator[files.Record]:
    examples, (state, before) = _from_hub(source, streaming=True), start
    if before:
        examples.load_state_dict(state)
    with hub.readable_errors(_repository(source), None, kind="dataset"):
        for number, example in enumerate(examples, start=before + 1):
            yield files.Record(number, example, (examples.state_dict(), number))


def _repository(source: str) -> str:
    return re.split("[:@]", source)[0]


def _rename_known(
    dataset: "datasets.Dataset", columns: Mapping[str, str] | None, source: str
) -> "datasets.Dataset":
    names = dataset.column_names
    known = {field: column for field, column in (columns or {}).items() if column in names}
    return _rename(dataset, known, source) if known else dataset


def _rename(
    dataset: "datasets.Dataset", columns: Mapping[str, str], source: str
) -> "datasets.Dataset":
    """Renames columns to fields, and drops fields of other kinds: the mapped fields decide the
    kind."""
    no_field = [name for name in columns if name not in kinds.FIELDS]
    no_column = [name for name in columns.values() if name not in dataset.column_names]
    if no_field or no_column or len(set(columns.values())) < len(columns):
        raise errors.UserError(
            expected=f"FIELD=COLUMN with each FIELD among {', '.join(kinds.FIELDS)} and each "
            f"COLUMN (once) among {', '.join(fields_of(dataset))}",
            found=[f"no field {name}" for name in no_field]
            + [f"no column {name}" for name in no_column]
            or "a column used twice",
            where=source,
            do="correct --columns",
        )
    mapped = [kind for kind in (*kinds.KINDS, kinds.PREFERENCE) if set(kind) & set(columns)]
    keep = {"input", *(field for kind in mapped for field in kind)} - set(columns)
    drop = set(kinds.FIELDS) - keep - set(columns.values())
    drop |= set(columns) - set(columns.values())  # columns whose names renamed ones take over
    dataset = dataset.remove_columns([name for name in dataset.column_names if name in drop])
    # In two steps, so that {"prompt": "completion", "completion": "prompt"} works.
    dataset = dataset.rename_columns({column: f"_{field}" for field, column in columns.items()})
    return dataset.rename_columns({f"_{field}": field for field in columns})


def fields_of(dataset: "datasets.Dataset") -> list[str]:
    """The names of the columns that came from the file."""
    return [name for name in dataset.column_names if name not in (kinds.ORIGIN, files.STREAM)]


def holdout(
    dataset: "datasets.Dataset", share: float, seed: int
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval): a seeded random `share` of the examples, at least one, goes to eval.

    For a .txt file it is the end of the file, because its lines belong together.
    """
    num_eval = max(1, round(share * len(dataset)))
    if num_eval >= len(dataset):
        raise errors.UserError(
            expected="at least two examples (lines of a .txt file), to hold out some of them",
            found=f"{len(dataset)} examples, of which {num_eval} would be held out",
            do="add data, or pass a separate evaluation set",
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
    """A version of a stream that needs no reading: a file's size, or the hub's commit."""
    if path := _local(source):
        return f"{path.stat().st_size} bytes"
    import huggingface_hub

    name = _repository(source)
    with hub.readable_errors(name, None, kind="dataset"):
        return f"commit {huggingface_hub.HfApi().dataset_info(name).sha}"


def fingerprint(*datasets: "datasets.Dataset") -> str:
    """16 hexadecimal digits that depend on every field of every example and on their order."""
    digest = hashlib.sha256()
    for example in itertools.chain(*datasets):
        example.pop(kinds.ORIGIN, None)
        digest.update(json.dumps(example, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
