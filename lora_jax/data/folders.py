"""The files that a local source names: a file, a folder, a pattern. Imports no jax.

In a folder the names of files and folders tell the splits, as in `datasets`: train.jsonl,
test/1.jsonl, train_sft-00000-of-00002.parquet. A folder that Dataset.save_to_disk wrote says itself
which files it has, and so may a README.md.
"""

import glob
import itertools
import json
import os
import pathlib
import re
import typing
from collections.abc import Sequence

from lora_jax import errors, hub
from lora_jax.data import dataset_card, slices
from lora_jax.data.formats import compression, files

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ENDS = re.compile(r"(?P<folder>.+?)(?::(?P<config>[^:@/]+))?(?:@(?P<split>[^:@/]+))?")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_IGNORED = re.compile(  # files that describe the data
    r"(readme|license|licence|notice|requirements|changelog)\b.*"
    r"|(config|dataset_infos?|dataset_dict|state)\.json",
    re.IGNORECASE,
)
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


class Found(typing.NamedTuple):
    """The files of a source in their order, and the names of their examples in messages.

    note: what a user should know about the choice; "" if there was none.
    """

    paths: Sequence[pathlib.Path]
    names: Sequence[str]
    note: str = ""


def find(source: str) -> Found | None:
    """The files of a local source; None for a hub id.

    A folder may be followed by `:config`, one of its README.md, and by `@split`; the default is the
    train split. A .zip of several files is read as the folder that it unpacks to. A file alone and
    those of a pattern are the train split, as in `datasets`.
    Raises: UserError if there is no such file, configuration or split, or a folder's files do not
    go together.
    """
    source = slices.whole(source)
    path, config, split = pathlib.Path(source).expanduser(), "", ""
    ends = _ENDS.fullmatch(source)
    outer = pathlib.Path(ends["folder"]).expanduser() if ends else path
    if ends and not path.exists() and (outer.is_dir() or compression.members(outer)):
        path, config, split = outer, ends["config"] or "", ends["split"] or ""
    elif ends and ends["split"] and not ends["config"] and _is_part_of_files(path, outer):
        if ends["split"] != "train":
            raise _no_split(outer, ends["split"], ["train"])
        path, source = outer, str(outer)
    if compression.members(path):
        if config:
            dataset_card.choose(path, config)  # raises: an archive has none
        return _folder(path, split)
    if path.is_file() or compression.is_member(path):
        return Found([path], [path.name])
    if path.is_dir():
        if not config and (saved := _saved(path, split)):
            return saved
        card = dataset_card.choose(path, config)
        return _of_card(path, card, split) if card else _folder(path, split)
    if glob.has_magic(source):
        if matching := sorted(glob.glob(str(path), recursive=True)):
            return _matching([pathlib.Path(each) for each in matching], path)
    elif not any(map(files.is_data, (path, outer))) and not hub.looks_like_path(source):
        return None
    raise errors.UserError(
        expected=f"a data file ({', '.join(files.FORMATS)}), a folder of them, or a hub id",
        found="no such file",
        where=str(path),
        do=_several(source) or "check the path",
    )


def _several(source: str) -> str:
    """What to do with names that are separated by commas; "" if they are none."""
    names = [name.strip() for name in source.split(",")]
    are_there = len(names) > 1 and all(pathlib.Path(each).expanduser().exists() for each in names)
    return f"separate them by spaces: {' '.join(names)}" if are_there else ""


def _is_part_of_files(path: pathlib.Path, outer: pathlib.Path) -> bool:
    """Whether what precedes @split is a file or a pattern, and not the @ a part of its name."""
    if path.exists() or glob.glob(str(path), recursive=True):
        return False
    return outer.is_file() or glob.has_magic(str(outer))


