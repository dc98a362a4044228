"""Files or hub data sets → rows of token ids with loss masks. Imports no jax.

A row is one of four kinds, the first whose fields are all present (see KINDS):
  messages                        a chat; the loss is on the assistant's turns
  prompt, completion              joined as they stand; the loss is on completion + EOS
  instruction, [input,] output    Alpaca's template; the loss is on output + EOS
  text                            the loss is on everything, EOS included
Preferences (see encode_pairs) have prompt, chosen and rejected: texts, or lists of messages.
A .txt file is one stream of tokens, cut into blocks of seq_len.
"""

import csv
import hashlib
import io
import json
import pathlib
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from lora_jax import errors, hub
from lora_jax import tokenizer as tokenizing

if typing.TYPE_CHECKING:
    import datasets
    import transformers

IGNORED = -100  # label of a token that is not trained, as in torch and Hugging Face
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
_ORIGIN = "_origin"
# A line of a .txt file.
_STREAM = "_stream"

# https://github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)


Row = tuple[np.ndarray, np.ndarray]  # ids int32 [T], which of them are trained bool [T]


class Encoded(typing.NamedTuple):
    """Rows of at most seq_len tokens, what they had before, and where each is from.

    num_cut, num_skipped: how many rows were cut, and how many had nothing to train on.
    """

    rows: list[Row]
    lengths: list[int]
    origins: list[str]
    num_cut: int
    num_skipped: int


# ---------------------------------------------------------------------------------- reading


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
            {**table, _ORIGIN: [f"{path.name}:{number}" for number, _ in rows]}
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
    return [(number, {_STREAM: line}) for number, line in enumerate(lines, start=1)]


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
    return dataset.add_column(_ORIGIN, origin)


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
    return [name for name in dataset.column_names if name not in (_ORIGIN, _STREAM)]


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
    if _STREAM in dataset.column_names:
        order = np.arange(len(dataset))
    else:
        order = np.random.default_rng(seed).permutation(len(dataset))
    train, evaluation = np.sort(order[:-num_eval]), np.sort(order[-num_eval:])
    return (
        dataset.select(train, keep_in_memory=True),
        dataset.select(evaluation, keep_in_memory=True),
    )


def fingerprint(dataset: "datasets.Dataset") -> str:
    """16 hexadecimal digits that change with any field of any row or with the rows' order."""
    digest = hashlib.sha256()
    for row in dataset:
        row.pop(_ORIGIN, None)
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------- encoding


def encode(
    dataset: "datasets.Dataset",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    seq_len: int,
    eos: int,
) -> Encoded:
    """Token ids and loss masks of all rows, cut at seq_len, in the dataset's order.

    A row without a trained token after its first position (nothing to predict) is skipped.

    Raises:
      errors.UserError: a row lacks fields, a chat cannot be masked, or no row remains.
    """
    if _STREAM in dataset.column_names:
        rows = _blocks("".join(dataset[_STREAM]), tokenizer, seq_len)
        origins = [f"block {number}" for number in range(1, len(rows) + 1)]
    else:
        rows = _encode_rows(dataset, tokenizer, eos)
        origins = [_origin(row) for row in dataset]
    return _cut(rows, origins, seq_len, together=1)


def encode_pairs(
    dataset: "datasets.Dataset",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    seq_len: int,
    eos: int,
) -> Encoded:
    """As `encode`, of prompts with a chosen and a rejected answer: two rows each, in this order.

    The three are texts, or lists of messages that are joined. A pair of which one row has nothing
    to train is skipped, and counts as one.

    Raises:
      errors.UserError: a row lacks fields, a chat cannot be masked, or no pair remains.
    """
    rows, origins, found, where = [], [], [], []
    for row in dataset:
        parts = [row.get(field) for field in PREFERENCE]
        if all(isinstance(part, str) for part in parts):
            pair = [{"prompt": parts[0], "completion": answer} for answer in parts[1:]]
        elif all(isinstance(part, list) for part in parts):
            pair = [{"messages": parts[0] + answer} for answer in parts[1:]]
        else:
            found.append(", ".join(_present(row)) or "(nothing)")
            where.append(_origin(row))
            continue
        rows += [made | {_ORIGIN: _origin(row)} for made in pair]
        origins += [_origin(row)] * 2
    if found:
        raise errors.UserError(
            expected=f"in each row {', '.join(PREFERENCE)}, all texts or all lists of messages",
            found=[f"the fields {fields}" for fields in found],
            where=where,
            do="correct these rows, or map their fields, e.g. --columns chosen=better",
        )
    return _cut(_encode_rows(rows, tokenizer, eos), origins, seq_len, together=2)


