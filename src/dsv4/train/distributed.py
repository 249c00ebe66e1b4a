"""The processes that train one model together: who has which samples, gradients and matrices.

Started by torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT), the
ranks form a mesh ``[data, expert]``. Every rank takes its own samples of each batch. Parameters
are the same on all ranks, except that the routed experts are divided along ``expert``: a rank
holds every n-th, and tokens travel to their experts and back (all-to-all). Gradients are summed
over the ranks that hold a parameter. Each parameter, matrices whole, is updated by one rank, which
alone has the optimizer's state of it and then tells the others. Nothing here knows the
transport: torch.distributed chooses one for the devices there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .. import kernels
from ..errors import TrainingError
from ..model import MoE, Pass, Transformer
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

    def divide(self, net: Transformer) -> None:
        """Leave this rank its share of the routed experts."""
        if self.mesh is not None and self.experts > 1:
            group = self.mesh.get_group("expert")
            for block in [*net.layers, *net.mtp]:
                block.ffn = DividedMoE(block.ffn, group)

    def owned(self, net: Transformer) -> set[str]:
        """The parameters that this rank updates: about as much work as the others have."""
        if self.mesh is None:
            return set(_trained(net))
        owned = set()
        for group, names in self._by_group(_trained(net)).items():
            for name, owner in zip(names, self._owners(group, names), strict=True):
                if owner == group.rank():
                    owned.add(name)
        return owned

    def tell_updates(self, net: Transformer) -> None:
        """Give every parameter to all its holders, from the one that has updated it."""
        for group, names in self._by_group(_trained(net)).items():
            owners = self._owners(group, names)
            for rank in range(group.size()):
                mine = [t for t, owner in zip(names.values(), owners, strict=True) if owner == rank]
                for bucket in _buckets(mine):
                    with _flattened(bucket) as flat:
                        dist.broadcast(flat, group=group, group_src=rank)

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum gradients in place over the ranks that hold their parameter."""
        for group, some in self._by_group(gradients).items():
            for bucket in _buckets(some.values()):
                with _flattened(bucket) as flat:
                    dist.all_reduce(flat, group=group)

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The norm of the gradients of all parameters, wherever they are."""
        divided_ones = [g for n, g in gradients.items() if self._is_divided(n)]
        rest = [g for n, g in gradients.items() if not self._is_divided(n)]
        squares = torch.nn.utils.get_total_norm(divided_ones).double().square()
        if self.mesh is not None and self.experts > 1:
            dist.all_reduce(squares, group=self.mesh.get_group("expert"))
        return float((torch.nn.utils.get_total_norm(rest).double().square() + squares).sqrt())

    def _is_divided(self, name: str) -> bool:
        return self.experts > 1 and ".experts." in name

    def _by_group(
        self, tensors: Mapping[str, Tensor]
    ) -> dict[dist.ProcessGroup, dict[str, Tensor]]:
        """Tensors by the group of ranks that hold them; nothing when there is one rank."""
        if self.mesh is None:
            return {}
        groups: dict[dist.ProcessGroup, dict[str, Tensor]] = {}
        everyone, data = dist.group.WORLD, self.mesh.get_group("data")
        assert everyone is not None
        for name, t in tensors.items():
            group = data if self._is_divided(name) else everyone
            groups.setdefault(group, {})[name] = t
        return groups

    @staticmethod
    def _owners(group: dist.ProcessGroup, tensors: Mapping[str, Tensor]) -> list[int]:
        work = [  # Newton-Schulz, or AdamW
            t.numel() * (min(t.shape) if uses_muon(name, t) else 1) for name, t in tensors.items()
        ]
        return divided(work, group.size())


def divided(sizes: Sequence[int], parts: int) -> list[int]:
    """The part, 0 to ``parts - 1``, of each item, so that the sums of sizes are nearly equal:
    the largest first, each to the part that has least."""
    owner, sums = [0] * len(sizes), [0] * parts
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = sums.index(min(sums))
        sums[owner[i]] += sizes[i]
    return owner


def _trained(net: Transformer) -> dict[str, Tensor]:
    return {name: p.data for name, p in net.named_parameters() if p.requires_grad}


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in groups of about BUCKET elements."""
    bucket: list[Tensor] = []
    for t in tensors:
        bucket.append(t)
        if sum(each.numel() for each in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


@contextmanager
def _flattened(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """One vector of all elements; what is done to it is done to the tensors."""
    flat = torch.cat([t.flatten() for t in tensors])
    yield flat
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


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

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        flat = x.flatten(0, 1)
        ids, weights = self.gate(flat, run.ids.flatten(), run)
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
