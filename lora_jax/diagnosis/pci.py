"""The devices on the PCI bus, with or without a driver."""

import contextlib
import pathlib

_DEVICES = pathlib.Path("/sys/bus/pci/devices")
NVIDIA, AMD = "0x10de", "0x1002"  # ids of vendors
# Classes of devices. The graphics of a processor have VGA.
VGA, CONTROLLER_3D, OTHER_DISPLAY, ACCELERATOR = "0x0300", "0x0302", "0x0380", "0x1200"


def count(vendor: str, *classes: str) -> int:
    """The number of the vendor's devices in any of the classes."""
    found = 0
    for device in _DEVICES.glob("*"):
        with contextlib.suppress(OSError):
            own, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            found += own == vendor and kind.startswith(classes)
    return found
