"""The numbers of DeepSeek's own code, reproduced within the noise of that code itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import dsv4
from dsv4 import kernels, quant
from dsv4.rotary import rotary_frequencies

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
SETS = ("flash-like", "pro-like")
pytestmark = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="the conformance vectors are not beside the checkout"
)


def run_all(name: str, numerics: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ours, expected): prefill, one-token decode and MTP logits, and the streams."""
    model = dsv4.load(VECTORS / name, numerics=numerics)
    meta = json.loads((VECTORS / name / "meta.json").read_text())
    kind = {"float32": "fp32", "official": "bf16"}[numerics]
    expected = load_file(VECTORS / name / f"expected_{kind}.safetensors")
    ids = expected["input_ids"][0].tolist()
    prompt, rest = ids[: meta["n_prompt"]], ids[meta["n_prompt"] :]
    session = model.session()
    session.extend(prompt)
    ours = {
        "prefill_logits": model.logits(prompt),
        "decode_logits": torch.cat([session.extend([i]) for i in rest]),
        "mtp_logits": model.mtp_logits(prompt)[-32:],
    }
    for i, streams in enumerate(model.streams(prompt)):
        ours[f"prefill_hidden.{i}"] = streams[-8:]
    return ours, expected


@pytest.mark.parametrize("name", SETS)
def test_float32_is_the_structural_truth(name: str) -> None:
    ours, expected = run_all(name, "float32")
    for key in ("prefill_logits", "decode_logits", "mtp_logits"):
        assert torch.equal(ours[key].argmax(-1), expected[key].argmax(-1)), key
        torch.testing.assert_close(ours[key], expected[key], atol=1e-4, rtol=0)
    for key in (k for k in expected if k.startswith("prefill_hidden")):
        torch.testing.assert_close(ours[key], expected[key], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", SETS)
def test_official_numerics_are_within_the_noise(name: str) -> None:
    ours, expected = run_all(name, "official")
    meta = json.loads((VECTORS / name / "meta.json").read_text())
    for key, (mean, largest) in meta["bf16_noise_floor_kl_mean_max"].items():
        p, q = expected[key].float().log_softmax(-1), ours[key].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        assert kl.mean() <= 2 * mean, key
        assert kl.max() <= 4 * largest, key
    wanted = expected["prefill_hidden.0"].float()
    error = (ours["prefill_hidden.0"].float() - wanted).norm() / wanted.norm()
    assert error <= 0.35 * meta["block0_relative_error"]["no_activation_rounding"]


@pytest.fixture(scope="module")
def ops() -> dict[str, Tensor]:
    return load_file(VECTORS / "ops.safetensors")


def within_an_ulp(ours: Tensor, expected: Tensor) -> None:
    """Equal but for one unit in the last place of bfloat16."""
    assert ours.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=1e-30)


def test_rounding_of_activations(ops: dict[str, Tensor]) -> None:
    codes, scale = quant.fp8_act(ops["act_quant_fp8.x"])
    assert torch.equal(codes.view(torch.uint8), ops["act_quant_fp8.q"].view(torch.uint8))
    assert torch.equal(scale, ops["act_quant_fp8.scale"].float())
    both = codes.float().unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)
    assert torch.equal(quant.fp8_round(ops["act_quant_fp8.x"]).float(), both.flatten(-2))
    half = quant.fp8_round(ops["act_quant_fp8.x"], 64)
    assert torch.equal(half, ops["act_quant_fp8_block64_roundtrip.y"])
    assert torch.equal(quant.fp4_round(ops["fp4_roundtrip.x"]), ops["fp4_roundtrip.y"])
    within_an_ulp(quant.hadamard(ops["hadamard128.x"]), ops["hadamard128.y"])


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_quantised_linear(ops: dict[str, Tensor], fmt: str) -> None:
    x = quant.fp8_round(ops[f"{fmt}_linear.x"])
    stored = ops[f"{fmt}_linear.w"], ops[f"{fmt}_linear.scale"]
    within_an_ulp(kernels.linear(x, *stored, torch.bfloat16), ops[f"{fmt}_linear.y"])


def test_fp4_widens_to_fp8_exactly(ops: dict[str, Tensor]) -> None:
    stored = ops["fp4_linear.w"], ops["fp4_linear.scale"]
    wide = quant.fp4_to_fp8(*stored)
    assert torch.equal(quant.dequantize(*wide), quant.dequantize(*stored))


def test_sinkhorn(ops: dict[str, Tensor]) -> None:
    args = (ops["sinkhorn.mixes"], ops["sinkhorn.scale"], ops["sinkhorn.base"], 20, 1e-6)
    for key, ours in kernels.hc_split(*args)._asdict().items():
        torch.testing.assert_close(ours, ops[f"sinkhorn.{key}"], rtol=1e-5, atol=1e-6)


def test_attention_over_chosen_rows(ops: dict[str, Tensor]) -> None:
    """The reference lists keys per query; here each query's list is its window."""
    q, kv, idx = ops["sparse_attn.q"], ops["sparse_attn.kv"], ops["sparse_attn.idx"].long()
    out = []
    for t in range(q.shape[1]):
        keys = kv[:, idx[0, t][idx[0, t] >= 0]]
        out.append(
            kernels.attention(
                q[:, t : t + 1], keys, None, None, ops["sparse_attn.sink"],
                start=keys.shape[1] - 1, ratio=0, width=keys.shape[1],
                scale=q.shape[-1] ** -0.5, dtype=torch.bfloat16,
            )
        )
    within_an_ulp(torch.cat(out, 1), ops["sparse_attn.o"])


def test_yarn_angles(ops: dict[str, Tensor]) -> None:
    config = dsv4.V4Config.from_json(VECTORS / "flash-like")
    freqs = rotary_frequencies(config, compressed=True)
    for key, position in (("angles_at_1", 1), ("cos_sin_at_2047", 2047)):
        angles = torch.stack(((position * freqs).cos(), (position * freqs).sin()), -1)
        torch.testing.assert_close(angles, ops[f"yarn.{key}"], rtol=1e-5, atol=2e-5)


def test_top_k_prefers_the_best_visible_rows() -> None:
    torch.manual_seed(0)
    q, keys, w = torch.randn(1, 7, 3, 16), torch.randn(1, 9, 16), torch.randn(1, 7, 3)
    got = kernels.index_topk(q, keys, w, start=10, ratio=4, k=3)
    scores = (F.relu(torch.einsum("bthd,bsd->bths", q, keys)) * w.unsqueeze(-1)).sum(2)
    for t in range(7):
        seen = (10 + t + 1) // 4
        best = set(scores[0, t, :seen].topk(min(3, seen)).indices.tolist())
        assert {i for i in got[0, t].tolist() if i >= 0} == best