def _cut(rows: Sequence[Row], origins: list[str], seq_len: int, *, together: int) -> Encoded:
    """Rows cut at seq_len, without groups of so many of which one has nothing left to train."""
    groups = [range(n, n + together) for n in range(0, len(rows), together)]
    whole = [group for group in groups if all(rows[n][1][1:seq_len].any() for n in group)]
    if not whole:
        raise errors.UserError(
            expected="at least one row with a token to train on",
            found=f"none in {len(rows)} rows of at most {seq_len} tokens",
            where=origins[0] if origins else None,
            do="raise --seq-len if the prompts fill it, or check the completions",
        )
    kept = [n for group in whole for n in group]
    return Encoded(
        rows=[tuple(array[:seq_len] for array in rows[n]) for n in kept],
        lengths=[len(rows[n][0]) for n in kept],
        origins=[origins[n] for n in kept],
        num_cut=sum(len(ids) > seq_len for ids, _ in rows),
        num_skipped=len(groups) - len(whole),
    )


def prompts(
    dataset: "datasets.Dataset", tokenizer: "transformers.PreTrainedTokenizerBase"
) -> list[tuple[np.ndarray, str]]:
    """(prompt ids int32 [T], expected completion) of each row, for exact-match evaluation.

    For rows with prompt/completion or instruction/output; the ids are those that training saw.
    """
    kinds = _kinds(dataset)
    if wrong := [
        row for row, kind in zip(dataset, kinds, strict=True) if kind in (("text",), ("messages",))
    ]:
        raise errors.UserError(
            expected="rows with prompt and completion, or instruction and output",
            found=[", ".join(_present(row)) for row in wrong],
            where=[_origin(row) for row in wrong],
            do="exact match needs a prompt and an expected answer: map them with --columns",
        )
    pairs = [_pair(row, kind) for row, kind in zip(dataset, kinds, strict=True)]
    ids = tokenizing.encode(tokenizer, [prompt for prompt, _ in pairs])
    return [
        (np.array(i, np.int32), completion) for i, (_, completion) in zip(ids, pairs, strict=True)
    ]


def _row(ids: Iterable, trained: Iterable) -> Row:
    return np.array(ids, np.int32), np.array(trained, bool)


def _blocks(
    text: str, tokenizer: "transformers.PreTrainedTokenizerBase", seq_len: int
) -> list[Row]:
    (ids,) = tokenizing.encode(tokenizer, [text])
    blocks = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    return [_row(block, [True] * len(block)) for block in blocks if len(block) > 1]


def _encode_rows(
    dataset: "datasets.Dataset | list[dict]",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    eos: int,
) -> list[Row]:
    kinds = _kinds(dataset)
    rows: list[Row | None] = [None] * len(dataset)
    if ("messages",) in kinds and not tokenizer.chat_template:
        raise errors.UserError(
            expected="a tokenizer with a chat template, to render the rows' messages",
            found="none",
            where=str(tokenizer.name_or_path),
            do="start from the chat variant of the model, or use prompt and completion instead",
        )
    pairs, texts, problems = {}, {}, {}
    for n, (row, kind) in enumerate(zip(dataset, kinds, strict=True)):
        if kind == ("messages",):
            try:
                rows[n] = _chat(row["messages"], tokenizer)
            except _ChatError as error:
                problems[_origin(row)] = str(error)
        elif kind == ("text",):
            texts[n] = row["text"]
        else:
            pairs[n] = _pair(row, kind)
    if problems:
        raise errors.UserError(
            expected="chats that the tokenizer's chat template renders turn by turn",
            found=list(problems.values()),
            where=list(problems),
            do="correct these rows or the template, or use prompt and completion instead",
        )
    for n, ids in zip(texts, tokenizing.encode(tokenizer, list(texts.values())), strict=True):
        rows[n] = _row([*ids, eos], [True] * (len(ids) + 1))
    before = tokenizing.encode(tokenizer, [prompt for prompt, _ in pairs.values()])
    whole = tokenizing.encode(tokenizer, [prompt + answer for prompt, answer in pairs.values()])
    for (n, (_, answer)), prompt_ids, ids in zip(pairs.items(), before, whole, strict=True):
        # Generation starts from prompt_ids, so they must be what training saw, token by token.
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + _continuation(answer, tokenizer)
        trained = len(ids) - len(prompt_ids) + 1
        rows[n] = _row([*ids, eos], [False] * len(prompt_ids) + [True] * trained)
    return typing.cast(list[Row], rows)


