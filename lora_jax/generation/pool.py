"""Adapters by name for one model, and which of them are in the slots of its bank."""

import dataclasses
import pathlib
import threading
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import peft
from lora_jax.lora.nnx import bank, banked

MOST_ADAPTERS = 256
MOST_BYTES = 8 << 30  # of main memory
_MOST_WEIGHT = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, eq=False)
class Lease:
    """The adapters of one request, which stay in the bank until it is released.

    row: the weight of each slot [X]. key: equal for two leases if the same prompt has the same keys
    and values under both; it has the digests of the adapters, not their names.
    """

    row: np.ndarray
    key: Hashable
    digests: tuple[str, ...]


@dataclasses.dataclass
class _Resident:
    """An adapter in the bank: its slots, and how many leases have it."""

    slots: tuple[int, ...]
    num_leases: int = 0


class Pool:
    """Adapters by name, of which as many as fit are on the device, and the others on the host.

    `load` and `unload` may be called from any thread. `acquire` and `release` belong to the thread
    that runs the model: `acquire` may write to the bank, which reuses the memory of `state`. A step
    that was dispatched before sees the bank as it was.

    An adapter is known by its content. One that is replaced or unloaded while a request has it
    stays in its slots until the last such request has ended.

    state: the arrays of the bank, the part BankParam of the model's state, for nnx.merge.
    """

    def __init__(
        self,
        model: nnx.Module,
        *,
        most_adapters: int = MOST_ADAPTERS,
        most_bytes: int = MOST_BYTES,
    ):
        """model: with a bank, see lora.nnx.bank.add. most_…: what `load` accepts in total."""
        self._model = model
        self._bank = banked.Bank(model)
        self._most_adapters, self._most_bytes = most_adapters, most_bytes
        self._named: dict[str, banked.Contents] = {}
        self._sources: dict[str, str] = {}
        self._resident: dict[str, _Resident] = {}  # by digest, the least recently used first
        self._free = list(range(self._bank.slots))
        self._lock = threading.RLock()
        self._write = bank.writer(bank.state(model))
        self.state: dict[str, Any] = bank.state(model)
        self._put(self._bank.empty(), 0)  # compiles it, before the first request

    @property
    def num_slots(self) -> int:
        """X, the length of Lease.row."""
        return self._bank.slots

    def load(
        self,
        name: str,
        adapter: lora_adapter.Adapter | pathlib.Path | str,
        *,
        replace: bool = False,
        where: str = "the adapter",
    ) -> None:
        """Makes the adapter, or the one in that folder, available as `name`.

        replace: in place of one that has the name already. where: the folder of an adapter that was
        read before.
        Raises: UserError with every reason why it cannot be used; nothing has changed then.
        """
        self._check_name(name, replace)
        if not isinstance(adapter, lora_adapter.Adapter):
            where, adapter = str(adapter), _read(pathlib.Path(adapter).expanduser())
        contents = self._bank.contents(adapter, where)
        with self._lock:
            self._check_name(name, replace)  # others may have loaded one meanwhile
            self._check_room(name, contents, where)
            before = self._named.get(name)
            self._named[name], self._sources[name] = contents, where
            self._drop(before)

    def unload(self, name: str) -> None:
        """Raises: UserError if there is no such adapter."""
        with self._lock:
            self._check_known([name])
            contents = self._named.pop(name)
            del self._sources[name]
            self._drop(contents)

    def names(self) -> list[str]:
        """The names that can be used, in the order in which they were loaded."""
        with self._lock:
            return list(self._named)

    def source(self, name: str) -> str:
        """The folder of the adapter. Raises: UserError if there is no such adapter."""
        with self._lock:
            self._check_known([name])
            return self._sources[name]

    def digest(self, name: str) -> str:
        """Of the adapter's content on this base. Raises: UserError if there is no such adapter."""
        with self._lock:
            self._check_known([name])
            return self._named[name].digest

    def leased(self) -> list[str]:
        """The names of the adapters that requests have now."""
        with self._lock:
            used = {digest for digest, own in self._resident.items() if own.num_leases}
            return [name for name, contents in self._named.items() if contents.digest in used]

    def check(self, weights: Mapping[str, float]) -> None:
        """Raises: UserError if `acquire` could never succeed."""
        with self._lock:
            self._weighted(weights)

    def acquire(self, weights: Mapping[str, float]) -> Lease | None:
        """The adapters with these weights, in the bank; None if other leases leave no room now.

        Raises: UserError as `check`.
        """
        with self._lock:
            wanted = self._weighted(weights)
            contents = {own.digest: own for own in self._named.values() if own.digest in wanted}
            if not self._make_room(contents):
                return None
            row = np.zeros(self.num_slots, np.float32)
            for digest, weight in wanted.items():
                own = self._resident.pop(digest, None) or self._place(contents[digest])
                self._resident[digest] = own  # the most recently used is the last
                own.num_leases += 1
                row[list(own.slots)] = weight
            return Lease(row, tuple(sorted(wanted.items())), tuple(wanted))

    def release(self, lease: Lease) -> None:
        """Call it once for each lease, when its request has ended."""
        with self._lock:
            for digest in lease.digests:
                self._resident[digest].num_leases -= 1
                self._drop_unused(digest)

    def _weighted(self, weights: Mapping[str, float]) -> dict[str, float]:
        """{digest: weight}, without zeros. Raises: UserError as `check`."""
        self._check_known(weights)
        if wrong := [f"{name}: {weight}" for name, weight in weights.items()
                     if not abs(weight) <= _MOST_WEIGHT]:  # fmt: skip
            raise errors.UserError(expected="finite weights of adapters", found=wrong)
        found: dict[str, float] = {}
        for name, weight in weights.items():
            digest = self._named[name].digest
            found[digest] = found.get(digest, 0.0) + float(weight)
        found = {digest: weight for digest, weight in found.items() if weight}
        slots = {own.digest: len(own.slots) for own in self._named.values()}
        needed = sum(slots[digest] for digest in found)
        if needed > self.num_slots:
            raise errors.UserError(
                expected=f"adapters that fit into {self.num_slots} slots of rank "
                f"{self._bank.rank} together",
                found=f"{', '.join(weights)}, which take {needed}",
                do="mix fewer adapters, or use more slots",
            )
        return found

    def _make_room(self, contents: Mapping[str, banked.Contents]) -> bool:
        """Frees the slots that those not in the bank need; whether that is possible."""
        new = [own for digest, own in contents.items() if digest not in self._resident]
        missing = sum(len(own.slots) for own in new) - len(self._free)
        idle = [digest for digest, own in self._resident.items()
                if not own.num_leases and digest not in contents]  # fmt: skip
        if missing > sum(len(self._resident[digest].slots) for digest in idle):
            return False
        for digest in idle:
            if missing <= 0:
                break
            missing -= len(self._resident[digest].slots)
            self._free += self._resident.pop(digest).slots
        return True

    def _place(self, contents: banked.Contents) -> _Resident:
        slots = tuple(self._free.pop(0) for _ in contents.slots)
        for number, own in zip(slots, contents.slots, strict=True):
            self._put(self._bank.filled(own), number)
        return _Resident(slots)

    def _put(self, content: dict[str, Any], slot: int) -> None:
        self.state = self._write(self.state, content, np.int32(slot))
        nnx.update(self._model, self.state)  # whose arrays were donated

    def _drop(self, contents: banked.Contents | None) -> None:
        """Frees the slots of an adapter that lost a name, if it has no other and no lease."""
        if contents is not None and contents.digest in self._resident:
            self._drop_unused(contents.digest)

    def _drop_unused(self, digest: str) -> None:
        named = any(own.digest == digest for own in self._named.values())
        if not named and not self._resident[digest].num_leases:
            self._free += self._resident.pop(digest).slots

    def _check_name(self, name: str, replace: bool) -> None:
        with self._lock:
            if not name or (name in self._named and not replace):
                raise errors.UserError(
                    expected="a name that no adapter has yet",
                    found=repr(name),
                    do="choose another name, unload the adapter first, or replace it",
                )

    def _check_known(self, names: Any) -> None:
        if unknown := [name for name in names if name not in self._named]:
            raise errors.UserError(
                expected=f"an adapter among {', '.join(self._named) or 'none, none is loaded'}",
                found=", ".join(unknown),
                do=errors.did_you_mean(unknown[0], self._named) or "load it first",
            )

    def _check_room(self, name: str, contents: banked.Contents, where: str) -> None:
        others = {own.digest: own for other, own in self._named.items() if other != name}
        total = sum(own.num_bytes for own in others.values())
        problems = []
        if name not in self._named and len(self._named) >= self._most_adapters:
            problems.append(f"{len(self._named)} adapters, the most that are kept")
        if contents.digest not in others and total + contents.num_bytes > self._most_bytes:
            problems.append(f"{total + contents.num_bytes:,} bytes of adapters with this one, "
                            f"of {self._most_bytes:,} that are kept")  # fmt: skip
        if problems:
            raise errors.UserError(
                expected="room for one more adapter in main memory",
                found=problems,
                where=where,
                do="unload adapters that are not used",
            )


def _read(folder: pathlib.Path) -> lora_adapter.Adapter:
    if not folder.is_dir():
        raise errors.UserError(
            expected="the folder of an adapter",
            found="no such folder",
            where=str(folder),
            do=errors.similar_path(folder)
            or "pass the folder that a training run wrote as OUTPUT_DIR/adapter",
        )
    return peft.read(folder)
