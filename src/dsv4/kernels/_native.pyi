"""The C++ module (``native/module.cpp``): addresses and sizes."""

def isas() -> list[str]: ...
def isa() -> str: ...
def use(name: str) -> None: ...
def stay_awake(callers: int, /) -> None: ...
def linear(
    x: int, x_bf16: bool, rows: int, weight: int, scale: int, format: int, scale_bytes: int,
    outputs: int, inputs: int, groups: int, out: int, out_bf16: bool, threads: int, /,
) -> None: ...
def norm(
    x: int, bf16: bool, rows: int, width: int, weight: int, weight_bf16: bool, eps: float,
    out: int, threads: int, /,
) -> None: ...
def rope(
    x: int, bf16: bool, rows: int, width: int, rotation: int, turned: int, heads: int,
    positions: int, inverse: bool, out: int, threads: int, /,
) -> None: ...
def fp8_round(
    x: int, bf16: bool, rows: int, width: int, block: int, keep: int, out: int, threads: int, /
) -> None: ...
def hadamard_fp4(x: int, bf16: bool, rows: int, out: int, threads: int, /) -> None: ...
def hc_read(
    streams: int, bf16: bool, rows: int, h: int, d: int, fn: int, scale: int, base: int,
    eps: float, norm_eps: float, out: int, out_bf16: bool, post: int, comb: int, threads: int, /,
) -> None: ...
def hc_expand(
    x: int, x_bf16: bool, streams: int, bf16: bool, rows: int, h: int, d: int, post: int,
    comb: int, out: int, threads: int, /,
) -> None: ...
def sinkhorn(
    comb: int, rows: int, h: int, iters: int, eps: float, out: int, threads: int, /
) -> None: ...
def raw_rows(
    to: int, count: int, start: int, kv: int, gate: int, width: int, bias: int, ratio: int,
    threads: int, /,
) -> None: ...
def store(
    rows: int, is_bf16: bool, count: int, width: int, packed: int, kept: int, bytes: int,
    addresses: int, offset: int, each: int, first: int, threads: int, /,
) -> None: ...
def pool(
    kv: int, gate: int, blocks: int, stride: int, ratio: int, width: int, overlap: bool, out: int,
    threads: int, /,
) -> None: ...
def route(
    logits: int, rows: int, experts: int, bias: int, k: int, normalize: bool, scale: float,
    scores: int, chosen: int, weights: int, threads: int, /,
) -> None: ...
def swiglu(
    gate: int, up: int, bf16: bool, rows: int, width: int, limit: float, out: int, out_bf16: bool,
    threads: int, /,
) -> None: ...
def add(
    x: int, x_bf16: bool, y: int, y_bf16: bool, rows: int, width: int, each: int, out: int,
    out_bf16: bool, threads: int, /,
) -> None: ...

def scaled(x: int, is_bf16: bool, count: int, factor: float, out: int, threads: int, /) -> None: ...

Pieces = tuple[int, int, int, int]
Pooled = tuple[
    int, int, int, int, bool, int, bool, float, int, int, int, int, int, int, int
]

def attention(
    q: int, bf16: bool, queries: int, heads: int, width_of_head: int, window: int, earlier: int,
    width: int, rows: Pieces, kept: int, chosen: int, k: int, sink: int, start: int, ratio: int,
    scale: float, out: int, threads: int, /,
) -> None: ...
def look_each(
    q: int, is_bf16: bool, n: int, heads: int, width_of_head: int, kv: int, places: int,
    stride: int, column: int, pooled: list[Pooled], choice: tuple[int, int, int, int, int, int],
    width: int, sink: int, ratio: int, scale: float, out: int, threads: int, /,
) -> None: ...
def index_topk(
    q: int, bf16: bool, queries: int, heads: int, width: int, keys: Pieces, packed: bool,
    weights: int, start: int, ratio: int, k: int, out: int, threads: int, /,
) -> None: ...

def checksum(data: int, bytes: int, /) -> tuple[int, int]: ...

Address = tuple[int, int, int, int, int, int]

class Experts:
    def append(self, gate: Address, up: Address, down: Address, /) -> None: ...
    def run(
        self, x: int, x_bf16: bool, rows: int, ids: int, weights: int, k: int, limit: float,
        fp8: bool, out: int, threads: int, /,
    ) -> None: ...

