"""Two processes train the model that one trains, however samples and experts are divided."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4.train.runfiles import read_log

TOML = """
dtype = "float32"
vocab_documents = 50
lr = 1e-3
log_every = 1
checkpoint_every = 1000
tokens_per_batch = 512
length = 96
shares = {{ number_facts = 1 }}
[model]
vocab_size = 384
hidden_size = 128
num_hidden_layers = 2
num_attention_heads = 2
head_dim = 64
qk_rope_head_dim = 32
n_routed_experts = 4
num_experts_per_tok = 2
index_n_heads = 2
compress_ratios = [4, 128, 0]
moe_intermediate_size = 128
q_lora_rank = 64
o_lora_rank = 64
o_groups = 1
[[stages]]
steps = {steps}
warmup = 10
"""


def train(folder: Path, steps: int, processes: int, experts: int) -> list[float]:
    """The loss of every step."""
    recipe = folder / "recipe.toml"
    recipe.write_text(TOML.format(steps=steps))
    program = ["-m", "dsv4.train", str(recipe), "--out", str(folder / "run")]
    started = []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for rank in range(processes):
        more = {"RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, *program, "--expert-parallel", str(experts)]
        started.append(subprocess.Popen(command, env=os.environ | more))
    assert [p.wait() for p in started] == [0] * processes
    return [line["loss"] for line in read_log(folder / "run") if "loss" in line]


@pytest.mark.slow
def test_a_hundred_steps_of_one_two_and_four_processes_agree(tmp_path: Path) -> None:
    losses = {}
    for processes, experts in ((1, 1), (2, 1), (2, 2), (4, 2)):
        folder = tmp_path / f"{processes}-{experts}"
        folder.mkdir()
        losses[processes, experts] = train(folder, 100, processes, experts)
    alone = losses.pop((1, 1))
    assert len(alone) == 100 and alone[-1] < alone[0] / 2
    for what, others in losses.items():
        assert max(abs(a - b) for a, b in zip(alone, others, strict=True)) < 1e-5, what
