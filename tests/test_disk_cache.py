"""The disk tier: whatever happens to its files, never a wrong row, at worst a miss."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
import torch

import dsv4
from dsv4 import kernels
from dsv4.engine.disk import DiskTier, Found
from dsv4.engine.kvstate import GRAIN, Block, Cut

SIZE = 640  # bytes of a block
_random = Random(1)
TEXT = [_random.randrange(2000) for _ in range(700)] * 7  # the same tokens in several places


def timeline(tokens: list[int], position: int | None = None) -> tuple[list[Block], Cut]:
    """Blocks and a cut that are a pure function of the tokens, as a model's would be."""
    blocks = []
    for i in range(0, len(tokens), GRAIN):
        block = Block(SIZE)
        generator = torch.Generator().manual_seed(hash(tuple(tokens[: i + GRAIN])) & 0xFFFFFFF)
        block.data = torch.randint(256, (SIZE,), generator=generator, dtype=torch.uint8)
        blocks.append(block)
    at = len(tokens) if position is None else position
    generator = torch.Generator().manual_seed(hash(tuple(tokens[:at])) & 0xFFFFFFF)
    layers = [
        {"window": torch.randint(256, (5, 64), generator=generator, dtype=torch.uint8)},
        {"kv": torch.randn(1, at % 7, 8, generator=generator), "window": torch.ones(2, 3)},
        {},
    ]
    partial = blocks[at // GRAIN] if at % GRAIN else None
    return blocks[: at // GRAIN], Cut(at, layers, partial)


def right(found: Found | None, tokens: list[int]) -> int:
    """How much was found, which must be what was saved; 0 for nothing."""
    if found is None:
        return 0
    at = found.cut.position
    blocks, cut = timeline(tokens[:at])
    for got, wanted in zip(found.blocks, blocks, strict=True):
        assert torch.equal(got.data, wanted.data)
    for got_parts, wanted_parts in zip(found.cut.layers, cut.layers, strict=True):
        assert got_parts.keys() == wanted_parts.keys()
        assert all(torch.equal(got_parts[name], wanted_parts[name]) for name in wanted_parts)
    assert (found.cut.partial is None) == (cut.partial is None)
    if found.cut.partial is not None and cut.partial is not None:
        assert torch.equal(found.cut.partial.data, cut.partial.data)
        assert found.cut.partial.claimed == at % GRAIN
    return at


Open = Callable[..., DiskTier]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Open]:
    opened: list[DiskTier] = []

    def open_tier(mark: str = "model", budget: int = 1 << 30, **more: object) -> DiskTier:
        opened.append(DiskTier(tmp_path, mark, budget, **more))  # type: ignore[arg-type]
        return opened[-1]

    yield open_tier
    for tier in opened:
        tier.close()


def save(tier: DiskTier, tokens: list[int]) -> None:
    blocks, cut = timeline(tokens)
    tier.save(tokens, blocks, [cut])
    tier.flush()


@pytest.mark.skipif(kernels.NATIVE is None, reason="native kernels are switched off")
def test_what_sums_in_another_order_computed_is_not_used() -> None:
    """Tiles have bits of their own; the other instruction sets share theirs, and a folder."""
    from dsv4.kernels import native  # is there only where it was built

    best, marks = native.isa(), {}
    for isa in native.isas():
        native.use(isa)
        marks[isa] = dsv4.load("v4-nano").fingerprint()
    native.use(best)
    tiles = marks.pop("amx", "")
    assert len(set(marks.values())) == 1 and tiles not in marks.values()


def test_another_process_goes_on_where_one_stopped(disk: Open) -> None:
    for length in (128, 300, 640, 1000):
        save(disk(), TEXT[:length])
    tier = disk()
    for asked, found in ((100, 0), (128, 0), (129, 128), (301, 300), (640, 300), (5000, 1000)):
        assert right(tier.find(TEXT[:asked], 0, []), TEXT) == found
    assert tier.find(TEXT, 1000, []) is None
    edited = [*TEXT[:350], 1, *TEXT[351:]]
    assert right(tier.find(edited, 0, []), TEXT) == 300
    blocks, _ = timeline(TEXT[:300])
    found = tier.find(TEXT[:500], 0, blocks)
    assert found is not None and found.blocks[0] is blocks[0]  # known rows are not read again
    assert tier.failures == 0


def test_a_foreign_fingerprint_finds_nothing(disk: Open) -> None:
    ours, theirs = disk("ours"), disk("theirs")
    save(ours, TEXT[:300])
    assert theirs.find(TEXT, 0, []) is None
    for file in ours.folder.iterdir():  # even if somebody puts the files there
        shutil.copy(file, theirs.folder)
    assert theirs.find(TEXT, 0, []) is None and theirs.failures == 1
    assert right(ours.find(TEXT, 0, []), TEXT) == 300


def harm(file: Path, files: list[Path], random: Random) -> None:
    data = bytearray(file.read_bytes())
    kind = random.randrange(6)
    if kind == 0:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == 1:
        del data[random.randrange(len(data)) :]
    elif kind == 2:
        data += random.randbytes(random.randrange(1, 100))
    elif kind == 3:
        data = bytearray(random.choice(files).read_bytes())  # a whole file in the wrong place
    elif kind == 4:
        data = bytearray(random.randbytes(random.randrange(200)))
    else:
        file.unlink()
        return
    file.write_bytes(data)


def test_two_hundred_rounds_of_harm(disk: Open) -> None:
    tier, random, hits = disk(), Random(7), 0
    lengths = (128, 300, 511, 640)
    for _ in range(200):
        for length in lengths:
            save(tier, TEXT[:length])
        files = sorted(p for p in tier.folder.iterdir() if p.suffix in (".rows", ".cut"))
        for file in random.sample(files, random.randrange(1, 4)):
            if file.exists():
                harm(file, [f for f in files if f.exists()], random)
        found = right(tier.find(TEXT, 0, []), TEXT)
        assert found in (0, *lengths)
        hits += found > 0
    assert 20 < hits < 200 and tier.failures > 50


class Killed(BaseException):
    """What a process sees of kill -9: nothing more happens."""


def test_killed_at_any_write(disk: Open) -> None:
    random = Random(3)
    for round_ in range(60):
        left = [random.randrange(5)]

        def write(file: Path, parts: Sequence[memoryview], left: list[int] = left) -> None:
            data = b"".join(parts)
            if left[0] == 0:
                file.write_bytes(data[: random.randrange(len(data) + 1)])
                raise Killed
            left[0] -= 1
            file.write_bytes(data)

        tokens = [round_, *TEXT[:500]]
        victim = disk(write=write)
        blocks, cut = timeline(tokens)
        try:
            some = array("i", tokens[:300])
            victim._save(some, blocks[:2], [timeline(tokens[:300])[1]], [300])
            victim._save(array("i", tokens), blocks, [cut], [501])
        except Killed:
            pass
        after = disk()
        assert right(after.find([*tokens, 1], 0, []), tokens) in (0, 300, 501)
        save(after, tokens)
        assert right(after.find([*tokens, 1], 0, []), tokens) == 501
        assert after.failures == 0


def test_a_full_disk_is_a_miss(disk: Open) -> None:
    room = [6000]

    def write(file: Path, parts: Sequence[memoryview]) -> None:
        data = b"".join(parts)
        room[0] -= len(data)
        if room[0] < 0:
            file.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "no space left on device")
        file.write_bytes(data)

    tier = disk(write=write)
    for length in (300, 900, 640):
        save(tier, TEXT[:length])
    assert tier.failures > 0
    assert right(tier.find(TEXT, 0, []), TEXT) in (0, 300, 640)
    assert not [p for p in tier.folder.iterdir() if p.suffix == ".tmp"]
    room[0] = 1 << 30
    save(tier, TEXT[:900])
    assert right(tier.find(TEXT, 0, []), TEXT) == 900


