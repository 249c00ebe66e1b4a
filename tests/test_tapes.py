"""What is put on a tape does the same again; what cannot be is not put on one."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4 import kernels
from dsv4.kernels import Stored

native = pytest.importorskip("dsv4.kernels.native", exc_type=ImportError)
BF16, F32 = torch.bfloat16, torch.float32


def activations(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_and_project(x: Tensor) -> tuple[Tensor, ...]:
    y = native.rms_norm(x, None, 1e-6)
    return y, native.linear(y, WEIGHT, None, F32)


WEIGHT = activations(48, 96, F32, 7)


def test_a_tape_does_what_was_recorded_to_other_inputs() -> None:
    tapes = kernels.Tapes()
    for seed in range(4):
        x = activations(3, 96, F32, seed)
        given = x if seed < 3 else x.t().contiguous().t()  # not as it lies in memory
        got = tapes.run("key", "name", norm_and_project, [given])
        for a, b in zip(got, norm_and_project(x), strict=True):
            assert torch.equal(a, b)
    assert not tapes.foreign
    with pytest.raises(ValueError, match="other inputs"):
        tapes.run("key", "name", norm_and_project, [activations(2, 96, F32)])


def test_each_thread_has_its_own_tapes() -> None:
    tapes, wrong = kernels.Tapes(), []

    def work(seed: int) -> None:
        for i in range(50):
            x = activations(2, 96, F32, 100 * seed + i)
            expected = norm_and_project(x)
            got = tapes.run("key", "name", norm_and_project, [x])
            wrong.extend(i for a, b in zip(got, expected, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def attend_alone(x: Tensor) -> tuple[Tensor]:
    q = x.view(1, 3, 1, 96)
    sink = torch.zeros(1)
    return (native.attention(
        q, x[None], None, None, sink, start=0, ratio=0, width=4, scale=1.0, dtype=F32,
    ),)  # fmt: skip


@pytest.mark.parametrize(
    "step",
    [
        lambda x: (native.rms_norm(x + 1, None, 1e-6),),  # a product of torch's
        lambda x: (native.rms_norm(x.to(BF16), None, 1e-6),),
        lambda x: (native.rms_norm(x.t().reshape(-1, 96), None, 1e-6),),  # a view that copies
        lambda x: (native.rms_norm(x, None, 1e-6) if x[0, 0] > 0 else x.clone(),),
        attend_alone,  # a kernel that reads memory that is not given
    ],
)  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_more_than_kernels_is_never_recorded(
    step: Callable[[Tensor], tuple[Tensor, ...]], inference: bool
) -> None:
    tapes = kernels.Tapes()
    with torch.inference_mode(inference):
        for seed in range(6):
            x = activations(3, 96, F32, seed)
            assert torch.equal(tapes.run("key", "name", step, [x])[0], step(x)[0])
    assert tapes.foreign


def test_tapes_outlive_what_was_made_for_one_call() -> None:
    """A table of experts that training makes for a call goes with it; its tape goes on."""
    ids, weights = torch.tensor([[0, 2, 5]]), torch.full((1, 3), 0.5)
    matrices = [[activations(128, 128, F32, 3 * e + i) for e in range(6)] for i in range(3)]

    def step(x: Tensor) -> tuple[Tensor]:
        tables = [[Stored(m, None) for m in some] for some in matrices]
        return (native.routed_experts(x, ids, weights, *tables, 10.0, False, F32),)

    tapes = kernels.Tapes()
    with torch.no_grad():
        for seed in range(8):
            x = activations(1, 128, F32, seed)
            assert torch.equal(tapes.run("key", "name", step, [x])[0], step(x)[0])
            if seed == 0:
                gc.collect()
    assert not tapes.foreign


def test_only_so_many_bytes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.kernels.tapes.MOST_BYTES", 20_000)
    tapes = kernels.Tapes()
    for key in [1, 2, 3, 1, 9, 2, 1]:
        x = activations(key, 96, F32, key)
        assert torch.equal(tapes.run(key, "name", norm_and_project, [x])[1], norm_and_project(x)[1])
        assert sum(tapes._mine.bytes.values()) <= 20_000
        few = 4 * key * (96 + 96 + 48) <= 5_000  # what goes in and what comes out
        assert (tapes._mine.steps[key]["name"] is not None) == few
