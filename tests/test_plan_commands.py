"""``dsv4 plan ...`` as typed: JSON for programs, tables and plots for people, plain refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsv4.cli import app
from dsv4.errors import ConfigError

RUN = CliRunner()


def said(*words: str) -> str:
    result = RUN.invoke(app, ["plan", *words])
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def parsed(*words: str) -> Any:
    return json.loads(said(*words, "--json"))


def test_efficiency_as_json() -> None:
    report = parsed("efficiency", "--context", "1m")
    assert report["context"] == 1 << 20 and set(report["models"]) == {"v3.2", "flash", "pro"}
    for row in report["models"].values():
        assert set(row) == {
            "kv_bytes_per_token", "kv_bytes", "flops", "kv_ratio", "flops_ratio", "parts",
        }  # fmt: skip
    pro = report["models"]["pro"]
    assert round(pro["kv_ratio"], 4) == 0.1048 and round(pro["flops_ratio"], 3) == 0.273


def test_efficiency_for_people() -> None:
    text = said("efficiency", "--model", "v4-nano", "--context", "8k")
    assert "48,068" in text and "v4-nano" in text and "fp8 1, fp4 1, bf16 2" in text
    assert "27.3%" in text  # the ratios at other lengths
    raw = ("--weights", "bf16=1,core=1,index_fp4=1", "--context", "1m")
    share = parsed("efficiency", *raw)["models"]["pro"]["flops_ratio"]
    assert share < 0.27 and f"{share:.2%}" in said("efficiency", *raw)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plots(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot.{ending}"
    said("efficiency", "--plot", str(file))
    assert file.stat().st_size > 10_000
    file.unlink()
    said("fleet", "--nodes", "1,2", "--seconds", "3", "--rate", "1", "--plot", str(file))
    assert file.stat().st_size > 10_000
    with pytest.raises(ConfigError, match="cannot write the plot"):
        said("efficiency", "--plot", str(tmp_path / "plot.nothing"))


def test_fit_says_it_plainly() -> None:
    text = said("fit", "--model", "pro", "--hardware", "8xH100-80G", "--context", "128k")
    assert "does not fit" in text and "864.7 GB" in text and "8xH200-141G" in text
    report = parsed("fit", "--model", "flash", "--hardware", "4xH100-80G", "--users", "8")
    assert report["fits"] and report["decode"]["binding"] and report["cost"]["month"] > 0
    assert "TP4" in said("fit", "--model", "flash", "--hardware", "4xH100-80G")


def test_this_machine_is_measured() -> None:
    report = parsed("fit", "--model", "v4-nano", "--hardware", "this")
    assert report["fits"] and report["engine"] == "dsv4" and report["cost"]["month"] is None
    assert report["bytes"]["device_memory"] > 10**9


def test_published_results_have_their_errors() -> None:
    report = parsed("check")
    assert len(report["results"]) >= 10 and report["median_error"]["decode"] < 0.15
    assert "+2412%" in said("check")  # outliers are shown


def test_a_fleet(tmp_path: Path) -> None:
    report = parsed("fleet", "--nodes", "1,10000", "--seconds", "5", "--rate", "2")
    assert [fleet["replicas"] for fleet in report["fleets"]] == [1, 10000]
    assert report["fleets"][1]["cost_per_million_output"] > 0
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival": 0, "prompt": 1000, "output": 20}\n')
    (one,) = parsed("fleet", "--trace", str(trace), "--nodes", "1", "--split", "EP8")["fleets"]
    assert one["finished"] == 1
    assert "mean-field" in said("fleet", "--nodes", "100", "--seconds", "2", "--rate", "1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("efficiency", "--context", "2m"), "1,048,576"),
        (("efficiency", "--context", "many"), "128k"),
        (("efficiency", "--model", "v5"), "flash"),
        (("efficiency", "--weights", "bf16"), "kind=number"),
        (("fit", "--model", "flash", "--hardware", "9xTPU"), "H200-141G"),
        (("fit", "--model", "flash", "--hardware", "H100-80G", "--users", "-1"), "--users"),
        (("fit", "--model", "flash", "--hardware", "H100-80G", "--context", "2m"), "1,048,576"),
        (("fleet", "--nodes", "0"), "--nodes"),
        (("fleet", "--split", "TP3"), "TP8"),
        (("fleet", "--hardware", "M3-Max-128", "--split", "one device"), "no room"),
        (("fleet", "--measure", "http://127.0.0.1:9"), "--trace"),
    ],
)
def test_refusals_say_what_to_try(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        said(*words)


# ---------------------------------------------------------------- the documentation

DOCS = Path(__file__).parents[1] / "docs"


def table_of_published_results() -> list[str]:
    """The table of docs/planner.md, from the data and the planner."""

    def cells(row: dict[str, Any], key: str) -> str:
        if key not in row:
            return "| |"
        digits = 0 if row[key] >= 100 else 1
        predicted, error = row[f"{key}_predicted"], row[f"{key}_error"]
        return f"{row[key]:,.{digits}f} | {predicted:,.{digits}f} | {error:+.0%}"

    report = parsed("check")
    lines = [
        f"| {row['what']} | {cells(row, 'decode')} | {cells(row, 'prefill')} | {row['source']} |"
        for row in report["results"]
    ]
    decode, prefill = (report["median_error"][key] for key in ("decode", "prefill"))
    lines.append(f"| median of errors | | | {decode:.0%} | | | {prefill:.0%} | |")
    return lines


def test_the_table_of_published_results_is_the_planner_s() -> None:
    table = "\n".join(table_of_published_results())
    assert table in (DOCS / "planner.md").read_text(encoding="utf-8")


def test_the_ratios_in_the_documentation_are_the_planner_s() -> None:
    text = (DOCS / "efficiency.md").read_text(encoding="utf-8")
    for context in (8, 32, 128, 256, 512, 1024):
        models = parsed("efficiency", "--context", f"{context}k")["models"]
        shares = [models[m][k] for k in ("kv_ratio", "flops_ratio") for m in ("pro", "flash")]
        line = f"| {context}K | " + " | ".join(f"{share:.1%}" for share in shares) + " |"
        assert line in text
    for name, row in parsed("efficiency")["models"].items():
        parts = " | ".join(f"{value / 1e9:,.1f}" for value in row["parts"].values())
        assert f"| {name} | {parts} | {row['flops'] / 1e9:,.1f} |" in text
