"""Examples of token ids, as transformers' Trainer and TRL take them. Imports no jax."""

import typing
from collections.abc import Mapping

import numpy as np

KIND = ("input_ids",)
_IGNORED = -100
_MASKS = ("completion_mask", "assistant_masks")  # TRL's: 1 where a token is trained
BESIDE = ("labels", *_MASKS, "attention_mask")


def read(example: Mapping[str, typing.Any]) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [T], which of them are trained bool [T]), without the padding.

    Trained are those whose label is not -100 and whose masks are 1; all, without any of these.
    """
    ids = np.array(example["input_ids"], np.int32)
    trained = np.ones(len(ids), bool)
    if example.get("labels") is not None:
        trained &= np.array(example["labels"], np.int64) != _IGNORED
    for name in _MASKS:
        if example.get(name) is not None:
            trained &= np.array(example[name], bool)
    if example.get("attention_mask") is None:
        return ids, trained
    real = np.array(example["attention_mask"], bool)
    return ids[real], trained[real]


def problems(example: Mapping[str, typing.Any]) -> list[str]:
    """Why an example cannot be read."""
    ids = example["input_ids"]
    if not _are_whole(ids) or any(each < 0 or each >= 2**31 for each in ids):
        return ["input_ids is not a list of token ids"]
    found = []
    for name in BESIDE:
        if (given := example.get(name)) is None:
            continue
        if not _are_whole(given) or len(given) != len(ids):
            found.append(f"{name} is not a list of {len(ids)} whole numbers, one for each token")
        elif name == "labels":
            if any(label not in (_IGNORED, each) for label, each in zip(given, ids, strict=True)):
                found.append("labels has others than those of input_ids and -100")
        elif any(each not in (0, 1) for each in given):
            found.append(f"{name} has other values than 0 and 1")
    return found


def _are_whole(values: typing.Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, int) for each in values)