def _continuation(text: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """Ids of `text` as it follows other text: without the space that LLaMA's SentencePiece puts in
    front of every text. It is encoded behind a character that does not merge with it."""
    for anchor in ("\n", "=", "a"):
        front, ids = tokenizer([anchor, anchor + text], add_special_tokens=False).input_ids
        if ids[: len(front)] == front:
            return ids[len(front) :]
    return tokenizer(text, add_special_tokens=False).input_ids


class _ChatError(Exception):
    """What is wrong with one chat."""


def _chat(messages: object, tokenizer: "transformers.PreTrainedTokenizerBase") -> Row:
    """Ids of a chat; trained are the assistant's turns, with what the template ends them with."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content") is not None
        for m in messages
    ):
        raise _ChatError("messages is not a list of {role, content}")
    # Arrow gives every message the fields of all; templates test whether a field exists.
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]

    def render(upto: int, **options: object) -> typing.Any:
        import jinja2

        try:
            return tokenizer.apply_chat_template(
                messages[:upto], tokenize=True, return_dict=True, verbose=False, **options
            )
        except jinja2.TemplateError as error:
            raise _ChatError(f"the chat template refuses it: {error}") from error

    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        rendered = render(len(messages), return_assistant_tokens_mask=True)
        return _row(rendered["input_ids"], rendered["assistant_masks"])

    ids = render(len(messages))["input_ids"]
    trained = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(i, add_generation_prompt=True)["input_ids"]
            after = render(i + 1)["input_ids"]
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise _ChatError(f"turn {i + 1} changes the tokens of the turns before it")
            trained[len(before) : len(after)] = True
    return _row(ids, trained)


def _pair(row: dict, kind: tuple[str, ...]) -> tuple[str, str]:
    """(prompt, completion) of a row that is not a text and not a chat."""
    if kind == ("prompt", "completion"):
        return row["prompt"], row["completion"]
    template = ALPACA_INPUT if row.get("input") else ALPACA_NO_INPUT
    return template.format_map(row), row["output"]


def _kinds(dataset: "datasets.Dataset | list[dict]") -> list[tuple[str, ...]]:
    """The kind of each row; one error for all rows that have none or hold no text."""
    kinds, found, where = [], [], []
    for row in dataset:
        present = _present(row)
        kind = next((kind for kind in KINDS if set(kind) <= set(present)), ())
        kinds.append(kind)
        wrong = [f for f in kind if f != "messages" and not isinstance(row[f], str)]
        if not kind or wrong:
            found.append(
                ", ".join(f"{f} is a {type(row[f]).__name__}" for f in wrong)
                or f"only the fields {', '.join(present) or '(none)'}"
            )
            where.append(_origin(row))
    if found:
        raise errors.UserError(
            expected="in each row the texts of " + ", or ".join(" + ".join(k) for k in KINDS),
            found=found,
            where=where,
            do="train on preferences with --dpo"
            if all("chosen, rejected" in fields for fields in found)
            else "correct these rows, or map their fields, e.g. --columns "
            "prompt=question,completion=answer",
        )
    return kinds


def _present(row: dict) -> list[str]:
    return [name for name, value in row.items() if value is not None and name != _ORIGIN]


def _origin(row: dict) -> str:
    return row.get(_ORIGIN, "a row built in memory")
