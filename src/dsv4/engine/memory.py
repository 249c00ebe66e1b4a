"""Working memory: what a pass needs besides weights and attention state, where glibc manages it.

By itself glibc maps each block of megabytes afresh, which costs a page fault every 4 KB (a third
of the time of a small model's token), or gets used to such blocks and then keeps tens of megabytes
after a long prompt. Here blocks up to 32 MB are reused, and given back when told.
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of <malloc.h>
_libc = ctypes.CDLL(None)
_glibc = hasattr(_libc, "mallopt") and hasattr(_libc, "malloc_trim")


@functools.cache
def reuse() -> None:
    """From now on, keep freed blocks for the next pass. For the whole process."""
    if _glibc:
        _libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        _libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def release() -> None:
    """Give freed blocks back to the system; takes 0.2 to 1 ms."""
    if _glibc:
        _libc.malloc_trim(0)
