"""Data sets of the hub, as `datasets` reads them. Imports no jax."""

import re
import typing
from collections.abc import Iterator

from lora_jax import errors, hub
from lora_jax.data import slices
from lora_jax.data.formats import arrow_files, records


def load(source: str, **how: bool) -> typing.Any:
    """The data set that `datasets` loads for a hub id. how: streaming."""
    import datasets
    import huggingface_hub

    front, _, split = slices.whole(source).partition("@")
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


def stream(source: str, start: records.Position) -> Iterator[records.Record]:
    """The examples of a data set from `start`, downloaded as they are consumed."""
    # As Arrow, to be converted as other tables are: `datasets` would decode images, too.
    examples, (state, before) = load(source, streaming=True).with_format("arrow"), start
    if before:
        examples.load_state_dict(state)
    with hub.readable_errors(_repository(source), None, kind="dataset"):
        for number, table in enumerate(examples, start=before + 1):
            (example,) = arrow_files.rows(table, source)
            yield records.Record(number, example, (examples.state_dict(), number), source)


def version(source: str) -> str:
    """The commit of a data set, which needs no reading."""
    import huggingface_hub

    name = _repository(source)
    with hub.readable_errors(name, None, kind="dataset"):
        return f"commit {huggingface_hub.HfApi().dataset_info(name).sha}"


def _repository(source: str) -> str:
    return re.split("[:@]", source)[0]
