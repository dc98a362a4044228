"""The columns of a source as fields of examples: renamed, or not used. Imports no jax."""

import functools
from collections.abc import Mapping

from lora_jax import errors
from lora_jax.data import rows
from lora_jax.data.examples import as_chats, kinds, preferences
from lora_jax.data.formats import files

_LOOKED_AT = 1000  # examples
_SHOWN = 8  # columns in one line


def rename_known(found: rows.Rows, columns: Mapping[str, str] | None, source: str) -> rows.Rows:
    """`rename` with those of `columns` that the rows have."""
    names = found.column_names
    known = {field: column for field, column in (columns or {}).items() if column in names}
    return rename(found, known, source) if known else found


def rename(found: rows.Rows, columns: Mapping[str, str], source: str) -> rows.Rows:
    """The rows with columns renamed as in {field: column}, without fields of other kinds: the
    mapped fields decide the kind.

    Raises: UserError if there is no such field or column.
    """
    names = found.column_names
    no_field = [name for name in columns if name not in kinds.NAMED]
    no_column = [name for name in columns.values() if name not in names]
    if no_field or no_column or len(set(columns.values())) < len(columns):
        raise errors.UserError(
            expected=f"FIELD=COLUMN with each FIELD among {', '.join(kinds.NAMED)} and each "
            f"COLUMN (once) among {', '.join(names_of(found))}",
            found=[f"no field {name}" for name in no_field]
            + [f"no column {name}" for name in no_column]
            or "a column used twice",
            where=source,
            do="correct --columns",
        )
    mapped = [kind for kind in (*kinds.KINDS, kinds.PREFERENCE) if set(kind) & set(columns)]
    keep = {*kinds.BESIDE, *columns.values(), *(field for kind in mapped for field in kind)}
    keep |= {"chosen", "rejected"}  # whatever their prompt is called
    if {"chosen", "rejected"} & set(columns):
        keep.update(kinds.PROMPTS)
    drop = set(kinds.FIELDS) - keep if mapped else set()
    drop |= set(columns) - set(columns.values())  # columns whose names renamed ones take over
    return found.rename(
        {column: field for field, column in columns.items()},
        drop=[name for name in names if name in drop],
    )


def names_of(found: rows.Rows) -> list[str]:
    """The names of the columns that came from the file."""
    return [name for name in found.column_names if name not in (kinds.ORIGIN, files.STREAM)]


def unused(found: rows.Rows, *, in_pairs: bool, as_chat: bool = False) -> str:
    """The columns that the first examples do not use; "" if there are none.

    as_chat: see as_chats.convert.
    """
    if files.STREAM in found.column_names:
        return ""
    used = preferences.used if in_pairs else kinds.used
    if as_chat:
        used = functools.partial(as_chats.used, in_pairs=in_pairs)
    present: dict[str, None] = {}
    taken: set[str] = set()
    for example in found.select(range(min(_LOOKED_AT, len(found)))):
        present |= dict.fromkeys(kinds.fields_present(example))
        taken |= used(example)
    names = [name for name in present if name not in taken]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
