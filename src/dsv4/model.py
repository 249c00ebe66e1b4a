"""The whole DeepSeek-V4 network, once, for training and for serving. Read it top to bottom.

What is unusual here, in the order it appears:
  - two rotary tables: plain for window-only layers, YaRN for layers with a compressor;
  - Compressor: a learned softmax pools 4 tokens (two overlapping streams) or 128 into one entry;
  - Indexer: small FP4 queries and keys choose which entries of a CSA layer a token attends to;
  - Attention: one 512-wide vector is key and value of all heads; window and compressed entries
    share one softmax with a sink; the output is rotated back, then projected in groups;
  - MoE: the first layers route by a table of token ids, the others by sqrt-softplus scores with a
    bias that only selects;
  - Block: the residual is four streams, mixed by doubly stochastic matrices (mHC);
  - MTPBlock: one more block that predicts the token after the next.

Module and parameter names are those of the official checkpoints. Parameters are made on the meta
device; ``load_weights`` gives them the stored tensors, ``train.initial`` float32 masters. Sources:
report sections 2.1-2.4, the published inference code; letters in shapes: ``kernels/reference.py``.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import kernels, rotary
from .config import V4Config
from .errors import ConfigError, TrainingError
from .kernels import Rows, Stored, looking, reference
from .layers import Embedding, Head, Linear, Norm, parameter
from .numerics import FLOAT32, Numerics, fp4_rotated, kv_rounded
from .packing import Packing
from .protocols import AttentionState, Continued, ExpertSource, WindowState


@dataclass
class Pass:
    """What all layers of one forward pass share."""

    config: V4Config
    nx: Numerics
    ids: Tensor  # [B, T]
    start: int  # position of the first new token
    states: Sequence[WindowState] | None = None  # one per layer; None: no past, nothing kept
    parts: Sequence[Pass] = ()  # ids [1, N] are the new tokens of several timelines
    tapes: kernels.Tapes | None = None  # on which steps of passes of as many tokens may be
    places: Tensor | None = None  # of each token, for native attention: see ``looking``
    # training only:
    packing: Packing | None = None  # ids [1, N] are samples, each seen alone
    dense: bool = False  # CSA layers attend to all visible rows; no indexer chooses
    recompute: bool = False  # blocks keep their input only and are done again for the gradient
    routes: Mapping[nn.Module, Tensor] | None = None  # experts [N, K] that each Gate has to take
    noted: Noted | None = None  # what losses want to know
    _rotations: dict[tuple[bool, int, int, int], Tensor] = field(default_factory=dict)
    shared: dict[Any, Tensor] = field(default_factory=dict)  # of each token, for several layers

    def rotation(self, compressed: bool, start: int, count: int, step: int = 1) -> Tensor:
        """Cosines and sines ``[count, rope / 2, 2]`` for positions start, start + step, ..."""
        key = (compressed, start, count, step)
        if key not in self._rotations:
            made = rotary.rotation(self.config, compressed, start, count, step)
            self._rotations[key] = made.to(self.ids.device)
        return self._rotations[key]

    def turn(self, compressed: bool, ratio: int = 1) -> Tensor:
        """The rotation of each new token, ``[T, rope / 2, 2]``, or of the block it is in."""
        if self.packing is not None:
            return self.rotation(compressed, 0, self.packing.longest)[self.packing.positions]
        key = (compressed, ratio)
        if key not in self.shared:
            some = []
            for part in self.parts or [self]:
                first, count = part.start, part.ids.shape[1]
                step = 1 if self.places is not None else count
                for at in range(first, first + count, step):
                    some.append(part.rotation(compressed, at // ratio * ratio, step))
            self.shared[key] = torch.cat(some) if len(some) > 1 else some[0]
        return self.shared[key]

    def by_token(
        self, step: Callable[..., tuple[Tensor, ...]], *given: Tensor
    ) -> tuple[Tensor, ...]:
        """``step(self, *given)``, which uses nothing else of its tokens and mixes none of them.
        Results are good until the next pass; ``given`` stays as it is."""
        if self.tapes is None:
            return step(self, *given)
        return self.tapes.run(self._key, (step, given[0].shape), partial(step, self), given)

    def on_tape(self, places: Tensor, shared: Sequence[Tensor]) -> Pass:
        """Itself with these in place of its own, which change from pass to pass."""
        given = dict(zip(self.shared, shared, strict=True))
        return replace(self, tapes=None, places=places, shared=given)

    @functools.cached_property
    def _key(self) -> tuple[Numerics, int, bool]:  # of passes that do the same
        return self.nx, self.ids.shape[1], self.longest // 4 <= self.config.index_topk

    def state(self, layer: int) -> WindowState | None:
        """What that layer remembers of the past."""
        return None if self.states is None else self.states[layer]

    def indexing(self) -> torch.set_grad_enabled:
        """The context in which indexers work: without a gradient unless they have a loss."""
        return torch.set_grad_enabled(self.trains_indexers and torch.is_grad_enabled())

    @property
    def trains_indexers(self) -> bool:
        """Whether they have a loss."""
        return self.noted is not None and self.noted.indexers

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, past, new and padding."""
        if self.parts:
            return max(part.longest for part in self.parts)
        return self.start + self.ids.shape[1] if self.packing is None else self.packing.longest