def _matching(paths: Sequence[pathlib.Path], pattern: pathlib.Path) -> Found:
    """The data files among those that match a pattern."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    folder = pathlib.Path(*fixed)
    kept = [path for path in paths if path.is_file() and _is_data(path.relative_to(folder))]
    if not kept:
        raise _none(str(pattern), paths)
    _refuse_copies(kept, str(pattern))
    return Found(kept, _named(kept, folder))


def _folder(folder: pathlib.Path, split: str) -> Found:
    """The data files anywhere in a folder; those of a split if their names tell splits.

    A .zip is as the folder in it that has all its files.
    """
    every, inner = compression.members(folder), folder
    if every:
        inner = pathlib.Path(os.path.commonpath([path.parent for path in every]))
        # Unlike x.jsonl.zip, one whose name does not say what is in it: it may hold any files.
        nested = [path for path in every if path.suffix.lower() == ".zip"
                  and not compression.name(path).suffix]  # fmt: skip
        if nested:
            raise errors.UserError(
                expected="a .zip of data files",
                found=[f"an archive in it: {path.relative_to(folder)}" for path in nested],
                where=str(folder),
                do="unpack it, and pass the folder or one of its files",
            )
    else:
        every = sorted(path for path in folder.rglob("*") if path.is_file())
    kept = [path for path in every if _is_data(path.relative_to(inner))]
    left: list[pathlib.Path] = []
    if len({files.form_of(path).family for path in kept}) > 1:  # texts beside the data
        left = [path for path in kept if files.form_of(path).family == "text"]
        kept = [path for path in kept if path not in left]
    if not kept:
        raise _none(str(folder), every)
    of = {path: _split_of(path.relative_to(inner)) for path in kept}
    splits = [*dict.fromkeys(of.values())]
    wanted = split or "train"
    if splits != [""]:
        # Without a train split, the files whose names tell none are to train on.
        chosen = "" if wanted == "train" and "train" not in splits and "" in splits else wanted
        if chosen not in splits:
            raise _no_split(folder, wanted, [name for name in splits if name])
        left += [path for path in kept if of[path] != chosen]
        kept = [path for path in kept if of[path] == chosen]
    elif wanted != "train":
        raise _no_split(folder, split, [])
    _refuse_copies(kept, str(folder))
    which = f"the {wanted} split of {folder}" if splits != [""] else str(folder)
    return Found(kept, _named(kept, inner), f"{which}; not read: {_some(left)}" if left else "")


def _of_card(folder: pathlib.Path, card: dataset_card.Config, split: str) -> Found:
    """The files of a split of a configuration that the README.md lists."""
    if not card.files:
        return _folder(folder / card.folder, split)
    wanted = split or "train"
    if wanted not in card.files:
        raise _no_split(folder, wanted, [*card.files])
    kept = {}
    for pattern in card.files[wanted]:
        matching = glob.glob(pattern, root_dir=folder, recursive=True)
        if not matching:
            raise errors.UserError(
                expected=f"the files of the configuration {card.name}",
                found=f"none that match {pattern}",
                where=str(folder),
                do=f"copy the whole folder, or correct {dataset_card.NAME}",
            )
        kept |= dict.fromkeys(folder / name for name in sorted(matching))
    found = _matching([*kept], folder)
    note = f"the {wanted} split of {folder}, of {', '.join(card.files)}"
    return found._replace(note=note if len(card.files) > 1 else "")


def _saved(folder: pathlib.Path, split: str) -> Found | None:
    """The files of a folder that save_to_disk wrote; None for another."""
    note = ""
    if (folder / _SAVED_SPLITS).is_file():
        splits = _json(folder / _SAVED_SPLITS)["splits"]
        wanted = split or "train"
        if wanted not in splits:
            raise _no_split(folder, wanted, splits)
        if not split and len(splits) > 1:
            note = f"the {wanted} split of {folder}, of {', '.join(splits)}"
        folder = folder / wanted
    elif not (folder / _SAVED).is_file() or not (folder / "dataset_info.json").is_file():
        return None
    elif split not in ("", "train"):
        raise _no_split(folder, split, [])
    paths = [folder / each["filename"] for each in _json(folder / _SAVED)["_data_files"]]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise errors.UserError(
            expected=f"the files that {_SAVED} lists",
            found=[f"no {path}" for path in missing],
            where=str(folder),
            do="copy the whole folder",
        )
    return Found(paths, _named(paths, folder), note)


def _json(path: pathlib.Path) -> typing.Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise errors.UserError(
            expected="JSON, as save_to_disk writes it",
            found=str(error),
            where=str(path),
            do="copy the whole folder",
        ) from error


def _is_data(path: pathlib.PurePath) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return files.is_data(path) and not hidden and not _IGNORED.fullmatch(path.name)


def _split_of(path: pathlib.PurePath) -> str:
    """The split that the name of a file, or of a folder that it is in, tells; "" if none."""
    if shard := _SHARD.match(path.name):
        return shard[1]
    for part in (*path.parent.parts, str(compression.name(pathlib.Path(path)).with_suffix(""))):
        words = re.split(r"[-._ 0-9]+", part.lower())
        for split, keywords in _SPLITS.items():
            if any(word in keywords for word in words):
                return split
    return ""


def _refuse_copies(paths: Sequence[pathlib.Path], where: str) -> None:
    """Raises: UserError if files are of several kinds, or one is a compressed copy of another."""
    families = {files.form_of(path).family: path.name for path in paths}
    plain = {str(path.parent / compression.name(path)): path.name for path in paths}
    if len(families) > 1 or len(plain) < len(paths):
        raise errors.UserError(
            expected="data files of one kind, none of them a copy of another",
            found=", ".join(path.name for path in paths[:20]),
            where=where,
            do="choose them with a pattern, such as '*.jsonl'",
        )


def _named(paths: Sequence[pathlib.Path], folder: pathlib.Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def _some(paths: Sequence[pathlib.Path], most: int = 5) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(path.name for path in paths[:most]) + more


def _none(where: str, found: Sequence[pathlib.Path]) -> errors.UserError:
    names = _some(found)
    return errors.UserError(
        expected=f"data files ({', '.join(files.FORMATS)})",
        found=f"a folder without any; it has {names}" if names else "a folder without files",
        where=where,
        do="check the path",
    )


def _no_split(folder: pathlib.Path, split: str, splits: Sequence[str]) -> errors.UserError:
    like = (each for each in splits if split in each)  # such as train_sft
    return errors.UserError(
        expected=f"the split {split}",
        found=f"the splits {', '.join(splits)}" if splits else "no files whose names tell a split",
        where=str(folder),
        do=f"choose one, as in {folder}@{next(like, splits[0])}" if splits else "leave @… out",
    )
