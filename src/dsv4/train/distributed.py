"""The processes that train one model together: who has which samples, gradients and matrices.

Started by torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT), the
ranks form a mesh ``[data, expert]``. Every rank takes its own samples of each batch.

Parameters are sharded by rows (FSDP2): a block's are whole on a rank only while it computes the
block. The routed experts may be divided along ``expert`` before: a rank computes every n-th, tokens
travel to their experts and back (all-to-all), and each expert is sharded along ``data`` alone.
Gradients are summed into shards likewise. Muon wants whole matrices, so every parameter has one
rank that owns it: there, gradients' shards come together, the optimizer's state lives, the update
is made, and its rows go out to the shards again. Nothing here knows the transport:
torch.distributed chooses one for the devices there are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from .. import kernels
from ..errors import TrainingError
from ..model import Block, Gate, MoE, MTPBlock, Pass, Transformer
from .data import Batch
from .optim import uses_muon

BUCKET = 1 << 24  # elements that travel together


class Ranks:
    """The processes of a run; a single one without a launcher.

    ``experts``: over how many ranks the routed experts are divided. TrainingError when it does
    not divide the number of ranks.
    """

    def __init__(self, experts: int = 1) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.experts = experts
        if experts < 1 or self.size % experts:
            raise TrainingError(
                "the experts cannot be divided so",
                expected=f"a divisor of the {self.size} processes",
                got=experts,
                hint="torchrun --nproc-per-node N -m dsv4.train ... --expert-parallel M",
            )
        self.mesh: DeviceMesh | None = None
        if self.size > 1:
            self.mesh = init_device_mesh(
                "cpu", (self.size // experts, experts), mesh_dim_names=("data", "expert")
            )

    @property
    def first(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the others."""
        if self.mesh is not None:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.mesh is not None:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.summed([float(flag)])[0])

    def summed(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        if self.mesh is None:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(t)
        return [float(x) for x in t]

    # ------------------------------------------------------------ samples

    def parts(self, batch: Batch, most: int = 0) -> list[Batch]:
        """The samples of a batch that this rank takes, in passes of about ``most`` tokens (0: all
        at once). All ranks have as many passes, and passes about as many tokens.

        TrainingError when there is not a sample for each.
        """
        samples = len(batch.lengths)
        if samples < self.size:
            raise TrainingError(
                "a batch has fewer samples than there are processes",
                expected=f"at least {self.size}",
                got=samples,
                hint="raise tokens_per_batch, or use fewer processes",
            )
        passes = -(-batch.ids.numel() // (self.size * most)) if most else 1
        count = self.size * min(passes, samples // self.size)
        if count == 1:
            return [batch]
        owners = divided(batch.lengths, count)
        ids, weights = (x.split(batch.lengths, 1) for x in batch[:2])
        out = []
        for number in range(self.rank, count, self.size):
            mine = [i for i, owner in enumerate(owners) if owner == number]
            out.append(
                Batch(
                    torch.cat([ids[i] for i in mine], 1),
                    torch.cat([weights[i] for i in mine], 1),
                    tuple(batch.lengths[i] for i in mine),
                )
            )
        return out

    # ------------------------------------------------------------ parameters

    def divide(self, net: Transformer) -> dict[str, nn.Parameter]:
        """Leave this rank its share of the network, and return the parameters it looks after.

        Those are whole: what it owns, to be updated here and shown to ``net`` by ``spread``, and
        the routers' biases and tables, which all ranks have. A single process has everything.
        """
        if self.mesh is None:
            return dict(net.named_parameters())
        if self.experts > 1:
            for block in [*net.layers, *net.mtp]:
                block.ffn = DividedMoE(block.ffn, self.mesh.get_group("expert"))
        held = {n: p for n, p in net.named_parameters() if _is_everywhere(net, n)}
        everywhere = set(held.values())
        for part in self._parts(net):
            held |= {
                n: nn.Parameter(p.detach().clone(), p.requires_grad)
                for n, p, owner in part.parameters()
                if owner == part.group.rank()
            }
        self._shard(net, everywhere)
        return held

    def _shard(self, net: Transformer, everywhere: set[nn.Parameter]) -> None:
        """Shard all parameters but those that are everywhere. Experts that are divided already are
        a unit of their own, over fewer ranks; what else their layer has is none of it."""
        assert self.mesh is not None
        world = init_device_mesh("cpu", (self.size,))
        blocks = [*net.layers, *net.mtp]
        units: list[tuple[nn.Module, DeviceMesh]] = [(net.embed, world)]
        for block in blocks:
            if self.experts > 1:
                moe = block.ffn
                units += [(moe.gate, world), (moe.shared_experts, world), (moe, self.mesh["data"])]
            units.append((block, world))
        for module, mesh in [*units, (net, world)]:
            methods = _METHODS.get(type(module), ())
            fully_shard(module, mesh=mesh, ignored_params=everywhere, reshard_after_forward=True)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # gradients of shares of a loss: summed
            module.set_force_sum_reduction_for_comms(True)
            for method in methods:
                register_fsdp_forward_method(module, method)
            if isinstance(module, (Block, DividedMoE)):
                module.register_forward_pre_hook(_touch)

    def gather(self, net: Transformer, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the ranks that own the parameters of these names.

        ``shards``: a tensor sharded like its parameter, for the same names on all ranks.
        """
        if self.mesh is None:
            return dict(shards)
        whole: dict[str, Tensor] = {}
        for part in self._parts(net):
            for bucket in part.buckets(shards):
                send = [
                    [_local(shards[n]) for n, _, owner in bucket if owner == rank]
                    for rank in range(part.group.size())
                ]
                mine = [(n, p) for n, p, owner in bucket if owner == part.group.rank()]
                whole |= {n: torch.empty(p.shape, dtype=p.dtype) for n, p in mine}
                _exchange(send, part.rows([whole[n] for n, _ in mine]), part.group)
        return whole

    def spread(self, net: Transformer, held: Mapping[str, Tensor]) -> None:
        """Give every parameter's rows to the ranks that have them in their shards, from its owner;
        ``held`` is what ``divide`` has returned."""
        if self.mesh is None:
            return
        with torch.no_grad():
            for part in self._parts(net):
                for bucket in part.buckets():
                    mine = [held[n] for n, _, owner in bucket if owner == part.group.rank()]
                    receive = [
                        [_local(p) for _, p, owner in bucket if owner == rank]
                        for rank in range(part.group.size())
                    ]
                    _exchange(part.rows(mine), receive, part.group)

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The norm of the gradients of all parameters, wherever their shards are."""
        mine = torch.nn.utils.get_total_norm([_local(g) for g in gradients.values()])
        return math.sqrt(self.summed([float(mine) ** 2])[0])

    def _parts(self, net: Transformer) -> list[_Part]:
        """The parameters that are sharded, by the group of ranks that they are sharded over."""
        assert self.mesh is not None and dist.group.WORLD is not None
        groups: dict[dist.ProcessGroup, dict[str, Tensor]] = {}
        for name, p in net.named_parameters():
            if not _is_everywhere(net, name):
                divided_one = self.experts > 1 and ".experts." in name
                group = self.mesh.get_group("data") if divided_one else dist.group.WORLD
                groups.setdefault(group, {})[name] = p
        return [_Part(group, some) for group, some in groups.items()]


class _Part:
    """Parameters sharded over one group of ranks, and who owns each."""

    def __init__(self, group: dist.ProcessGroup, named: Mapping[str, Tensor]) -> None:
        self.group, self.named = group, named
        work = [  # Newton-Schulz, or AdamW
            p.numel() * (min(p.shape) if uses_muon(name, p) else 1) for name, p in named.items()
        ]
        self.owners = divided(work, group.size())

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Name, parameter, and rank in the group of its owner."""
        for (name, p), owner in zip(self.named.items(), self.owners, strict=True):
            yield name, cast(nn.Parameter, p), owner

    def buckets(
        self, only: Iterable[str] | None = None
    ) -> Iterator[list[tuple[str, nn.Parameter, int]]]:
        """The parameters, or those of these names, in groups of about BUCKET elements."""
        wanted = self.named.keys() if only is None else set(only)
        bucket, size = [], 0
        for each in self.parameters():
            if each[0] in wanted:
                bucket.append(each)
                size += each[1].numel()
                if size >= BUCKET:
                    yield bucket
                    bucket, size = [], 0
        if bucket:
            yield bucket

    def rows(self, whole: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of every rank in the group, its rows of each of these tensors: the shards."""
        size = self.group.size()
        heights = [-(-len(t) // size) for t in whole]
        return [
            [t[n * rank : n * (rank + 1)] for t, n in zip(whole, heights, strict=True)]
            for rank in range(size)
        ]


def divided(sizes: Sequence[int], parts: int) -> list[int]:
    """The part, 0 to ``parts - 1``, of each item, so that the sums of sizes are nearly equal:
    the largest first, each to the part that has least."""
    owner, sums = [0] * len(sizes), [0] * parts
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = sums.index(min(sums))
        sums[owner[i]] += sizes[i]
    return owner


def _is_everywhere(net: Transformer, name: str) -> bool:
    """Routers' biases and tables: small, not made by the optimizer, the same on all ranks."""
    owner, _, leaf = name.rpartition(".")
    return leaf != "weight" and isinstance(net.get_submodule(owner), Gate)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _exchange(
    send: Sequence[Sequence[Tensor]], receive: Sequence[Sequence[Tensor]], group: dist.ProcessGroup
) -> None:
    """Send each rank of the group its list of tensors, and fill those that come from each."""
    out = torch.cat([torch.empty(0), *(t.flatten() for some in send for t in some)])
    into = out.new_empty(sum(t.numel() for some in receive for t in some))
    arrive, leave = ([sum(t.numel() for t in some) for some in x] for x in (receive, send))
    dist.all_to_all_single(into, out, arrive, leave, group)
    begin = 0
    for t in (t for some in receive for t in some):
        t.copy_(into[begin : begin + t.numel()].view_as(t))
        begin += t.numel()


# what else than ``forward`` computes with a unit's parameters
_METHODS: dict[type, tuple[str, ...]] = {
    MTPBlock: ("predict", "collapse"),
    Transformer: ("trunk", "logits", "mtp_streams", "mtp_logits"),
}


def _touch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook before ``forward``: every parameter of the unit gets a gradient, if only zero.

    Which experts, compressors and indexers a rank needs depends on its samples, but all ranks
    must sum the same gradients.
    """
    if not torch.is_grad_enabled():
        return args
    mine = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    touched = _Touch.apply(args[0], *mine)  # type: ignore[no-untyped-call]
    return (touched, *args[1:])


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.like)


# ------------------------------------------------------------------ experts on several ranks


class DividedMoE(MoE):
    """A layer of which this rank holds every n-th routed expert, n being the group's size.

    Tokens travel to the ranks of their experts and the results back; numbers are those of the
    whole layer.
    """

    def __init__(self, whole: MoE, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.limit, self.gate, self.shared_experts = whole.limit, whole.gate, whole.shared_experts
        self.group, self.n = group, group.size()
        mine = range(group.rank(), len(whole.experts), self.n)
        held = nn.ModuleDict({str(i): whole.experts[i] for i in mine})  # names stay as they are
        self.experts = cast(nn.ModuleList, held)

    def forward(self, x: Tensor, run: Pass, given: Tensor | None = None) -> Tensor:
        flat = x.flatten(0, 1)
        ids, weights = self.gate(flat, run, given)
        to = (ids % self.n).flatten()
        order = to.argsort(stable=True)
        rows = order // ids.shape[1]
        send = torch.bincount(to, minlength=self.n)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=self.group)
        route = _Route(send.tolist(), receive.tolist(), self.group)
        theirs, shares = _travel(flat[rows], weights.flatten()[order], route)
        experts = route.travel((ids // self.n).flatten()[order])
        if len(theirs):
            w1, w2, w3 = (
                [getattr(expert, name).stored(run.nx) for expert in self.experts.children()]
                for name in ("w1", "w2", "w3")
            )
            done = kernels.routed_experts(
                theirs, experts[:, None], shares[:, None],
                w1, w2, w3, self.limit, False, run.nx.dtype,
            )  # fmt: skip
        else:  # still a part of the graph: the others wait for this rank's gradients
            done = theirs.float() * shares[:, None]
        back, _ = _travel(done, shares, route.reversed())
        y = torch.zeros_like(flat, dtype=done.dtype).index_add(0, rows, back)
        shared: Tensor = self.shared_experts(flat, run.nx)
        return (y + shared.to(y.dtype)).to(run.nx.dtype).view_as(x)


class _Route(NamedTuple):
    """How many rows go to and come from each rank of a group."""

    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup

    def travel(self, x: Tensor) -> Tensor:
        out = x.new_empty((sum(self.receive), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), self.receive, self.send, self.group)
        return out

    def reversed(self) -> _Route:
        return _Route(self.receive, self.send, self.group)


def _travel(x: Tensor, w: Tensor, route: _Route) -> tuple[Tensor, Tensor]:
    """Rows and their weights on their way to other ranks; gradients come back."""
    moved: tuple[Tensor, Tensor] = _Travel.apply(x, w, route)  # type: ignore[no-untyped-call]
    return moved


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, route: _Route) -> tuple[Tensor, Tensor]:
        ctx.route = route
        return route.travel(x), route.travel(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        back = ctx.route.reversed()
        return back.travel(grads[0]), back.travel(grads[1]), None