def test_the_least_recently_used_goes_when_there_is_too_much(disk: Open) -> None:
    tier = disk(budget=40_000)
    for i in range(12):
        save(tier, [i, *TEXT[:300]])
        time.sleep(0.02)  # file times, which the clock of the system rounds
        assert right(tier.find([0, *TEXT], 0, []), [0, *TEXT]) == 301
    assert right(tier.find([11, *TEXT], 0, []), [11, *TEXT]) == 301
    assert tier.find([1, *TEXT], 0, []) is None
    assert sum(p.stat().st_size for p in tier.folder.iterdir()) <= 45_000


def test_cuts_between_others_make_room_first(disk: Open) -> None:
    def save_dense(tokens: list[int]) -> None:
        blocks, _ = timeline(tokens)
        cuts = [timeline(tokens, at)[1] for at in range(16, len(tokens) + 1, 16)]
        tier.save(tokens, blocks, cuts, [len(tokens)])
        tier.flush()
        time.sleep(0.02)  # file times, which the clock of the system rounds

    tier = disk(budget=200_000)
    texts = [[i, *TEXT[: 5 * GRAIN - 1]] for i in range(6)]
    edit = 3 * GRAIN + 5  # what is before it is a cut between others
    save_dense(texts[0])
    assert right(tier.find([*texts[0][:edit], 1, 1], 0, []), texts[0]) == 3 * GRAIN
    for text in texts[1:]:
        save_dense(text)
    ends = [right(tier.find([*text, 1], 0, []), text) for text in texts]
    # of those between, any cut may be what is left
    edits = [right(tier.find([*text[:edit], 1, 1], 0, []), text) for text in (texts[0], texts[-1])]
    assert ends == [5 * GRAIN] * 6  # as before, for as many timelines
    assert edits == [0, 3 * GRAIN]
    files = list(tier.folder.iterdir())
    between = sum(p.stat().st_size for p in files if p.suffix == ".between")
    assert between > 50_000 and sum(p.stat().st_size for p in files) <= 200_000


