"""Memory of this machine and process, and working memory: what a pass needs besides weights and
attention state, where glibc manages it.

By itself glibc maps each block of megabytes afresh, which costs a page fault every 4 KB (a third
of the time of a small model's token), or gets used to such blocks and then keeps tens of megabytes
after a long prompt. Here blocks up to 32 MB are reused, and given back now and then.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

RELEASE_EVERY = 16  # tokens; even single ones scatter their working memory over ever more pages
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of <malloc.h>
_libc = ctypes.CDLL(None)
_glibc = hasattr(_libc, "mallopt") and hasattr(_libc, "malloc_trim")


@functools.cache
def reuse(most: int = 256 << 20) -> None:
    """From now on, keep freed blocks for the next pass, up to ``most`` bytes (below 2 GB) at the
    end of the heap. For the whole process."""
    if _glibc:
        _libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        _libc.mallopt(_M_TRIM_THRESHOLD, most)


_tokens = 0  # computed since freed blocks were given back


def after(tokens: int, every: int = RELEASE_EVERY) -> None:
    """To be told of each part of a pass when what it used is free: ``every`` so many tokens freed
    blocks go back to the system, which takes 0.2 to 1 ms for a pass's and 0.1 s for gigabytes."""
    global _tokens
    _tokens += tokens
    if _tokens >= every:
        _tokens = 0
        if _glibc:
            _libc.malloc_trim(0)


def available() -> int:
    """Bytes that this process may still take: what the machine has left, or a limit on the
    process's control group if that is less. What files have in the page cache counts as free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([free, *(left for group in control_groups() if (left := _left(group)))]))


def control_groups() -> list[Path]:
    """Folders of the control groups of this process that count memory, innermost first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        group = root / path.lstrip("/")
        while group != root.parent:
            if any((group / limit).is_file() for limit, _ in _LIMITS):
                found.append(group)
            group = group.parent
    return found


_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def _left(group: Path) -> int | None:
    """What the group's limit leaves; None without one."""
    for limit, usage in _LIMITS:
        try:
            most = (group / limit).read_text().strip()
            if most == "max" or int(most) >= 1 << 60:
                return None
            stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
            files = int(stat["inactive_file"]) + int(stat["active_file"])
            return max(1, int(most) - int((group / usage).read_text()) + files)
        except (OSError, ValueError, KeyError):
            continue
    return None


def peak_bytes(pid: int | None = None) -> int:
    """The most bytes of a process (this one) in memory, code included, since ``forget_peak`` (or
    its start, where the system cannot forget)."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> None:
    """Begin a new peak from now on, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
