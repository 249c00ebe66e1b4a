"""``dsv4 plan fit`` says plainly what fits, and its speeds follow from the machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dsv4.config import V4Config
from dsv4.errors import ConfigError
from dsv4.formats import FORMATS, with_format
from dsv4.planner import weight_bytes
from dsv4.planner.fit import Use, fit, median_error, published
from dsv4.planner.hardware import Machine, data, devices, engine, machine
from dsv4.planner.roofline import Speed, Split, sizes, splits

FLASH, PRO = V4Config.preset("flash"), V4Config.preset("pro")


def test_865_gb_do_not_fit_in_eight_times_80() -> None:
    report = fit("pro", PRO, machine("8xH100-80G"), 131072, 8)
    assert not report["fits"]
    assert "864.7 GB" in report["statement"] and "640 GB" in report["statement"]
    assert {"8xH200-141G", "8xB200-180G"} <= set(report["what_fits"])
    assert not [name for name in report["what_fits"] if name.startswith("8xH100")]


def test_160_gb_do_not_fit_in_one_card_of_141() -> None:
    report = fit("flash", FLASH, machine("H200-141G"), 4096)
    assert not report["fits"] and "159.6 GB" in report["statement"]
    assert "2xH200-141G" in report["what_fits"]
    assert report["runs"] and "in host memory" in report["statement"]
    assert fit("flash", FLASH, machine("2xH200-141G"), 4096)["fits"]


def test_no_memory_anywhere_is_said_too() -> None:
    device = replace(devices()["H100-80G"], host_memory=0.0, ssd=0.0)
    report = fit("pro", PRO, Machine(device, 8), 8192)
    assert not report["runs"] and "decode" not in report


def test_weights_are_those_of_the_file() -> None:
    nano = V4Config.preset("nano")
    for name in FORMATS:
        assert sizes(nano, name).total == weight_bytes(with_format(nano, name))
    assert sizes(FLASH, "instruct").total == weight_bytes(FLASH)
    report = fit("flash", FLASH, machine("M3-Max-128"), 8192)
    fitting = {row["quantization"]: row["fits"] for row in report["quantizations"]}
    assert [*fitting] == ["bf16", "base", "fp8", "q4", "instruct", "q2"]
    assert [name for name, fits in fitting.items() if fits] == ["q2"]


def test_splits_follow_the_shape() -> None:
    assert {str(s) for s in splits(FLASH, 8)} == {"TP8", "TP4 x PP2", "TP2 x PP4", "PP8", "EP8"}
    assert Split(tensor=16) not in splits(FLASH, 16)  # eight output groups
    assert [str(s) for s in splits(PRO, 7)] == ["PP7"]
    assert [str(s) for s in splits(PRO, 1)] == ["one device"]


def test_it_fits_if_any_split_does() -> None:
    """On four cards of 48 GB tensor parallelism would repeat the KV; a pipeline has the room."""
    assert fit("flash", FLASH, machine("4xL40S-48G"), 131072, 24)["placement"]["split"] == "PP4"
    for users in (1, 24, 64):
        report = fit("flash", FLASH, machine("4xL40S-48G"), 131072, users)
        assert report["fits"] == any(split["fits"] for split in report["splits"])
        assert report["fits"] == ("what_fits" not in report)


def test_more_users_share_the_weights_and_more_context_costs() -> None:
    def decode(users: int, context: int) -> Any:
        return fit("flash", FLASH, machine("8xH200-141G"), context, users)["decode"]

    one, many, long = decode(1, 4096), decode(64, 4096), decode(64, 1 << 18)
    assert 8 < many["tokens_per_second"] / one["tokens_per_second"] < 64
    assert many["tokens_per_second_per_user"] < one["tokens_per_second_per_user"]
    assert long["tokens_per_second"] < many["tokens_per_second"]


def test_the_binding_resource_is_named() -> None:
    def binding(hardware: str, **kw: Any) -> tuple[str, str]:
        report = fit("flash", FLASH, machine(hardware), 8192, **kw)
        return report["decode"]["binding"], report["prefill"]["binding"]

    assert binding("8xH200-141G") == ("time per layer (latency)", "compute")
    assert binding("M3-Ultra-512")[0] == "memory bandwidth"
    assert binding("M3-Max-128")[0] == "SSD"


def test_twice_the_bandwidth_halves_the_reading() -> None:
    slow = machine("M3-Ultra-512")
    fast = Machine(replace(slow.device, bandwidth=2 * slow.device.bandwidth))
    speed = Speed(FLASH, slow, engine("ds4"), "q2")
    place = speed.place(1, 4096)
    assert place is not None
    first, second = (s.decode(place, 1, 4096) for s in (speed, speed.on(fast)))
    assert second.memory == pytest.approx(first.memory / 2) and second.layers == first.layers


def test_a_pipeline_does_not_hurry_one_user() -> None:
    speed = Speed(FLASH, machine("4xH200-141G"), engine("sglang"), "instruct")
    alone = Speed(FLASH, machine("B300-270G"), engine("sglang"), "instruct").on(
        replace(speed.machine, count=1)
    )
    stages, whole = speed.place(1, 8192, "PP4"), alone.place(1, 8192)
    assert stages is not None and whole is not None
    whole = whole._replace(on_device=1.0, on_host=0.0)  # as if the card were large enough
    assert speed.decode(stages, 1, 8192) == alone.decode(whole, 1, 8192)
    four, one = speed.decode(stages, 4, 8192), speed.decode(stages, 1, 8192)
    assert four == one  # a user for each stage


def test_break_even_is_price_over_price() -> None:
    use = Use(prompt_per_output=2, hits=0.5)
    cost = fit("flash", FLASH, machine("4xH200-141G"), 8192, 64, month=1000.0, use=use)["cost"]
    hosted = data("hardware")["api"]["flash"]
    million = hosted["output"] + hosted["hit"] + hosted["miss"]
    assert cost["api_per_million_output"] == pytest.approx(million)
    assert cost["break_even_output_tokens_a_month"] == pytest.approx(1000 / million * 1e6)
    assert cost["break_even_reached"] == (
        cost["break_even_output_tokens_a_month"] <= cost["output_tokens_a_month"]
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: machine("8xFoo"), "H200-141G"),
        (lambda: machine("0xH100-80G"), "COUNT"),
        (lambda: fit("flash", FLASH, machine("H100-80G"), 0), "1,048,576"),
        (lambda: fit("flash", FLASH, machine("H100-80G"), 1 << 21), "1,048,576"),
        (lambda: fit("flash", FLASH, machine("H100-80G"), 8, -1), "--users"),
        (lambda: fit("flash", FLASH, machine("H100-80G"), 8, quantization="q3"), "instruct"),
        (lambda: fit("flash", FLASH, machine("H100-80G"), 8, engine_name="x"), "sglang"),
        (lambda: fit("flash", FLASH, machine("H100-80G"), 8, month=-1), "--price"),
        (lambda: Use(hits=2), "hits"),
    ],
)
def test_bad_input_is_refused(wrong: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        wrong()


def test_every_number_has_a_source() -> None:
    for kind in ("device", "engine", "api"):
        for name, entry in data("hardware")[kind].items():
            assert entry["source"], name
    for device in devices().values():
        engine(device.engine)


def test_published_results_are_predicted() -> None:
    """Half of them within 15%; outliers stay in the table."""
    rows = list(published())
    assert len(rows) >= 10 and all(row["source"] for row in rows)
    assert median_error(rows, "decode") < 0.15 and median_error(rows, "prefill") < 0.15