class Noted:
    """What training wants to know of a pass: ``balance``, the scores ``[N, E]`` and experts
    ``[N, K]`` of each learned router, and ``divergences`` of the indexers, if they have a loss."""

    def __init__(self, indexers: bool = False) -> None:
        self.indexers = indexers
        self.balance: list[tuple[Tensor, Tensor]] = []
        self.divergences: list[Tensor] = []


# ---------------------------------------------------------------- attention


class Compressor(nn.Module):
    """Pools every ``ratio`` tokens into one entry; overlapping blocks when the ratio is 4."""

    def __init__(self, c: V4Config, ratio: int, dim: int, rotate: bool) -> None:
        super().__init__()
        self.ratio, self.dim, self.rotate = ratio, dim, rotate
        self.overlap = ratio == 4
        self.which = "index" if rotate else "kv"
        width = dim * (1 + self.overlap)
        self.wkv = Linear(c.hidden_size, width)
        self.wgate = Linear(c.hidden_size, width)
        self.ape = parameter(ratio, width)
        self.norm = Norm(dim, c.rms_norm_eps)

    def project(self, x: Tensor, nx: Numerics) -> tuple[Tensor, Tensor]:
        """What is pooled and, but for the positional bias, the logits of its weights; of each
        token: ``x [B, T, d]`` -> two ``[B, T, width]``."""
        high = replace(nx, dtype=torch.float32) if nx.official else nx
        return self.wkv(x, high), self.wgate(x, high)

    def forward(
        self, kv: Tensor, gate: Tensor, run: Pass, state: WindowState | None
    ) -> Rows:
        """All entries ``[B, R, dim]`` after the tokens that ``project`` made ``kv, gate`` of."""
        if state is None:
            entries = kernels.compress(kv, gate, self.ape, self.ratio, self.overlap)
            return self.finished(entries, run) if entries.shape[1] else entries.to(run.nx.dtype)
        state = cast("AttentionState", state)  # as every layer with a compressor has it
        span = state.raw(self.which, kv, self.ratio, self.overlap)
        kernels.raw_rows(span, run.start, kv, gate, self.ape)
        new = state.blocks(self.which, self.ratio)
        if new is not None:
            raw, weights = new.chunk(2, -1)
            new = self.finished(kernels.pool(raw, weights, self.ratio, self.overlap), run)
        return state.rows(self.which, new)

    def each(
        self, projected: Sequence[Tensor], run: Pass, state: WindowState
    ) -> looking.Pooled:
        """What ``looking`` has to know to do the same."""
        kv, gate = projected
        return looking.Pooled(
            kv, gate, self.ape, self.dim, self.overlap, self.norm.weight, self.norm.eps,
            run.turn(True, self.ratio), *cast("AttentionState", state).table(self.which),
        )

    def finished(self, entries: Tensor, run: Pass) -> Tensor:
        """Pooled blocks of a timeline as they are kept: normed, turned and rounded."""
        first = run.start // self.ratio * self.ratio
        entries = self.norm(entries.to(run.nx.dtype))
        entries = kernels.rope(entries, run.rotation(True, first, entries.shape[1], self.ratio))
        if self.rotate:
            return fp4_rotated(entries, run.nx)
        return kv_rounded(entries, run.nx, run.config.qk_rope_head_dim)


