"""The simulation of a fleet obeys queueing theory where it has an answer, and says what it did."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4.config import V4Config
from dsv4.errors import ConfigError, DSV4Error
from dsv4.planner import kv_bytes
from dsv4.planner.fleet import (
    SIMULATED,
    MeasuredCosts,
    RooflineCosts,
    Serving,
    expert_imbalance,
    grow,
    simulate,
)
from dsv4.planner.hardware import engine, machine
from dsv4.planner.replay import Served, calibrate, measure
from dsv4.planner.roofline import Speed
from dsv4.planner.workload import Request, Workload, percentiles, read_trace

COSTS = MeasuredCosts(prompt=0.001, prompt_growth=0.0, token=0.01, token_growth=0.0)
FLASH = V4Config.preset("flash")


def test_a_request_alone_takes_its_prefill_and_its_tokens() -> None:
    report = simulate([Request(5.0, 300, 11)], COSTS)
    assert report["ttft"]["p50"] == pytest.approx(0.3)
    assert report["inter_token"]["p99"] == pytest.approx(0.01)
    assert report["finished"] == 1 and report["waiting"] == 0
    assert report["output_tokens_per_second"] == pytest.approx(11 / 5.4)


def test_users_share_a_step_only_where_the_engine_batches() -> None:
    together = [Request(0.0, 1, 101) for _ in range(4)]
    one_by_one = MeasuredCosts(0.001, 0.0, 0.01, 0.0, further=0.01)
    for costs, gap in ((COSTS, 0.01), (one_by_one, 0.04)):
        found = simulate(together, costs)["inter_token"]["p50"]
        assert found == pytest.approx(gap), costs


def test_waiting_is_that_of_an_m_d_1_queue() -> None:
    """One server, random arrivals, equal work: mean wait rho s / (2 (1 - rho))."""
    random, service, load = np.random.default_rng(0), 0.1, 0.7
    arrivals = np.cumsum(random.exponential(service / load, 20000))
    requests = [Request(at, 100, 1) for at in arrivals.tolist()]
    serving = Serving(max_running=1, prefill_chunk=100)
    report = simulate(requests, COSTS, serving)
    waits = lindley(arrivals, service)
    assert np.mean(waits) == pytest.approx(load * service / (2 * (1 - load)), rel=0.1)
    expected = percentiles([wait + service for wait in waits])
    assert report["inter_token"]["p50"] is None  # answers of one token have no gaps
    assert list(report["ttft"].values()) == pytest.approx(expected, rel=1e-6)
    assert report["busy"] == pytest.approx(load, rel=0.05)


def lindley(arrivals: Any, service: float) -> list[float]:
    """Waits of a first-come, first-served line, one after the other."""
    waits = [0.0]
    for gap in np.diff(arrivals):
        waits.append(max(0.0, waits[-1] + service - gap))
    return waits


def test_tokens_are_conserved() -> None:
    requests = Workload(rate=3, message=100, output=20, think=1).requests(60, 4096, seed=4)
    report = simulate(requests, COSTS, Serving(routing="least"), replicas=3)
    assert report["finished"] == len(requests)
    span = sum(r.output for r in requests) / report["output_tokens_per_second"]
    assert report["prompt_tokens_per_second"] * span == pytest.approx(
        sum(r.prompt for r in requests)
    )


def test_a_session_finds_its_prefix_where_it_returns() -> None:
    first, second = Request(0.0, 1000, 100, 7), Request(60.0, 2000, 10, 7)
    report = simulate([first, second], COSTS, replicas=2)
    assert report["cache_hit_rate"] == pytest.approx((1100 // 128 * 128) / 3000)
    stranger = [first, second._replace(session=8)]
    assert simulate(stranger, COSTS, replicas=2)["cache_hit_rate"] == 0
    shared = [first._replace(session=-1, shared=512), second._replace(session=-1, shared=512)]
    assert simulate(shared, COSTS)["cache_hit_rate"] == pytest.approx(512 / 3000)


def test_hits_need_sticky_routing_in_a_large_fleet() -> None:
    workload = Workload(rate=1, message=50, output=10, think=1)
    hits = {
        routing: [
            report["cache_hit_rate"]
            for report in grow(
                workload, COSTS, 1 << 14, [1, 10000], Serving(routing=routing), seconds=40
            )
        ]
        for routing in ("sticky", "random")
    }
    assert min(hits["sticky"]) > 0.4
    assert hits["random"][0] > 0.4 and hits["random"][1] < 0.01


def test_a_fleet_grows_in_proportion_and_says_how_many_it_simulated() -> None:
    workload = Workload(rate=2, message=100, output=10, think=1)
    few, many = grow(workload, COSTS, 1 << 14, [SIMULATED, 10000], seconds=40, month=100.0)
    assert many["simulated_replicas"] == SIMULATED and many["replicas"] == 10000
    for key in ("output_tokens_per_second", "requests_per_second"):
        assert many[key] == pytest.approx(few[key] * 10000 / SIMULATED)
    assert many["cost_per_million_output"] == pytest.approx(few["cost_per_million_output"])
    monthly = few["output_tokens_per_second"] * 730 * 3600
    assert few["cost_per_million_output"] == pytest.approx(100 * SIMULATED / monthly * 1e6)


def test_the_asked_rate_arrives() -> None:
    requests = Workload(rate=5, think=10).requests(1000, 1 << 20, seed=2)
    assert len(requests) == pytest.approx(5000, rel=0.1)
    assert requests == sorted(requests)
    assert all(r.prompt + r.output <= 1 << 20 for r in requests)
    assert requests == Workload(rate=5, think=10).requests(1000, 1 << 20, seed=2)


def test_separated_prefill_does_not_hold_up_decoding() -> None:
    workload = Workload(rate=1.5, message=400, output=50, turns=1, think=0)
    mixed, apart = (
        grow(workload, COSTS, 1 << 14, [4], Serving(prefill_share=share), seconds=60)[0]
        for share in (0.0, 0.75)
    )
    assert apart["inter_token"]["p99"] == pytest.approx(0.01)
    assert mixed["inter_token"]["p99"] > 0.1
    with pytest.raises(ConfigError, match="prefill"):
        grow(workload, COSTS, 1 << 14, [1], Serving(prefill_share=0.5), seconds=5)


def test_kv_limits_what_runs_at_once() -> None:
    speed = Speed(FLASH, machine("2xH200-141G"), engine("sglang"), "instruct")
    place = speed.place(1, 4096)
    assert place is not None
    costs = RooflineCosts(speed, place, 4096)
    assert costs.kv(1 << 16) > kv_bytes(FLASH, 1 << 16)
    costs.room = 2.5 * costs.kv(66000)
    requests = [Request(0.0, 64000, 2000) for _ in range(4)]
    two_at_once = simulate(requests, costs)
    costs.room = 10 * costs.kv(66000)
    assert simulate(requests, costs)["ttft"]["p99"] < two_at_once["ttft"]["p99"] / 1.5
    with pytest.raises(ConfigError, match="no room"):
        RooflineCosts(speed, place, 1 << 40)


def test_experts_balance_with_many_tokens() -> None:
    few, many = (expert_imbalance(FLASH, 8, tokens) for tokens in (1, 4096))
    assert few > 2 and 1 < many < 1.05
    assert expert_imbalance(FLASH, 8, 4096, skew=1.0) > 1.5
    assert expert_imbalance(FLASH, 1, 1) == 1


def test_traces(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"arrival": 2, "prompt": 10, "output": 5, "session": 3}\n\n'
        '{"arrival": 1, "prompt": 8, "output": 4}\n'
    )
    assert read_trace(file) == [Request(1, 8, 4), Request(2, 10, 5, 3)]
    for bad in ('{"arrival": 1}', "[]", "x", '{"arrival": 1, "prompt": 0, "output": 1}'):
        file.write_text(f'{{"arrival": 1, "prompt": 8, "output": 4}}\n{bad}\n')
        with pytest.raises(ConfigError, match="line 2"):
            read_trace(file)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_trace(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Workload(rate=0),
        lambda: Workload(rate=1, turns=0.5),
        lambda: Serving(routing="best"),
        lambda: Serving(prefill_share=1.0),
        lambda: grow(Workload(rate=1), COSTS, 4096, []),
        lambda: grow(Workload(rate=1e-6), COSTS, 4096, [1], seconds=1),
    ],
)
def test_bad_input_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        wrong()


# ---------------------------------------------------------------- beside a server


def test_calibration_finds_the_costs() -> None:
    served = []
    for prompt in (20, 150, 500, 1000):
        first = 0.02 + 0.001 * prompt
        times = [first + 0.01 * i for i in range(10)]
        served.append(Served(Request(0, prompt, 10), 0.0, times))
    served.append(Served(Request(0, 500, 10), 0.0, [9.0 + 0.01 * i for i in range(10)]))  # a hiccup
    crowd = [  # four that share steps of 16 ms for a while
        Served(Request(0, 16, 50), 0.0, [0.1 * user + 0.016 * i for i in range(50)])
        for user in range(4)
    ]
    costs = calibrate(served, [crowd])
    assert costs.further == pytest.approx((0.016 - 0.01) / 3, rel=0.1)
    assert costs.prompt == pytest.approx(0.001, rel=0.05)
    assert costs.overhead == pytest.approx(0.02, rel=0.2)
    assert costs.token == pytest.approx(0.01)


class _Stub(BaseHTTPRequestHandler):
    """Answers at once with as many tokens as were asked for, and counts what it was sent."""

    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(self.status)
        self.end_headers()
        words = len(body["messages"][0]["content"].split())
        chunks = [{"choices": [{"delta": {"content": "a"}}]}] * body["max_tokens"]
        usage = {"prompt_tokens": 2 * words, "completion_tokens": body["max_tokens"]}
        for chunk in [*chunks, {"choices": [], "usage": usage}]:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_trace_is_replayed_and_compared(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = [Request(0.02 * i, 50, 8) for i in range(5)]
    report = measure(url, trace, Serving())
    assert report["requests"] == 5 and report["drift"] > -1
    for side in ("measured", "predicted"):
        assert report[side]["ttft"]["p50"] > 0 and report[side]["output_tokens_per_second"] > 0
    speed = "output_tokens_per_second"
    assert report["error"][speed] == pytest.approx(
        report["predicted"][speed] / report["measured"][speed] - 1
    )
    monkeypatch.setattr(_Stub, "status", 400)
    with pytest.raises(DSV4Error, match="refused"):
        measure(url, trace, Serving())
    with pytest.raises(ConfigError, match="no answer"):
        measure("http://127.0.0.1:9", trace, Serving())