def test_a_cut_between_others_that_a_message_ends_at(disk: Open) -> None:
    tier, tokens = disk(), TEXT[:300]
    blocks, cut = timeline(tokens)
    for lasting, kind in (([], ".between"), ([300], ".cut"), ([], ".cut")):
        tier.save(tokens, blocks, [cut], lasting)
        tier.flush()
        assert [p.suffix for p in tier.folder.glob("*-*-*") if p.suffix != ".rows"] == [kind]
        assert right(disk().find(TEXT, 0, []), TEXT) == 300


def test_a_timeline_is_in_few_files(disk: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = disk()
    save(tier, TEXT[:2000])
    save(tier, [*TEXT[:1000], *TEXT[:1000]])
    packs = [p for p in tier.folder.iterdir() if p.suffix == ".rows"]
    size = sum(p.stat().st_size for p in packs)
    assert len(packs) == 2 and size < 24 * (SIZE + 4 * GRAIN + 200)  # blocks shared are there once
    assert right(tier.find(TEXT[:2001], 0, []), TEXT) == 2000
    monkeypatch.setattr("dsv4.engine.disk.PACK", 3 * SIZE)
    save(tier, [7, *TEXT[:2000]])
    assert len([p for p in tier.folder.iterdir() if p.suffix == ".rows"]) == 2 + 5
    assert right(tier.find([7, *TEXT[:2001]], 0, []), [7, *TEXT]) == 2001


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_disk_cache import TEXT, timeline
from dsv4.engine.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), "model", 1 << 30)
print("writing", flush=True)
i = 0
while True:
    tokens = [i, *TEXT[:700]]
    blocks, cut = timeline(tokens)
    tier.save(tokens, blocks, [cut])
    tier.flush()
    i += 1
"""


@pytest.mark.slow
def test_kill_9(disk: Open, tmp_path: Path) -> None:
    for wait in (0.05, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONHASHSEED": "0"},
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        tier = disk()
        found = [tier.find([i, *TEXT], 0, []) for i in range(50)]
        assert all(f is None or f.cut.position == 701 for f in found)
        assert tier.failures == 0 and any(found)
        assert not [p for p in tier.folder.iterdir() if p.suffix == ".tmp"]
