"""Half a minute of ``dsv4 bench soak``: a real server, full, with v4-nano."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dsv4 import bench_soak


@pytest.mark.slow
def test_half_a_minute_of_full_load() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsv4.cli", "bench", "soak", "--minutes", "0.5", "--users", "6",
         "--json"],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["drift"] == [] and report["failures"] == []
    assert report["asked_again"] > 0 and sum(report["answers"].values()) > 20
    assert report["running"] == 0 and report["problems"] == [] and report["exit"] == 0
    settled = report["total"]
    assert settled is not None and settled["requests"] == sum(report["answers"].values())
    assert report["growth"] < 0.2  # it is still filling its cache; half an hour tells more
    assert done.returncode == (0 if report["ok"] else 1)


def test_a_question_depends_on_its_number_alone() -> None:
    asked = [bench_soak.question(i) for i in range(bench_soak.QUESTIONS)]
    assert asked == [bench_soak.question(i) for i in range(bench_soak.QUESTIONS)]
    assert len({json.dumps(body) for body in asked}) == len(asked)
    for key in ("stream", "temperature", "thinking", "max_tokens"):
        assert len({str(body[key]) for body in asked}) > 1, key