class Indexer(nn.Module):
    """Chooses the ``index_topk`` compressed entries that each token of a CSA layer attends to."""

    def __init__(self, c: V4Config) -> None:
        super().__init__()
        self.heads, self.dim, self.topk = c.index_n_heads, c.index_head_dim, c.index_topk
        self.scale = self.dim**-0.5 * self.heads**-0.5
        self.wq_b = Linear(c.q_lora_rank, self.heads * self.dim, "fp8")
        self.weights_proj = Linear(c.hidden_size, self.heads)
        self.compressor = Compressor(c, 4, self.dim, rotate=True)

    def project(
        self, x: Tensor, q_latent: Tensor, turn: Tensor, run: Pass
    ) -> tuple[Tensor, ...]:
        """Of each token: the compressor's two inputs and, unless all entries fit in the top-k,
        queries ``[B, T, H, D]`` and weights of the heads ``[B, T, H]``.

        No gradient goes from the indexer to the layers before it."""
        x, q_latent = x.detach(), q_latent.detach()
        pooled = self.compressor.project(x, run.nx)
        if run.longest // 4 <= self.topk and not run.trains_indexers:
            return pooled
        q = self.wq_b(q_latent, run.nx).unflatten(-1, (self.heads, self.dim))
        q = fp4_rotated(kernels.rope(q, turn.unsqueeze(-3)), run.nx)
        return *pooled, q, kernels.scaled(self.weights_proj(x, run.nx), self.scale)

    def choose(self, keys: Rows, query: Sequence[Tensor], run: Pass) -> Tensor | None:
        """Entries to attend to, ``[B, T, k]``; None while all visible ones fit in the top-k."""
        if run.dense or keys.shape[1] <= self.topk:
            return None
        q, weights = query
        with torch.no_grad():
            return kernels.index_topk(q, keys, weights, run.start, 4, self.topk)


