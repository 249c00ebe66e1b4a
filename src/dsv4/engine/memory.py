"""Working memory: what a pass needs besides weights and attention state, where glibc manages it.

By itself glibc maps each block of megabytes afresh, which costs a page fault every 4 KB (a third
of the time of a small model's token), or gets used to such blocks and then keeps tens of megabytes
after a long prompt. Here blocks up to 32 MB are reused, and given back now and then.
"""

from __future__ import annotations

import ctypes
import functools

RELEASE_EVERY = 16  # tokens; even single ones scatter their working memory over ever more pages
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of <malloc.h>
_libc = ctypes.CDLL(None)
_glibc = hasattr(_libc, "mallopt") and hasattr(_libc, "malloc_trim")


@functools.cache
def reuse() -> None:
    """From now on, keep freed blocks for the next pass. For the whole process."""
    if _glibc:
        _libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        _libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


_tokens = 0  # computed since freed blocks were given back


def after(tokens: int) -> None:
    """To be told of each part of a pass when what it used is free: every RELEASE_EVERY tokens
    freed blocks go back to the system, which takes 0.2 to 1 ms."""
    global _tokens
    _tokens += tokens
    if _tokens >= RELEASE_EVERY:
        _tokens = 0
        if _glibc:
            _libc.malloc_trim(0)
