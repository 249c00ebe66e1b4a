"""How fast a model runs on a machine: bytes over bandwidth, operations over compute, and what a
layer costs whatever it does.

A step takes the longer of reading (weights, KV) and computing, plus what crosses links, host
memory or the SSD, plus the engine's time per layer. Routing is taken as uniform, so ``u`` tokens
touch ``E (1 - (1 - k/E)^u)`` experts of a layer. No speculation: an MTP block multiplies decode by
the tokens it gets accepted per step.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..config import V4Config
from ..errors import ConfigError
from ..formats import FORMATS, inventory, with_format
from .flops import Flops, forward_flops
from .hardware import Engine, Machine
from .memory import entry_bytes, index_key_bytes, kv_bytes, tail_bytes

PREFILL_CHUNK = 4096
RUNTIME_BYTES = 2e9  # of a device: driver, communication buffers, captured graphs
BITS = {"q4": (4.5, 8.5), "q2": (2.25, 8.5)}
"""Bits per weight of routed experts and of other matrices in llama.cpp's and ds4's files:
Q4_K, or IQ2_XXS with Q2_K for w2; Q8_0. They are smaller but not the official numbers."""
QUANTIZATIONS = (*FORMATS, *BITS)
RATES = ("fp8", "fp8", "bf16", "bf16", "bf16", "fp4", "fp8")
"""The rate of each kind of operation in Flops: FP4 weights are widened for FP8 activations."""


class Sizes(NamedTuple):
    """Stored bytes: what every token reads (head included), the embedding, one routed expert, the
    number of those, the MTP block."""

    dense: float
    embed: float
    expert: float
    experts: int
    mtp: float

    @property
    def total(self) -> float:
        return self.dense + self.embed + self.expert * self.experts + self.mtp


def sizes(config: V4Config, quantization: str) -> Sizes:
    """Bytes of ``config`` in one of QUANTIZATIONS, from its inventory of tensors."""
    if quantization not in QUANTIZATIONS:
        raise ConfigError(
            "no such quantization", expected=", ".join(QUANTIZATIONS), got=quantization
        )
    official = quantization in FORMATS
    # experts are all alike: one is listed and stands for all
    one = replace(config, n_routed_experts=1, num_experts_per_tok=1)
    stored = inventory(with_format(one, quantization if official else "bf16"))
    all_experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    parts = {"dense": 0.0, "embed": 0.0, "experts": 0.0, "mtp": 0.0}
    for name, spec in stored.items():
        routed = ".experts." in name
        kind = "mtp" if name.startswith("mtp.") else "experts" if routed else "dense"
        kind = "embed" if name.startswith("embed.") else kind
        if official or spec.dtype != "BF16" or len(spec.shape) != 2:
            size = float(spec.bytes)
        else:
            size = spec.elements * BITS[quantization][not routed] / 8
        if routed or name.endswith((".gate.weight", ".gate.bias")):
            size *= all_experts
        elif name.endswith(".gate.tid2eid"):
            size *= chosen
        parts[kind] += size
    experts = config.num_hidden_layers * config.n_routed_experts
    return Sizes(
        parts["dense"], parts["embed"], parts["experts"] / experts, experts, parts["mtp"]
    )


@dataclass(frozen=True)
class Split:
    """How devices share a model: tensor (attention by heads, experts by their width), data-parallel
    attention with whole experts apart, pipeline; ``tensor * pipeline`` or ``expert`` devices."""

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1

    def __str__(self) -> str:
        parts = (("TP", self.tensor), ("EP", self.expert), ("PP", self.pipeline))
        return " x ".join(f"{name}{n}" for name, n in parts if n > 1) or "one device"


def splits(config: V4Config, devices: int) -> list[Split]:
    """The splits over ``devices`` that the model's shape allows.

    Tensor: it must divide the heads' output groups and leave experts whole FP8 blocks. Expert: it
    must divide the routed experts. Pipeline: at least a layer each.
    """

    def tensor_ok(n: int) -> bool:
        return not (config.o_groups % n or config.moe_intermediate_size // 128 % n)

    found = []
    for tensor in range(1, devices + 1):
        pipeline = devices // tensor
        fits = devices % tensor == 0 and pipeline <= config.num_hidden_layers
        if fits and tensor_ok(tensor):
            found.append(Split(tensor=tensor, pipeline=pipeline))
    if devices > 1 and config.n_routed_experts % devices == 0:
        found.append(Split(expert=devices))
    return found


class Placement(NamedTuple):
    """Where the weights are: the split, what one device must hold, and the shares of the routed
    experts that lie on devices, in host memory and on the SSD."""

    split: Split
    device_bytes: float
    on_device: float
    on_host: float
    on_ssd: float

    @property
    def experts(self) -> str:
        """The slowest place that holds experts."""
        if self.on_ssd:
            return "on the SSD"
        return "in host memory" if self.on_host else "on the devices"


class Timing(NamedTuple):
    """Seconds of a step, by resource; compute overlaps with memory."""

    memory: float
    compute: float
    link: float
    host: float
    ssd: float
    layers: float

    @property
    def total(self) -> float:
        return max(self.memory, self.compute) + self.link + self.host + self.ssd + self.layers

    @property
    def binding(self) -> str:
        """The resource that takes longest."""
        names = {
            "memory": "memory bandwidth", "compute": "compute", "link": "links",
            "host": "host memory bandwidth", "ssd": "SSD", "layers": "time per layer (latency)",
        }  # fmt: skip
        return names[max(self._fields, key=lambda name: getattr(self, name))]


class Speed:
    """A model on a machine: where its weights go and how long steps take."""

    def __init__(
        self, config: V4Config, machine: Machine, engine: Engine, quantization: str
    ) -> None:
        self.config, self.machine, self.engine = config, machine, engine
        self.sizes = sizes(config, quantization)

    def on(self, machine: Machine, engine: Engine | None = None) -> Speed:
        """The same model on another machine, with the same or another engine."""
        other = copy(self)
        other.machine, other.engine = machine, engine or self.engine
        return other

    # ------------------------------------------------------------ memory

    def kv_of(self, users: int, context: int) -> float:
        """Bytes of all users' KV in the published formats, raw compressor tails included."""
        return users * (kv_bytes(self.config, context) + tail_bytes(self.config))

    def workspace(self, users: int) -> float:
        """Bytes of activations of a prefill chunk and of logits, and the runtime's own."""
        c = self.config
        per_token = 3 * c.hc_mult * c.hidden_size * 2 + 2 * c.num_attention_heads * c.head_dim * 2
        per_token += (c.num_experts_per_tok + 1) * (c.hidden_size + 2 * c.moe_intermediate_size) * 2
        logits = users * c.vocab_size * 4
        runtime = min(RUNTIME_BYTES, 0.05e9 * self.machine.device.memory)
        return PREFILL_CHUNK * per_token + logits + runtime

    def device_bytes(self, split: Split, users: int, context: int, experts: float = 1.0) -> float:
        """What the fullest device holds, with a share ``experts`` of the routed experts.

        The single KV head is not divided by tensor parallelism: each device has all of it.
        """
        s, n = self.sizes, self.machine.count
        kv, routed = self.kv_of(users, context), s.expert * s.experts * experts
        rest = s.dense + s.embed + s.mtp
        if split.expert > 1:
            weights, kv = rest + routed / n, kv * -(-users // n) / users
        else:
            weights, kv = (rest + routed) / n, kv / split.pipeline
        return weights + kv + self.workspace(users)

    def splits(self) -> list[Split]:
        """All splits over this machine's devices that the model's shape allows."""
        return splits(self.config, self.machine.count)

    def fits(self, users: int, context: int) -> bool:
        """Whether everything lies in device memory with some split."""
        room = self.machine.device.memory * 1e9
        return any(self.device_bytes(s, users, context) <= room for s in self.splits())

    def place(self, users: int, context: int, only: str | None = None) -> Placement | None:
        """The fastest placement that fits, with all experts on devices if any has them there,
        else in host memory, else on the SSD; None if nothing fits.

        ``only`` names the one split to consider; ConfigError when the model has no such split.
        """
        device, n = self.machine.device, self.machine.count
        allowed = [split for split in self.splits() if only in (None, str(split))]
        if not allowed:
            names = ", ".join(str(split) for split in self.splits())
            raise ConfigError("no such split", expected=names, got=only)
        found = []
        for split in allowed:
            bare = self.device_bytes(split, users, context, 0.0)
            whole = self.device_bytes(split, users, context)
            room = device.memory * 1e9
            if bare > room:
                continue
            on_device = 1.0 if whole <= room else (room - bare) / (whole - bare)
            routed = self.sizes.expert * self.sizes.experts
            on_host = min(1 - on_device, 0.9 * device.host_memory * 1e9 * n / routed)
            on_ssd = 1 - on_device - on_host
            if on_ssd < 1e-9:
                on_host, on_ssd = 1 - on_device, 0.0
            if on_ssd and not device.ssd:
                continue
            found.append(Placement(split, min(whole, room), on_device, on_host, on_ssd))
        if not found:
            return None

        def rank(p: Placement) -> tuple[bool, bool, float]:
            return p.on_device < 1, p.on_ssd > 0, self.decode(p, users, context).total

        return min(found, key=rank)

    # ------------------------------------------------------------ time

    def touched(self, tokens: float) -> float:
        """Distinct routed experts of one layer that so many tokens choose."""
        e, k = self.config.n_routed_experts, self.config.num_experts_per_tok
        return float(e * (1 - (1 - k / e) ** tokens))

    def _kv_read(self, context: int) -> float:
        """Bytes of cache one token reads: windows, chosen or all entries, all index keys."""
        c, entry, key = self.config, entry_bytes(self.config), index_key_bytes(self.config)
        total = 0.0
        for ratio in c.compress_ratios[: c.num_hidden_layers]:
            total += min(context, c.sliding_window) * entry
            rows = context // ratio if ratio else 0
            total += min(rows, c.index_topk) * entry if ratio == 4 else rows * entry
            if ratio == 4 and rows > c.index_topk:
                total += rows * key
        return total

    def _compute(self, flops: Flops) -> float:
        device = self.machine.device
        rates = [device.compute(kind, self.engine.precision) * 1e12 for kind in RATES]
        return sum(f / rate for f, rate in zip(flops, rates, strict=True)) / self.engine.compute

    def _link(self, tokens: float, split: Split) -> float:
        """Two all-reduces a layer (tensor), or dispatch and combine of k copies (expert)."""
        c, group = self.config, max(split.tensor, split.expert)
        if group == 1 or not self.machine.device.link:
            return 0.0
        copies = 4 if split.tensor > 1 else 1.5 * c.num_experts_per_tok / group
        moved = tokens * c.num_hidden_layers * copies * c.hidden_size * 2 * (group - 1) / group
        return moved / (self.machine.device.link * 1e9)

    def _step(
        self, p: Placement, tokens: float, kv: float, flops: Flops, imbalance: float
    ) -> Timing:
        """``tokens`` in one pass, reading ``kv`` bytes of cache in all. ``imbalance``: load of the
        fullest device over the mean, where whole experts are apart."""
        device, n, s = self.machine.device, self.machine.count, self.sizes
        split, layers = p.split, self.config.num_hidden_layers
        routed = self.touched(tokens) * s.expert * layers
        if split.expert > 1:
            share = max(1 / n, 1 / self.touched(tokens)) * imbalance
            attending = min(n, max(1.0, tokens))  # devices that have a token
            read = s.dense + kv / attending + routed * p.on_device * share
            work = imbalance / attending
        else:
            read = (s.dense + routed * p.on_device) / split.tensor + kv
            work = 1 / split.tensor
        hosts = device.host_bandwidth * n or device.bandwidth * n
        return Timing(
            memory=read / (device.bandwidth * 1e9 * self.engine.bandwidth),
            compute=self._compute(flops) * work,
            link=self._link(tokens, split),
            host=routed * p.on_host / (hosts * 1e9 * self.engine.bandwidth),
            ssd=routed * p.on_ssd / (device.ssd * 1e9) if p.on_ssd else 0.0,
            layers=layers * self.engine.layer_us / 1e6,
        )

    def decode(
        self, p: Placement, users: int, context: int, imbalance: float = 1.0
    ) -> Timing:
        """One token for each of ``users``, each ``context`` tokens long.

        In a pipeline each stage has its share of the users, and every token visits all stages.
        """
        together, steps = (users, 1) if self.engine.batched else (1, users)
        batch = max(1.0, together / p.split.pipeline)
        flops = forward_flops(self.config, 1, start=max(0, context - 1))
        flops = flops.times([batch] * len(flops))
        one = self._step(p, batch, batch * self._kv_read(context), flops, imbalance)
        further = (batch - 1) * self.config.num_hidden_layers * self.engine.user_us / 1e6
        one = one._replace(layers=one.layers + further)
        return Timing(*(part * steps for part in one))

    def prefill(
        self, p: Placement, tokens: int, start: int = 0, imbalance: float = 1.0
    ) -> Timing:
        """A prompt of ``tokens`` after ``start`` cached ones, fed in chunks.

        With data-parallel attention this is its share of the machine while other prompts keep the
        other devices busy; alone it takes longer.
        """
        flops = forward_flops(self.config, tokens, start=start, logits=False)
        chunks = -(-tokens // PREFILL_CHUNK)
        each = flops.times([1 / chunks] * len(flops))
        kv = self._kv_read(start + tokens // 2)  # read once a chunk, not once a token
        one = self._step(p, tokens / chunks, kv, each, imbalance)
        # stages of a pipeline work on different chunks, but the last waits for all of them
        stages = p.split.pipeline
        times = (chunks + stages - 1) / stages
        return Timing(*(part * times for part in one))