class Attention(nn.Module):
    """Window + compressed attention. ``ratio`` 0: window only; 4: CSA; more: HCA."""

    compressor: Compressor | None
    indexer: Indexer | None

    def __init__(self, c: V4Config, ratio: int) -> None:
        super().__init__()
        self.c, self.ratio = c, ratio
        heads = c.num_attention_heads * c.head_dim
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank, "fp8")
        self.q_norm = Norm(c.q_lora_rank, c.rms_norm_eps)
        self.wq_b = Linear(c.q_lora_rank, heads, "fp8")
        self.wkv = Linear(c.hidden_size, c.head_dim, "fp8")
        self.kv_norm = Norm(c.head_dim, c.rms_norm_eps)
        self.wo_a = Linear(heads // c.o_groups, c.o_groups * c.o_lora_rank, "fp8")
        self.wo_b = Linear(c.o_groups * c.o_lora_rank, c.hidden_size, "fp8")
        self.attn_sink = parameter(c.num_attention_heads)
        self.compressor = Compressor(c, ratio, c.head_dim, rotate=False) if ratio else None
        self.indexer = Indexer(c) if ratio == 4 else None
        self.how: dict[str, Any] = {
            "ratio": ratio, "width": c.sliding_window, "scale": c.head_dim**-0.5
        }

    def project(self, x: Tensor, turn: Tensor, run: Pass) -> tuple[Tensor, ...]:
        """Of each token ``x [B, T, d]``, all that others or itself will look at: its queries
        ``[B, T, H, D]``, its entry ``[B, T, D]``, and what compressor and indexer project."""
        c, nx = self.c, run.nx
        xr = self.wq_a.rounded(x, nx)
        latent = self.q_norm(self.wq_a(xr, nx))
        latent_r = self.wq_b.rounded(latent, nx)
        q = self.wq_b(latent_r, nx).unflatten(-1, (c.num_attention_heads, c.head_dim))
        norm_rope = reference.norm_rope if nx.placed else kernels.norm_rope
        q = norm_rope(q, turn, c.rms_norm_eps)
        kv = kernels.rope(self.kv_norm(self.wkv(xr, nx)), turn)
        kv = kv_rounded(kv, nx, c.qk_rope_head_dim)
        tokens = [q, kv]
        if self.compressor is not None:
            tokens += self.compressor.project(x, nx)
        if self.indexer is not None and not (run.dense and not run.trains_indexers):
            with run.indexing():
                tokens += self.indexer.project(x, latent_r, turn, run)
        return tuple(tokens)

    def look(self, tokens: Sequence[Tensor], run: Pass, layer: int) -> Tensor:
        """All that looks across tokens, which ``project`` gave: outputs ``[B, T, H, D]``."""
        losses: Sequence[Tensor] = ()
        if run.places is not None:
            out = self.look_each(tokens, run, layer)
        elif run.parts:
            lengths = [part.ids.shape[1] for part in run.parts]
            pieces = zip(*(t.split(lengths, 1) for t in tokens), strict=True)
            done = [self.attend(piece, part, part.state(layer))[0]
                    for part, piece in zip(run.parts, pieces, strict=True)]
            out = torch.cat(done, 1)
        elif run.packing is None:
            out, losses = self.attend(tokens, run, run.state(layer))
        else:
            out, losses = self.attend_packed(tokens, run, run.packing)
        if run.noted is not None:
            run.noted.divergences += [loss.mean() for loss in losses]
        return out

    def look_each(self, tokens: Sequence[Tensor], run: Pass, layer: int) -> Tensor:
        """``look`` for few tokens, of any timelines, at once."""
        q, kv, *projected = tokens
        state = (run.parts or [run])[0].state(layer)
        assert state is not None and run.places is not None
        pooled, query = [], None
        if self.compressor is not None:
            pooled.append(self.compressor.each(projected[:2], run, state))
        if self.indexer is not None:
            pooled.append(self.indexer.compressor.each(projected[2:4], run, state))
            if len(projected) > 4:
                query = projected[4], projected[5], self.indexer.topk
        return looking.look_each(
            q, kv, run.places, layer, pooled, query, self.attn_sink, **self.how
        )

    def output(self, out: Tensor, turn: Tensor, run: Pass) -> Tensor:
        """What the heads' outputs ``[B, T, H, D]`` add up to, ``[B, T, d]``."""
        c, nx = self.c, run.nx
        out = kernels.rope(out, turn.unsqueeze(-3), inverse=True)
        grouped = kernels.grouped_linear(
            out.flatten(-2).unflatten(-1, (c.o_groups, -1)), *self.wo_a.stored(nx), nx.dtype
        ).flatten(-2)
        projected: Tensor = self.wo_b(self.wo_b.rounded(grouped, nx), nx)
        return projected

    def attend(
        self, tokens: Sequence[Tensor], run: Pass, state: WindowState | None
    ) -> tuple[Tensor, list[Tensor]]:
        """``look`` within one timeline; and the indexer's loss ``[B, T]``."""
        q, kv, *projected = tokens
        window = kv
        if state is not None:
            span = state.window(kv)
            window = span.rows
            window[:, -kv.shape[1] :] = kv
        rows, chosen, losses = self.visible(q, window, projected, run, state)
        out = kernels.attention(
            q, window, rows, chosen, self.attn_sink, start=run.start, dtype=run.nx.dtype, **self.how
        )
        return out, losses

    def attend_packed(
        self, tokens: Sequence[Tensor], run: Pass, packing: Packing
    ) -> tuple[Tensor, list[Tensor]]:
        """``attend`` within each sample of a row."""
        q, kv, *projected = tokens
        split = packing.split if run.trains_indexers else lambda t: [t] * len(packing.shapes)
        parts = zip(*map(split, (q, kv)), *map(packing.split, projected), strict=True)
        done = [self.visible(q, window, rest, run, None) for q, window, *rest in parts]
        rows, chosen, losses = zip(*done, strict=True)
        out = kernels.packed_attention(
            q, kv, rows, chosen, self.attn_sink, packing, dtype=run.nx.dtype, **self.how
        )
        return out, [packing.join(loss) for loss in zip(*losses, strict=True)]

    def visible(
        self, q: Tensor, window: Tensor, projected: Sequence[Tensor], run: Pass,
        state: WindowState | None,
    ) -> tuple[Rows | None, Tensor | None, list[Tensor]]:
        """Compressed rows, which of them each token attends to (None: all before it), and the loss
        of the indexer, which alone needs ``q`` and ``window``."""
        if self.compressor is None:
            return None, None, []
        rows = self.compressor(*projected[:2], run, state)
        if self.indexer is None or len(projected) == 2:
            return rows, None, []
        with run.indexing():
            keys = self.indexer.compressor(*projected[2:4], run, state)
        query = projected[4:6]
        chosen = self.indexer.choose(keys, query, run)
        if not run.trains_indexers:
            return rows, chosen, []
        assert isinstance(keys, Tensor) and isinstance(rows, Tensor)
        index_q, weights = query
        sight = q, window, rows, chosen, self.attn_sink
        return rows, chosen, [kernels.index_loss(index_q, keys, weights, *sight, **self.how)]


# ---------------------------------------------------------------- experts


class Gate(nn.Module):
    """The router: which experts, with what weights."""

    bias: Tensor | None
    tid2eid: Tensor | None

    def __init__(self, c: V4Config, hashed: bool) -> None:
        super().__init__()
        self.c = c
        self.weight = parameter(c.n_routed_experts, c.hidden_size)
        self.register_parameter("bias", None if hashed else parameter(c.n_routed_experts))
        table = None
        if hashed:
            shape = (c.vocab_size, c.num_experts_per_tok)
            table = nn.Parameter(
                torch.empty(shape, dtype=torch.int64, device="meta"), requires_grad=False
            )
        self.register_parameter("tid2eid", table)

    def given(self, run: Pass) -> tuple[Tensor, ...]:
        """Experts ``[N, K]`` that do not depend on scores, if there are any."""
        if self.tid2eid is not None:
            if self not in run.shared:
                run.shared[self] = self.tid2eid[run.ids.flatten()]
            return (run.shared[self],)
        return () if run.routes is None else (run.routes[self],)

    def forward(self, x: Tensor, run: Pass, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts ``[N, K]`` and weights ``[N, K]`` (float32) of rows ``x [N, d]``."""
        c = self.c
        logits = kernels.linear(x, self.weight, None, torch.promote_types(x.dtype, torch.float32))
        scores, chosen, weights = kernels.route(
            logits, self.bias, given, c.num_experts_per_tok, c.norm_topk_prob,
            c.routed_scaling_factor,
        )  # fmt: skip
        if self.tid2eid is None and run.noted is not None:
            run.noted.balance.append((scores, chosen))
        return chosen, weights


class Expert(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)`` with clamped inputs."""

    def __init__(self, c: V4Config, width: int, fmt: str) -> None:
        super().__init__()
        self.limit = c.swiglu_limit
        self.w1 = Linear(c.hidden_size, width, fmt)
        self.w2 = Linear(width, c.hidden_size, fmt)
        self.w3 = Linear(c.hidden_size, width, fmt)

    def forward(self, xr: Tensor, nx: Numerics) -> Tensor:
        """``xr``: the input as ``w1.rounded`` gives it."""
        act = kernels.swiglu(self.w1(xr, nx), self.w3(xr, nx), self.limit, nx.dtype)
        down: Tensor = self.w2(self.w2.rounded(act, nx), nx)
        return down


class _Matrices:
    """One matrix of all experts, made ready when the kernel asks for it."""

    def __init__(self, experts: nn.ModuleList, name: str, nx: Numerics) -> None:
        self.experts, self.name, self.nx = list(experts), name, nx

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int, /) -> Stored:
        matrix = getattr(self.experts[expert], self.name)
        assert isinstance(matrix, Linear)
        return matrix.stored(self.nx)


class MoE(nn.Module):
    """Routed experts and the shared one, summed in float32."""

    def __init__(self, c: V4Config, hashed: bool) -> None:
        super().__init__()
        self.limit = c.swiglu_limit
        self.gate = Gate(c, hashed)
        fmt = c.expert_dtype
        self.experts = nn.ModuleList(
            Expert(c, c.moe_intermediate_size, fmt) for _ in range(c.n_routed_experts)
        )
        width = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = Expert(c, width, "fp8")
        self.source: ExpertSource | None = None  # in place of ``experts``
        self._frozen: dict[Numerics, tuple[_Matrices, _Matrices, _Matrices]] = {}

    def _matrices(self, nx: Numerics) -> tuple[_Matrices, _Matrices, _Matrices]:
        """w1, w2, w3 of all experts; the same objects each time for weights that do not change."""
        found = self._frozen.get(nx)
        if found is None:
            w1, w2, w3 = (_Matrices(self.experts, name, nx) for name in ("w1", "w2", "w3"))
            found = w1, w2, w3
            if not (self.gate.weight.requires_grad or torch.is_grad_enabled()):
                self._frozen[nx] = found
        return found

    def forward(self, x: Tensor, run: Pass, given: Tensor | None = None) -> Tensor:
        """``x [B, T, d]`` -> the same; ``given``: see ``Gate.given``."""
        flat = x.flatten(0, 1)
        ids, weights = self.gate(flat, run, given)
        xr = self.shared_experts.w1.rounded(flat, run.nx)  # all or no experts are quantised
        quantised = run.nx.official and self.shared_experts.w1.scale is not None
        how = self.limit, quantised, run.nx.dtype
        if self.source is None:
            y = kernels.routed_experts(xr, ids, weights, *self._matrices(run.nx), *how)
        else:
            self.source.expect(ids)
        shared: Tensor = self.shared_experts(xr, run.nx)
        if self.source is not None:
            y = self.source.routed(xr, ids, weights, *how)
        return kernels.add(y, shared, run.nx.dtype).view_as(x)


# ---------------------------------------------------------------- blocks


class Block(nn.Module):
    """Attention and MoE, each reading a mix of the streams and writing back into them."""

    def __init__(self, c: V4Config, ratio: int, hashed: bool) -> None:
        super().__init__()
        self.c = c
        self.attn_norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.attn = Attention(c, ratio)
        self.ffn_norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.ffn = MoE(c, hashed)
        h = c.hc_mult
        mixes = (2 + h) * h
        for site in ("attn", "ffn"):
            self.register_parameter(f"hc_{site}_fn", parameter(mixes, h * c.hidden_size))
            self.register_parameter(f"hc_{site}_base", parameter(mixes))
            self.register_parameter(f"hc_{site}_scale", parameter(3))

    def read(self, site: str, streams: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """A mix of the streams, and how what is made of it is written back into all of them."""
        c = self.c
        fn, scale, base = (getattr(self, f"hc_{site}_{p}") for p in ("fn", "scale", "base"))
        x, post, comb = kernels.hc_read(
            streams, fn, scale, base, c.hc_eps, c.rms_norm_eps, run.nx.dtype
        )
        return x, post, kernels.sinkhorn(comb, c.hc_sinkhorn_iters, c.hc_eps)

    def before(self, run: Pass, streams: Tensor, turn: Tensor) -> tuple[Tensor, ...]:
        """Of each token, what attention is about, and then how its output is written back."""
        x, post, comb = self.read("attn", streams, run)
        return post, comb, *self.attn.project(self.attn_norm(x), turn, run)

    def after(
        self, run: Pass, out: Tensor, turn: Tensor, streams: Tensor, post: Tensor, comb: Tensor,
        given: Tensor | None = None,
    ) -> tuple[Tensor]:
        """Of each token, the streams with attention's output, and then the experts', in them."""
        streams = kernels.hc_expand(self.attn.output(out, turn, run), streams, post, comb)
        x, post, comb = self.read("ffn", streams, run)
        y = self.ffn(self.ffn_norm(x), run, given)
        return (kernels.hc_expand(y, streams, post, comb),)

    def forward(self, streams: Tensor, run: Pass, layer: int) -> Tensor:
        """Streams ``[B, T, h, d]`` -> the same. ``layer``: which of the pass's states is its."""
        if run.recompute:
            return self._recomputed(streams, run, layer)
        turn, given = self.alongside(run)
        post, comb, *tokens = run.by_token(self.before, streams, turn)
        out = self.attn.look(tokens, run, layer)
        return run.by_token(self.after, out, turn, streams, post, comb, *given)[0]

    def alongside(self, run: Pass) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Of each token, beside its streams: its rotation, and experts that are given."""
        if run.places is not None and self.attn.ratio:
            run.turn(True, self.attn.ratio)  # for the compressors
        return run.turn(self.attn.ratio > 0), self.ffn.gate.given(run)

    def _recomputed(self, streams: Tensor, run: Pass, layer: int) -> Tensor:
        """``forward`` that keeps its input alone, and is done again for the gradient."""

        def once(streams: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[Tensor]]:
            # what is noted is returned, so that doing it again leaves no trace
            noted = Noted(run.trains_indexers)
            out = self(streams, replace(run, recompute=False, noted=noted), layer)
            return out, noted.balance, noted.divergences

        out: Tensor
        out, balance, divergences = checkpoint(
            once, streams, use_reentrant=False, preserve_rng_state=False
        )
        if run.noted is not None:
            run.noted.balance += balance
            run.noted.divergences += divergences
        return out


class _Collapsing(nn.Module):
    """Streams -> logits: a learned sum of the streams, the final norm, the head."""

    def make_collapse(self, c: V4Config) -> None:
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.hc_head_fn = parameter(c.hc_mult, c.hc_mult * c.hidden_size)
        self.hc_head_base = parameter(c.hc_mult)
        self.hc_head_scale = parameter(1)

    def collapse(self, streams: Tensor, run: Pass, head: Head, targets: Tensor | None) -> Tensor:
        """Float32 logits ``[..., V]`` of ``streams [..., h, d]``, or the losses of ``targets``."""
        c = run.config
        weights = self.hc_head_fn, self.hc_head_scale, self.hc_head_base
        x = self.norm(
            kernels.hc_head(streams, *weights, c.hc_eps, c.rms_norm_eps, run.nx.dtype)
        )
        if targets is not None:
            return kernels.cross_entropy(x, head.weight, targets)
        return kernels.head(x, head.weight)


class MTPEmbedding(nn.Module):
    """That of a Base checkpoint."""

    def __init__(self, c: V4Config) -> None:
        super().__init__()
        self.tok_emb = Embedding(c.vocab_size, c.hidden_size)


class MTPBlock(Block, _Collapsing):
    """Predicts token i + 2 from the trunk's streams at i and the embedding of token i + 1."""

    def __init__(self, c: V4Config) -> None:
        super().__init__(c, ratio=0, hashed=False)
        self.e_proj = Linear(c.hidden_size, c.hidden_size, "fp8")
        self.h_proj = Linear(c.hidden_size, c.hidden_size, "fp8")
        self.enorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.make_collapse(c)
        self.emb = MTPEmbedding(c) if c.is_base else None
        self.head = Head(c.vocab_size, c.hidden_size) if c.is_base else None

    def predict(self, streams: Tensor, run: Pass, embed: Embedding, layer: int) -> Tensor:
        """Streams ``[B, T, h, d]`` for the token after ``run.ids [B, T]``, which are the tokens
        after those that made ``streams``."""
        table = embed if self.emb is None else self.emb.tok_emb
        after = table(run.ids, run.nx.dtype)
        if run.places is None:
            return self.mixed(streams, after, run, layer)
        self.alongside(run)
        return run.by_token(self._each, streams, after, run.places, *run.shared.values())[0]

    def _each(
        self, run: Pass, streams: Tensor, after: Tensor, places: Tensor, *shared: Tensor
    ) -> tuple[Tensor]:
        return (self.mixed(streams, after, run.on_tape(places, shared), 0),)

    def mixed(self, streams: Tensor, after: Tensor, run: Pass, layer: int) -> Tensor:
        """``predict``, of the embeddings ``[B, T, d]`` of the tokens after."""
        nx = run.nx
        e, h = self.enorm(after), self.hnorm(streams)
        e = self.e_proj(self.e_proj.rounded(e, nx), nx)
        h = self.h_proj(self.h_proj.rounded(h, nx), nx)
        out: Tensor = self(kernels.add(h, e.unsqueeze(-2), nx.dtype), run, layer)
        return out


def _int64(numbers: Iterable[int]) -> Tensor:
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)  # faster than torch.tensor


class Transformer(_Collapsing):
    """The V4 network. Made without memory (meta device) until weights are given to it."""

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        ratios, hashed = config.compress_ratios, config.num_hash_layers
        blocks = [Block(config, ratios[i], i < hashed) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self._firsts = [  # all that layers share is what these need
            b for i, b in enumerate(blocks) if i < hashed or ratios.index(ratios[i]) == i
        ]
        self.head = Head(config.vocab_size, config.hidden_size)
        self.make_collapse(config)
        self.mtp = nn.ModuleList(MTPBlock(config) for _ in range(config.mtp_layers))
        # of a pass over ids, where experts have a source
        self.reading: Callable[[Tensor], AbstractContextManager[None]] | None = None
        self.tapes = kernels.Tapes()
        self._looking: dict[Numerics, bool] = {}

    # ------------------------------------------------------------ forward

    def start(
        self, ids: Tensor, nx: Numerics, lengths: Sequence[int] | None = None
    ) -> Pass:
        """What a forward pass over whole sequences ``ids [B, T]`` needs.

        With ``lengths`` the one row ``ids [1, N]`` is made of samples of so many tokens, each seen
        alone: positions, windows, compressed entries and the MTP block start anew.
        TrainingError when they do not add up to N.
        """
        if lengths is None:
            return Pass(self.config, nx, ids, 0)
        packing = Packing(lengths, ids.device)
        if ids.shape != (1, packing.tokens):
            raise TrainingError(
                "lengths do not describe this row",
                expected=f"one row of {packing.tokens} tokens",
                got=f"ids {list(ids.shape)}",
            )
        return Pass(self.config, nx, ids, 0, packing=packing)

    def resume(self, nx: Numerics, timelines: Sequence[Continued]) -> Pass:
        """What one forward pass over the new tokens of several timelines needs.

        They lie one after the other in the row ``ids [1, N]``, which only attention takes apart.
        With native kernels a timeline's result does not depend on the others, bit for bit.
        """
        few = sum(len(t.ids) for t in timelines) <= kernels.FEW and self.reading is None
        tapes = self.tapes if few and kernels.NATIVE else None
        places = None
        if tapes is not None and self._looks_each(nx) and all(
            state.begun for t in timelines for state in t.states
        ):
            places = _int64(
                number
                for t in timelines
                for i, token in enumerate(
                    zip(*(state.places(len(t.ids)) for state in t.states), strict=True)
                )
                for number in (t.start + i, *itertools.chain(*token))
            ).view(sum(len(t.ids) for t in timelines), -1)
        parts = [
            Pass(self.config, nx, _int64(t.ids)[None], t.start, t.states, tapes=tapes)
            for t in timelines
        ]
        if len(parts) == 1:
            parts[0].places = places
            return parts[0]
        ids = torch.cat([part.ids for part in parts], 1)
        return Pass(self.config, nx, ids, 0, parts=parts, tapes=tapes, places=places)

    def _looks_each(self, nx: Numerics) -> bool:
        """Whether ``looking`` takes what attention makes in these numerics."""
        if nx not in self._looking:
            c = self.config
            read = [t for name, t in self.named_parameters() if name.endswith((".ape", "_sink"))]
            widths = c.head_dim, c.qk_rope_head_dim, c.index_head_dim
            self._looking[nx] = looking.takes(nx.dtype, *widths, read)
        return self._looking[nx]

    def trunk(self, run: Pass, keep: list[Tensor] | None = None) -> Tensor:
        """Streams ``[B, T, h, d]`` after the last block; ``keep`` collects those after each."""
        streams: Tensor = self.embed(run.ids, run.nx.dtype).unsqueeze(2)
        streams = streams.expand(-1, -1, self.config.hc_mult, -1)
        if run.places is not None and keep is None:
            for block in self._firsts:
                block.alongside(run)
            return run.by_token(self._each, streams, run.places, *run.shared.values())[0].clone()
        with self.reading(run.ids) if self.reading is not None else nullcontext():
            for i, layer in enumerate(self.layers):
                streams = layer(streams, run, i)
                if keep is not None:
                    keep.append(streams)
        return streams if run.tapes is None else streams.clone()

    def _each(
        self, run: Pass, streams: Tensor, places: Tensor, *shared: Tensor
    ) -> tuple[Tensor]:
        """All blocks, for few tokens."""
        run = run.on_tape(places, shared)
        for i, layer in enumerate(self.layers):
            streams = layer(streams, run, i)
        return (streams,)

    def logits(self, streams: Tensor, run: Pass, targets: Tensor | None = None) -> Tensor:
        """Next-token logits ``[..., V]`` (float32) of streams; or of ``targets [N]`` the loss."""
        if targets is not None or run.tapes is None:
            return self.collapse(streams, run, self.head, targets)
        return run.by_token(self._logits, streams)[0].clone()

    def _logits(self, run: Pass, streams: Tensor) -> tuple[Tensor]:
        return (self.collapse(streams, run, self.head, None),)

    def mtp_streams(self, streams: Tensor, run: Pass) -> Tensor:
        """The MTP block's streams ``[B, T - 1, h, d]``; ``run`` made the trunk's ``streams``.

        Of packed samples ``[1, M, h, d]``: those of the M tokens with a successor in their sample
        (``Packing.followed``).
        """
        if not self.mtp:
            raise ConfigError(
                "this model has no MTP block", expected="num_nextn_predict_layers 1", got=0
            )
        if run.packing is None:
            streams = streams[:, :-1]
            after = replace(run, ids=run.ids[:, 1:], states=None, shared={})
        else:
            kept = run.packing.followed()
            streams = streams.index_select(1, kept)
            packing = Packing([n - 1 for n in run.packing.lengths if n > 1], run.ids.device)
            after = replace(run, ids=run.ids[:, kept + 1], packing=packing, shared={})
        return self._mtp.predict(streams, after, self.embed, len(self.layers))

    def mtp_ahead(self, streams: Tensor, run: Pass) -> Tensor:
        """``mtp_streams`` where ``run.ids`` are the tokens after those that made ``streams``, and
        ``run.states`` has what the block remembers, alone."""
        return self._mtp.predict(streams, run, self.embed, 0)

    def mtp_logits(self, mtp_streams: Tensor, run: Pass, targets: Tensor | None = None) -> Tensor:
        """As ``logits`` for the token after the next, from ``mtp_streams``."""
        if targets is not None or run.tapes is None:
            return self._mtp.collapse(mtp_streams, run, self._mtp.head or self.head, targets)
        return run.by_token(self._mtp_logits, mtp_streams)[0].clone()

    def _mtp_logits(self, run: Pass, streams: Tensor) -> tuple[Tensor]:
        return (self._mtp.collapse(streams, run, self._mtp.head or self.head, None),)

    @property
    def _mtp(self) -> MTPBlock:
        block = self.mtp[0]
        assert isinstance(block, MTPBlock)
        return block

    def forward(self, ids: Tensor, nx: Numerics = FLOAT32) -> Tensor:
        """Logits ``[B, T, V]`` of whole sequences ``ids [B, T]``."""
        run = self.start(ids, nx)
        return self.logits(self.trunk(run), run)

    # ------------------------------------------------------------ weights

    def load_weights(self, names: Iterable[str], tensor: Callable[[str], Tensor]) -> None:
        """Take stored tensors by their checkpoint names; no copy is made.

        The caller has checked names, shapes and dtypes (``checkpoint.Checkpoint.open``).
        """
        modules = dict(self.named_modules())
        for name in names:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor(name), requires_grad=False)
            setattr(modules[owner], leaf, parameter)
        for module in modules.values():
            if isinstance(module, MoE):
                module._frozen.clear()
        self.tapes.clear()
        self._looking.clear()
