"""Memory that is freed stays with the process while it is measured.

The C library of Linux gives large pieces back to the system as soon as they are freed, or keeps them, as the heap happens to
lie; pieces given back are mapped and cleared anew by the next call. The same prompt then takes up to half as long again, and
an optimizer's step twice as long, now and then and for as long as the process lives. Held still, times repeat.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt (malloc.h of glibc): how a measurement wants them, and where glibc itself moves them once large pieces
# have been freed.
_TRIM_THRESHOLD, _MAP_THRESHOLD, _MOST_MAPPED = -1, -3, -4
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _MOST_MAPPED: 0}
_ORDINARY = {_TRIM_THRESHOLD: 64 * 2**20, _MAP_THRESHOLD: 32 * 2**20, _MOST_MAPPED: 65536}

_open = 0


@contextmanager
def held() -> Iterator[None]:
    """Within it the heap keeps what is freed; after the outermost, all that is free goes back to the system. Elsewhere than
    on glibc nothing changes."""
    global _open
    library = _library()
    if library is None:
        yield
        return
    _set(library, _KEEPING)
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        if not _open:
            _set(library, _ORDINARY)
            library.malloc_trim(0)


def _set(library: ctypes.CDLL, parameters: dict[int, int]) -> None:
    for parameter, value in parameters.items():
        library.mallopt(parameter, value)


def _library() -> ctypes.CDLL | None:
    """The C library when it has glibc's handles."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
