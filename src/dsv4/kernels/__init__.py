"""The kernel table: the functions that V4's arithmetic is made of.

Each is defined by its torch reference (``reference.py``). Where the package was built with a
compiler, those in C++ (``native.py``) take their place, unless the environment variable
DSV4_KERNELS is "reference"; ``NATIVE`` names their instruction set, or is None. Nothing here knows
a configuration or a model. Callers look a kernel up at each call (``kernels.linear(...)``), so the
table can change at run time.
"""

import importlib
import os

from ..errors import ConfigError
from . import threads
from .reference import (
    Mix,
    Span,
    Stored,
    add,
    attention,
    checksum,
    compress,
    cross_entropy,
    fp8_round,
    grouped_linear,
    hadamard_fp4,
    hc_collapse,
    hc_expand,
    hc_head,
    hc_logits,
    hc_read,
    hc_split,
    head,
    index_loss,
    index_topk,
    linear,
    norm_rope,
    packed_attention,
    pool,
    raw_rows,
    rms_norm,
    rope,
    route,
    routed_experts,
    scaled,
    sinkhorn,
    store,
    swiglu,
)
from .rows import PagedRows, RowFormat, Rows
from .tapes import Tapes
from .threads import FEW


def _choose() -> str | None:
    """Put the native kernels into the table; the instruction set they use, None if there are none.

    Code without vectors of the processor's own is correct but slow, and is only used when asked
    for (DSV4_KERNELS=native).
    """
    wanted = os.environ.get("DSV4_KERNELS", "")
    if wanted not in ("", "native", "reference"):
        raise ConfigError("DSV4_KERNELS", expected="native or reference", got=wanted)
    if wanted == "reference":
        return None
    try:
        native = importlib.import_module(".native", __name__)
    except ImportError as error:
        if wanted:
            raise ConfigError(
                "the native kernels are not built", got=error,
                hint="pip install dsv4 again where there is a C++ compiler",
            ) from error
        return None
    if native.isa() == "portable" and not wanted:
        return None
    training = importlib.import_module(".training", __name__)
    for module in (native, training):
        globals().update({name: getattr(module, name) for name in module.KERNELS})
    threads.stay_awake = native.stay_awake
    isa: str = native.isa()
    return isa


NATIVE = _choose()


def bits() -> str:
    """What decides the bits of results: two machines that say the same compute the same.

    "reference" (up to torch's own differences), "native" for all instruction sets but one, or
    "amx", which sums in an order of its own.
    """
    if NATIVE is None:
        return "reference"
    isa: str = importlib.import_module(".native", __name__).isa()
    return isa if isa == "amx" else "native"


__all__ = [
    "FEW",
    "NATIVE",
    "Mix",
    "PagedRows",
    "RowFormat",
    "Rows",
    "Span",
    "Stored",
    "Tapes",
    "add",
    "attention",
    "bits",
    "checksum",
    "compress",
    "cross_entropy",
    "fp8_round",
    "grouped_linear",
    "hadamard_fp4",
    "hc_collapse",
    "hc_expand",
    "hc_head",
    "hc_logits",
    "hc_read",
    "hc_split",
    "head",
    "index_loss",
    "index_topk",
    "linear",
    "norm_rope",
    "packed_attention",
    "pool",
    "raw_rows",
    "rms_norm",
    "rope",
    "route",
    "routed_experts",
    "scaled",
    "sinkhorn",
    "store",
    "swiglu",
]
