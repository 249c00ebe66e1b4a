"""Two processes train the model that one trains, however samples and experts are divided."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import dsv4
from dsv4.config import V4Config
from dsv4.model import Transformer
from dsv4.planner import training_bytes
from dsv4.train.distributed import Ranks, divided
from dsv4.train.runfiles import read_log

TOML = """
dtype = "float32"
vocab_documents = 50
lr = 3e-4
tokens_per_batch = 512
log_every = 1
checkpoint_every = 1000
length = 96
shares = { recall = 1 }
[model]
vocab_size = 384
hidden_size = 128
num_hidden_layers = 2
num_attention_heads = 2
head_dim = 64
qk_rope_head_dim = 32
n_routed_experts = 4
index_n_heads = 2
compress_ratios = [4, 128, 0]
moe_intermediate_size = 128
q_lora_rank = 64
o_lora_rank = 64
o_groups = 1
"""


def train(
    folder: Path,
    stages: list[int],
    processes: int,
    experts: int,
    chosen: int = 2,
    kinds: str = "",
    more: str = "",
) -> list[float]:
    """The losses of every step, over stages of so many; ``kinds`` and ``more``: other stages, and
    other keys of the recipe."""
    folder.mkdir(exist_ok=True)
    recipe = folder / "recipe.toml"
    text = "".join(f"[[stages]]\nsteps = {n}\n" for n in stages)
    recipe.write_text(f"{more}{TOML}num_experts_per_tok = {chosen}\n{text}{kinds}")
    program = ["-m", "dsv4.train", str(recipe), "--out", str(folder / "run")]
    start([*program, "--expert-parallel", str(experts)], processes)
    return values(folder, "loss", "mtp", "balance")


def values(folder: Path, *names: str) -> list[float]:
    """These of every step of a run, if they are there."""
    return [line[n] for line in read_log(folder / "run") for n in names if n in line]


def start(program: list[str], processes: int) -> list[str]:
    """What each of so many processes prints."""
    started = []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for rank in range(processes):
        more = {"RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        more |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, *program]
        started.append(
            subprocess.Popen(command, env=os.environ | more, stdout=subprocess.PIPE, text=True)
        )
    printed = [p.communicate()[0] for p in started]
    assert [p.returncode for p in started] == [0] * processes
    return printed


@pytest.mark.slow
def test_a_hundred_steps_of_one_and_two_processes_agree(tmp_path: Path) -> None:
    """With the samples divided, and with samples and experts. Every token goes to all experts:
    one whose best are a tie, to the last bit, would be enough to part two runs."""
    alone = train(tmp_path / "alone", [100], 1, 1, chosen=4)
    assert len(alone) == 300 and alone[-3] < alone[0] - 1.5
    for experts in (1, 2):
        others = train(tmp_path / f"experts {experts}", [100], 2, experts, chosen=4)
        assert others == pytest.approx(alone, rel=1e-5), experts


@pytest.mark.slow
def test_a_mesh_of_two_by_two_agrees(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", [15], 1, 1)
    assert train(tmp_path / "mesh", [15], 4, 2) == pytest.approx(alone, rel=1e-5)


KINDS = """
[[stages]]
steps = 4
attention = "warmup"
[[stages]]
steps = 8
attention = "sparse"
"""


@pytest.mark.slow
def test_stages_of_every_kind_agree(tmp_path: Path) -> None:
    """Also those where few parameters learn, and where blocks are computed again."""
    alone = train(tmp_path / "alone", [4], 1, 1, chosen=4, kinds=KINDS)
    more = "recompute = true\ntokens_per_pass = 128\n"
    others = train(tmp_path / "two", [4], 2, 1, chosen=4, kinds=KINDS, more=more)
    assert others == pytest.approx(alone, rel=1e-5)
    alone, others = (values(tmp_path / name, "index") for name in ("alone", "two"))
    assert len(alone) == 12 and others == pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Checkpoints do not know how many made them."""
    whole = train(tmp_path / "whole", [2, 2, 2], 1, 1)
    folder = tmp_path / "changed"
    train(folder, [2], 2, 2)
    train(folder, [2, 2], 1, 1)
    assert train(folder, [2, 2, 2], 2, 1) == pytest.approx(whole, rel=1e-5)
    exported = (folder / "run" / "parent" / "model.safetensors").stat().st_size
    assert exported == (tmp_path / "whole/run/parent/model.safetensors").stat().st_size


OWNED = """
import json
from dsv4.config import V4Config
from dsv4.model import Transformer
from dsv4.train import distributed
from dsv4.train.distributed import Ranks
from dsv4.train.optim import MuonAdamW, OptimSettings
from dsv4.train.initial import init_weights
distributed.BUCKET = 1 << 14  # many travel alone: a rank has nothing to send or to get
with Ranks({experts}) as ranks:
    net = Transformer(V4Config.preset("nano"))
    init_weights(net)
    held = ranks.divide(net)
    state = MuonAdamW(held.items(), OptimSettings()).state
    owned = [name for name, p in held.items() if p.requires_grad]
    trained = [p for p in net.parameters() if p.requires_grad]
    shards = sum(p.to_local().nbytes for p in trained)
    for p in held.values():
        p.data += 1
    ranks.spread(net, held)
    back = ranks.gather(net, {{n: p.data for n, p in net.named_parameters() if p.requires_grad}})
    assert back.keys() == {{*owned}} and all((back[n] == held[n]).all() for n in owned)
    print(json.dumps([owned, sum(t.nbytes for t in state.values()), shards]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 2])
def test_every_parameter_has_one_owner_and_lies_in_shards(experts: int) -> None:
    config = V4Config.preset("nano")
    whole = dict(Transformer(config).named_parameters())
    trained = {n: p for n, p in whole.items() if n.rpartition(".")[2] not in ("bias", "tid2eid")}
    ranks = [json.loads(x) for x in start(["-c", OWNED.format(experts=experts)], 2)]
    (mine, state, shards), (yours, other_state, other_shards) = ranks
    assert not set(mine) & set(yours) and {*mine, *yours} == trained.keys()
    assert state + other_state == training_bytes(config).optimizer
    assert shards + other_shards == 4 * sum(p.numel() for p in trained.values())
    assert 0.5 < state / other_state < 2 and 0.8 < shards / other_shards < 1.25


def test_work_is_divided_evenly() -> None:
    sizes = [7, 1, 1, 5, 4, 4, 2, 3]
    owner = divided(sizes, 3)
    sums = [sum(s for s, o in zip(sizes, owner, strict=True) if o == part) for part in range(3)]
    assert sum(sums) == sum(sizes) and max(sums) - min(sums) <= 1


def test_experts_that_do_not_divide_the_processes_are_refused() -> None:
    with pytest.raises(dsv4.TrainingError, match="a divisor of the 1 processes"):
        Ranks(experts=2)
