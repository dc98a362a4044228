"""The TPU chips of a TPU VM, and which process holds them."""

import contextlib
import dataclasses
import os
import pathlib
import re

_VENDOR = "0x1ae0"  # Google's PCI vendor id
_PROCESSES = pathlib.Path("/proc")
_LOCK = pathlib.Path("/tmp/libtpu_lockfile")
_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclasses.dataclass(frozen=True)
class Found:
    """chips: their number. users: the other processes that have opened them, such as "4711
    python3"; those of other users are seen by root only. lock_of_another: libtpu's lock file
    cannot be opened by this user. huge_pages: whether Linux always uses them.
    """

    chips: int = 0
    users: tuple[str, ...] = ()
    lock_of_another: bool = False
    huge_pages: bool = True


def read() -> Found:
    """Looks at device files only, so that libtpu is not loaded."""
    chips = _num_chips()
    if not chips:
        return Found()
    huge_pages = True
    with contextlib.suppress(OSError):
        huge_pages = "[always]" in _HUGE_PAGES.read_text()
    locked = _LOCK.exists() and not os.access(_LOCK, os.R_OK | os.W_OK)
    return Found(chips, tuple(_users()), locked, huge_pages)


def _num_chips() -> int:
    root = pathlib.Path("/")
    if files := [*root.glob("dev/accel[0-9]*")]:
        return len(files)
    for pattern in ("sys/class/vfio-dev/*/device/vendor", "sys/bus/pci/drivers/vfio-pci/*/vendor"):
        found = 0
        for vendor in root.glob(pattern):
            with contextlib.suppress(OSError):
                found += vendor.read_text().strip() == _VENDOR
        if found:
            return found
    return 0


def _users() -> list[str]:
    found = []
    for process in _PROCESSES.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if int(process.name) != os.getpid() and any(map(_is_device, process.glob("fd/*"))):
                found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
    return found


def _is_device(opened: pathlib.Path) -> bool:
    with contextlib.suppress(OSError):
        return re.match(r"/dev/(accel|vfio/)\d", os.readlink(opened)) is not None
    return False