def train_hc_collapse(
    streams: int, bf16: bool, rows: int, d: int, pre: int, x: int, threads: int, /
) -> None: ...
def train_hc_dots(
    streams: int, dx: int, bf16: bool, rows: int, d: int, dpre: int, threads: int, /
) -> None: ...
def train_hc_collapse_back(
    streams: int, dx: int, bf16: bool, rows: int, d: int, pre: int, factor: int, dstreams: int,
    threads: int, /,
) -> None: ...
def train_hc_squares(
    streams: int, bf16: bool, rows: int, d: int, out: int, threads: int, /
) -> None: ...
def train_hc_expand(
    out: int, streams: int, bf16: bool, rows: int, d: int, post: int, comb: int, fresh: int,
    threads: int, /,
) -> None: ...
def train_hc_expand_back(
    grad: int, out: int, streams: int, bf16: bool, rows: int, d: int, post: int, comb: int,
    dout: int, dstreams: int, dpost: int, dcomb: int, threads: int, /,
) -> None: ...
def train_sinkhorn(
    matrices: int, count: int, iters: int, eps: float, out: int, threads: int, /
) -> None: ...
def train_sinkhorn_back(
    matrices: int, grad: int, count: int, iters: int, eps: float, dmatrices: int, threads: int, /
) -> None: ...
def train_norm_rope(
    x: int, bf16: bool, rows: int, heads: int, d: int, turn: int, positions: int, width: int,
    norm: bool, inverse: bool, eps: float, out: int, threads: int, /,
) -> None: ...
def train_norm_rope_back(
    x: int, grad: int, bf16: bool, rows: int, heads: int, d: int, turn: int, positions: int,
    width: int, eps: float, dx: int, threads: int, /,
) -> None: ...
def train_norm(
    x: int, bf16: bool, rows: int, d: int, weight: int, eps: float, y: int, threads: int, /,
) -> None: ...
def train_norm_back(
    x: int, grad: int, bf16: bool, rows: int, d: int, weight: int, eps: float, dx: int,
    dweights: int, threads: int, /,
) -> None: ...
def train_row_dots(
    a: int, b: int, bf16: bool, batches: int, rows: int, stride_a: int, stride_b: int, d: int,
    out: int, threads: int, /,
) -> None: ...
def train_weigh(
    scores: int, bf16: bool, batches: int, queries: int, heads: int, keys: int, hidden: int,
    hidden_step: int, sink: int, threads: int, /,
) -> None: ...
def train_weigh_back(
    grad: int, p: int, bf16: bool, rows: int, keys: int, dots: int, scale: float, dsinks: int,
    threads: int, /,
) -> None: ...
def train_log_sums(
    x: int, bf16: bool, rows: int, count: int, out: int, threads: int, /,
) -> None: ...
def train_shares(
    x: int, bf16: bool, rows: int, count: int, sums: int, targets: int, scales: int,
    threads: int, /,
) -> None: ...
def train_swiglu(
    gate: int, up: int, bf16: bool, rows: int, width: int, weights: int, limit: float, act: int,
    threads: int, /,
) -> None: ...
def train_swiglu_back(
    gate: int, up: int, grad: int, bf16: bool, rows: int, width: int, weights: int, limit: float,
    dgate: int, dup: int, dweights: int, threads: int, /,
) -> None: ...
def train_pool(
    kv: int, gate: int, bias: int, bf16: bool, overlap: bool, ratio: int, dim: int,
    sequences: int, positions: int, out: int, threads: int, /,
) -> None: ...
def train_pool_back(
    kv: int, gate: int, bias: int, bf16: bool, overlap: bool, ratio: int, dim: int,
    sequences: int, positions: int, grad: int, dkv: int, dgate: int, threads: int, /,
) -> None: ...
def train_attends() -> bool: ...
def train_attend(
    q: int, kv: int, sink: int, heads: int, dim: int, width: int, scale: float, out: int,
    log_sum: int, samples: int, count: int, ratio: int, threads: int, /,
) -> None: ...
def train_attend_back(
    q: int, kv: int, sink: int, heads: int, dim: int, width: int, scale: float, out: int,
    log_sum: int, samples: int, count: int, ratio: int, grad: int, dq: int, dkv: int, dsinks: int,
    threads: int, /,
) -> None: ...

class Tape:
    @property
    def steps(self) -> int: ...
    @property
    def whole(self) -> bool: ...
    def input(self, address: int, bytes: int, /) -> None: ...
    def record(self) -> None: ...
    def stop(self) -> None: ...
    def run(self, given: list[tuple[int, int]], threads: int, /) -> None: ...
