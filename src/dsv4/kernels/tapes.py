"""Steps of a pass that are recorded once and then done again without Python.

What a model does to each token, between the places where it looks at others, is a list of kernels:
for the same number of tokens the same ones, on the same weights. With a small model and a token at
a time, calling them takes longer than what they do. So the first time they are put on a ``Tape``
(``native/tape.h``), with the tensors in which they leave their results, and from then on only what
goes in is copied and the tape runs. Results have the same bits, because it is the same kernels.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .threads import threads

if TYPE_CHECKING:
    from . import _native  # only where it was built is anything recorded

MOST_BYTES = 128 << 20  # of results that are kept, of a model in a thread; a quarter for one step
HARMLESS = {  # they make no numbers
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types",
}


class _Watch(TorchDispatchMode):
    """Keeps the tensors that are made, and the names of operations that are no kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = []
        self.foreign: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view, harmless = _nature(func)
        made = [out] if isinstance(out, Tensor) else pytree.tree_leaves(out)
        made = [t for t in made if isinstance(t, Tensor)]
        if is_view:  # also of what copies if it must, as reshape and contiguous
            there = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            made = [t for t in made if t.untyped_storage().data_ptr() not in there]
        self.kept += made
        if (made or not is_view) and not harmless:
            self.foreign.add(str(func))
        return out


@functools.cache
def _nature(func: Any) -> tuple[bool, bool]:
    """Whether an operation gives a view, and whether it makes no numbers."""
    return func.is_view, func.overloadpacket.__name__ in HARMLESS


class _Step(NamedTuple):
    tape: _native.Tape
    results: tuple[Tensor, ...]
    kept: list[Tensor]  # what the tape reads and writes, its inputs among them


_Steps = dict[Hashable, dict[Hashable, _Step | None]]


class Tapes:
    """The steps of one model, by what they depend on; each thread has its own.

    A step that is more than kernels (``foreign`` says what it was) is always done by Python. Call
    ``clear`` when weights are replaced: tapes know where they are. ``off``: Python does everything.
    """

    def __init__(self) -> None:
        self.foreign: set[str] = set()
        self.off = False
        self.clear()

    def clear(self) -> None:
        self._mine = threading.local()

    def run(
        self, key: Hashable, name: Hashable, step: Callable[..., tuple[Tensor, ...]],
        given: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """``step(*given)``, which has no effect but its results and depends on nothing but what is
        given, for the ``name`` and the ``key`` of its pass. Results are good until the next time.
        """
        if self.off:
            return step(*given)
        mine = self._mine
        steps: _Steps | None = getattr(mine, "steps", None)
        if steps is None:
            steps = mine.steps = {}
            mine.bytes = {}
        of_key = steps.setdefault(key, {})
        if name not in of_key:
            return self._record(key, name, step, given)
        found = of_key[name]
        if found is None:
            return step(*given)
        whole = [t if t.is_contiguous() else t.contiguous() for t in given]
        found.tape.run([(t.data_ptr(), t.nbytes) for t in whole], threads())
        return found.results

    def _record(
        self, key: Hashable, name: Hashable, step: Callable[..., tuple[Tensor, ...]],
        given: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        from . import _native

        tape, watch = _native.Tape(), _Watch()
        buffers = [t.clone(memory_format=torch.contiguous_format) for t in given]
        for t in buffers:
            tape.input(t.data_ptr(), t.nbytes)
        tape.record()
        try:
            with watch:
                results = step(*buffers)
        finally:
            tape.stop()
        if not tape.whole:
            watch.foreign.add("a kernel that is not recorded")
        kept = [*buffers, *watch.kept]
        self.foreign |= watch.foreign
        size = sum(t.nbytes for t in kept)
        small = size <= MOST_BYTES // 4  # what calls for more has enough to do between calls
        done = _Step(tape, results, kept) if small and not watch.foreign else None
        steps, sizes = self._mine.steps, self._mine.bytes
        steps[key][name] = done
        sizes[key] = sizes.get(key, 0) + (size if done else 0)
        while sum(sizes.values()) > MOST_BYTES and len(sizes) > 1:  # the oldest goes
            oldest = next(k for k in sizes if k != key)
            del steps[oldest], sizes[oldest]
        return results
