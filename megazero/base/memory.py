"""Memory that was freed and is not the system's again."""

import ctypes
from contextlib import suppress


def give_back() -> None:
    """glibc keeps what is freed below the newest of its pieces: of a module that was cut in slices all that it was.
    Where there is another C library nothing happens."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
