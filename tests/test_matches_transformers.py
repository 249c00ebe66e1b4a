"""An independent implementation computes the same float32 logits from the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.checkpoint import save_checkpoint
from dsv4.config import V4Config
from dsv4.convert import convert
from dsv4.synth import synthesize


@pytest.mark.slow
@pytest.mark.parametrize("ratios", [(0, 0, 4, 128, 4, 0), (128, 128, 4, 0)], ids=["flash", "pro"])
def test_float32_logits_agree(tmp_path: Path, ratios: tuple[int, ...]) -> None:
    transformers = pytest.importorskip("transformers")
    config = V4Config(
        vocab_size=512, hidden_size=256, moe_intermediate_size=128,
        num_hidden_layers=len(ratios) - 1, num_hash_layers=1,
        num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2,
        q_lora_rank=128, o_groups=2, o_lora_rank=128, compress_ratios=ratios, index_n_heads=16,
        index_topk=16,
    )
    save_checkpoint(tmp_path / "official", config, synthesize(config, seed=3))
    convert(tmp_path / "official", tmp_path / "bf16", "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "bf16", dtype=torch.float32
        ).eval()
        ids = torch.randint(512, (1, 300), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = theirs(ids).logits[0]
    ours = dsv4.load(tmp_path / "official", numerics="float32").logits(ids[0])
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
