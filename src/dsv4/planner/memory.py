"""How many bytes a V4 model takes: weights, KV cache, and what training keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from ..config import FP4_BLOCK, V4Config
from ..errors import ConfigError
from ..formats import inventory

KV_SCALE_BLOCK = 64  # channels of an entry that share an FP8 scale
GRAIN = 128  # tokens between snapshots of a session
DENSE_BYTES, DENSE_LEAST = 128 << 20, 16  # of the newest snapshots, all of which it keeps
ITEM_BYTES = {"official": 2, "float32": 4}  # of an activation


def weight_bytes(config: V4Config) -> int:
    """Bytes of all stored tensors, block scales included; the files add their headers."""
    return sum(spec.bytes for spec in inventory(config).values())


# ---------------------------------------------------------------- the published formats


def entry_bytes(config: V4Config) -> int:
    """One window or compressed entry: FP8 channels, BF16 rotated ones, scales, filled up to 8.

    448 + 128 + 7 + 1 = 584 in every published model (report section 6; FlashMLA's layout).
    """
    plain = config.head_dim - config.qk_rope_head_dim
    used = plain + 2 * config.qk_rope_head_dim + -(-plain // KV_SCALE_BLOCK)
    return -(-used // 8) * 8


def index_key_bytes(config: V4Config) -> int:
    """One indexer key: FP4 channels and an E8M0 scale for every 32 of them (64 + 4 = 68)."""
    return config.index_head_dim // 2 + -(-config.index_head_dim // FP4_BLOCK)


def kv_bytes_per_token(config: V4Config) -> float:
    """What each further token adds to the cache in the published formats; the window does not."""
    entry, key = entry_bytes(config), index_key_bytes(config)
    layers = config.compress_ratios[: config.num_hidden_layers]
    return sum((entry + (key if r == 4 else 0)) / r for r in layers if r)


def kv_bytes(config: V4Config, tokens: int) -> int:
    """The whole cache of one sequence in the published formats: window, entries, index keys.

    Without the tail of raw compressor rows (``tail_bytes``) and without the MTP block's window,
    as in the report's comparison.
    """
    entry, key = entry_bytes(config), index_key_bytes(config)
    layers = config.compress_ratios[: config.num_hidden_layers]
    rows = sum(tokens // r * (entry + (key if r == 4 else 0)) for r in layers if r)
    return len(layers) * min(tokens, config.sliding_window) * entry + rows


def tail_bytes(config: V4Config) -> int:
    """Raw compressor rows (float32 values and gates) that wait to be pooled, per sequence: two
    blocks of double width in a CSA layer (and its indexer), one block in an HCA layer."""
    total = 0
    for ratio in config.compress_ratios[: config.num_hidden_layers]:
        if ratio == 4:
            total += 2 * ratio * 2 * (config.head_dim + config.index_head_dim)
        else:
            total += ratio * config.head_dim
    return total * 2 * 4


# ---------------------------------------------------------------- what the engine holds


def block_bytes(config: V4Config, numerics: str = "official") -> int:
    """The compressed rows of 128 tokens, as the engine stores them: in the published formats, or
    in 4 bytes a number with float32 numerics."""
    if numerics == "official":
        entry, key = entry_bytes(config), index_key_bytes(config)
    else:
        entry, key = 4 * config.head_dim, 4 * config.index_head_dim
    layers = config.compress_ratios[: config.num_hidden_layers]
    return sum(GRAIN // r * (entry + (key if r == 4 else 0)) for r in layers if r)


def _raw_bytes(config: V4Config, rows: Callable[[int], int]) -> int:
    """Raw compressor rows (float32 values and gates), so many in a layer of that ratio."""
    total = 0
    for ratio in config.compress_ratios[: config.num_hidden_layers]:
        if ratio == 4:
            total += rows(ratio) * 2 * (config.head_dim + config.index_head_dim)
        elif ratio:
            total += rows(ratio) * config.head_dim
    return total * 2 * 4


def _waiting(ratio: int, tokens: int) -> int:
    """Raw rows kept after so many tokens. A CSA layer and its indexer keep the last pooled block
    too, because the next one overlaps it."""
    return tokens % ratio + (ratio if ratio == 4 else 0)


def _room(passes: Iterable[int], kept: Callable[[int], int]) -> int:
    """Rows for which the engine has room after these passes, of which it keeps ``kept(tokens)``:
    some more are added in place (``engine.kvstate.Tail``)."""
    length, used = 0, kept(0)
    room = used
    for tokens in passes:
        if used + tokens > room:
            used = kept(length)
            room = used + tokens + 8 + used // 4
        length, used = length + tokens, used + tokens
        if room > 2 * GRAIN:
            room = used = kept(length)
    return room


def session_bytes(config: V4Config, passes: Iterable[int], numerics: str = "official") -> int:
    """What a session of this package's engine holds after passes of so many tokens each.

    Equals ``Session.bytes()``: blocks of rows, the window in the numerics' activation type (BF16
    for official, 4 bytes for float32), raw rows in float32, room for some more of both, and the
    cuts that make rewinding cheap, in which the window is stored as rows are. ``extend_passes``
    gives the passes of one ``extend``.
    Raises ConfigError for other numerics.
    """
    if numerics not in ITEM_BYTES:
        raise ConfigError("no such numerics", expected=" or ".join(ITEM_BYTES), got=numerics)
    item, width = ITEM_BYTES[numerics], config.head_dim
    stored = entry_bytes(config) if numerics == "official" else item * width
    passes, length, cuts = list(passes), 0, dict[int, int]()

    def window(tokens: int) -> int:
        return min(tokens, config.sliding_window - 1)

    def cut(tokens: int) -> int:
        raw = _raw_bytes(config, lambda ratio: _waiting(ratio, tokens))
        return config.num_hidden_layers * window(tokens) * stored + raw

    dense = max(DENSE_LEAST, DENSE_BYTES // cut(GRAIN))
    for tokens in passes:
        first, length = length // GRAIN + 1, length + tokens
        for at in range(first * GRAIN, length + 1, GRAIN):
            cuts[at] = cut(at)
        for at in list(cuts):
            stride = 1 << ((length - at) // GRAIN // dense).bit_length()
            if at // GRAIN % stride:
                del cuts[at]
    if not length:
        return 0
    blocks = -(-length // GRAIN) * block_bytes(config, numerics)
    windows = config.num_hidden_layers * _room(passes, window) * item * width
    raw = _raw_bytes(config, lambda r: _room(passes, lambda tokens: _waiting(r, tokens)))
    return blocks + windows + raw + sum(cuts.values())


def extend_passes(length: int, tokens: int, chunk: int = 512) -> Iterator[int]:
    """The passes in which a session ``length`` tokens long takes ``tokens`` more."""
    while tokens:
        n = min(tokens, chunk - length % GRAIN)
        yield n
        length, tokens = length + n, tokens - n


# ---------------------------------------------------------------- training


class TrainingBytes(NamedTuple):
    """What a training run keeps for the whole run; activations come on top, with the batch."""

    masters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(self)


def training_bytes(config: V4Config) -> TrainingBytes:
    """Float32 masters and gradients, and the optimizer's state, from the config alone.

    The state is Muon's one moment, and AdamW's two and its count of updates. The hash-routing
    tables and the routers' biases are kept but not trained.
    """
    masters = trained = moments = 0
    plain = replace(config, expert_dtype="bf16", quantization_config=None)
    for name, spec in inventory(plain).items():
        masters += spec.elements * (8 if spec.dtype == "I64" else 4)
        if name.endswith(("gate.bias", "tid2eid")):
            continue
        trained += spec.elements
        table = name.endswith(("embed.weight", "head.weight"))
        muon = len(spec.shape) == 2 and not table and not name.endswith("ape")
        moments += 4 * spec.elements if muon else 8 * spec.elements + 8
    return TrainingBytes(masters, 4 * trained, moments)


class ActivationBytes(NamedTuple):
    """What the forward pass of a training step leaves for the backward pass.

    ``blocks``: of each block in order (MTP last), all that it keeps; ``inputs``: its input alone;
    ``ends``: heads and losses; ``copies``: matrices in the type of the products, of each block.
    """

    blocks: tuple[int, ...]
    inputs: int
    ends: int
    copies: tuple[int, ...]


def activation_bytes(
    config: V4Config,
    tokens: int,
    *,
    mtp: bool = True,
    sparse: bool = False,
    dtype: str = "bfloat16",
) -> ActivationBytes:
    """Of a pass over ``tokens`` tokens, with the native kernels; experts evenly loaded.

    ``sparse``: indexers are trained too. Float32 products need no copies of the matrices.
    """
    c, item = config, 4 if dtype == "float32" else 2
    d, h, heads = c.hidden_size, c.hc_mult, c.num_attention_heads * c.head_dim
    wide = item < 4  # float32 copies of what is 16 bits wide

    def norm(width: float) -> float:
        return width * item

    site = h * d * item + 4 * (6 * h * h + 2 * h + 1) + norm(d) + 2 * d * item
    rows = c.num_experts_per_tok * (3 * c.moe_intermediate_size + d)
    width = c.n_shared_experts * c.moe_intermediate_size
    routed = rows * item + c.num_experts_per_tok * 32 + c.n_routed_experts * 12 + 4 * d * wide
    shared = 3 * width * item
    attention = (
        norm(c.q_lora_rank) + c.q_lora_rank * item + norm(c.head_dim) + c.head_dim * item
        + 4 * heads * item + c.o_groups * c.o_lora_rank * item
    )  # fmt: skip

    def pooled(ratio: int, dim: int) -> float:
        both = 2 * dim * (2 if ratio == 4 else 1) * item
        return both + (norm(dim) + 2 * dim * item) / ratio

    layers = c.compress_ratios[: c.num_hidden_layers]
    blocks = []
    for ratio in (*layers, *(0,) * (c.mtp_layers if mtp else 0)):
        each = 2 * site + routed + shared + attention
        if ratio:
            each += pooled(ratio, c.head_dim)
        if ratio == 4 and sparse:
            index = c.index_n_heads * c.index_head_dim
            each += pooled(ratio, c.index_head_dim) + 3 * index * item + 8 * c.index_n_heads
        blocks.append(round(each * tokens))
    heads_of = 1 + (c.mtp_layers if mtp else 0)
    end = h * d * item + 4 * (2 * h + 6) + norm(d) + d * item
    more = (heads_of - 1) * (norm(h * d) + norm(d) + (h + 1) * d * item)
    plain = replace(c, expert_dtype="bf16", quantization_config=None)
    copies = [0] * len(blocks)
    for name, spec in inventory(plain).items():
        part = name.split(".")
        indexed = ".indexer." in name and not sparse
        matrix = len(spec.shape) == 2 and not name.endswith(("ape", "tid2eid", "gate.weight"))
        if wide and part[0] in ("layers", "mtp") and matrix and not indexed:
            number = int(part[1]) + (c.num_hidden_layers if part[0] == "mtp" else 0)
            if number < len(blocks):
                copies[number] += spec.elements * item
    ends = round((heads_of * end + more) * tokens)
    return ActivationBytes(tuple(blocks), h * d * item * tokens, ends, tuple(copies))


PROGRAM = 110_000_000  # torch's code and tables that training touches
SPARE = 1.48  # of activations: what a block works with, and what malloc keeps; measured


def training_peak_bytes(
    config: V4Config,
    tokens: int,
    *,
    recompute: bool = False,
    mtp: bool = True,
    sparse: bool = False,
    dtype: str = "bfloat16",
) -> int:
    """About the most that a process holds while it trains with ``tokens`` tokens in a pass.

    Masters, gradients, moments, what Muon works with, and activations: all that the forward pass
    keeps, or with ``recompute`` the inputs of the blocks and three times the largest block, because
    one is computed again while others are given up. Freed memory is not all used again, so it adds
    up; that three and ``SPARE`` were found by measuring (docs/training.md).
    """
    kept = activation_bytes(config, tokens, mtp=mtp, sparse=sparse, dtype=dtype)
    blocks = [a + b for a, b in zip(kept.blocks, kept.copies, strict=True)]
    activations = kept.ends + sum(blocks)
    if recompute:
        activations = kept.ends + kept.inputs * len(blocks) + 3 * max(blocks)
    fixed = training_bytes(config).total + orthogonalized_bytes(config)
    return PROGRAM + fixed + round(SPARE * activations)


def orthogonalized_bytes(config: V4Config, at_once: int = 64) -> int:
    """What Muon works with: of up to ``at_once`` matrices of one shape, four times in float32 and
    four times in BF16 (directions, sums, products)."""
    plain = replace(config, expert_dtype="bf16", quantization_config=None)
    sizes: dict[tuple[int, ...], int] = {}
    for name, spec in inventory(plain).items():
        if len(spec.shape) == 2 and not name.endswith(("embed.weight", "head.weight", "ape")):
            total = sizes.get(spec.shape, 0) + spec.elements
            sizes[spec.shape] = min(at_once * spec.elements, total)
    return 24 * max(sizes.values(), default=0)
