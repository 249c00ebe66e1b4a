"""Commands that plan: what a model costs, where it fits, how a fleet of servers behaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .app import Json, app, human, packaged

if TYPE_CHECKING:
    from ..config import V4Config
    from ..planner.fleet import RooflineCosts
    from ..planner.hardware import Machine

plan_app = typer.Typer(
    help="What a V4 model costs, where it fits, what a fleet of servers does.",
    no_args_is_help=True,
)
app.add_typer(plan_app, name="plan")

Plot = Annotated[
    Path | None, typer.Option(help="Draw it: a .png, .svg or .pdf file.", show_default=False)
]


def tokens(text: str) -> int:
    """``131072``, ``128k`` (times 1,024) or ``1m`` (times 1,048,576)."""
    number, unit = text.lower().replace(",", "").replace("_", ""), 1
    if number[-1:] in ("k", "m"):
        number, unit = number[:-1], 1024 if number[-1] == "k" else 1 << 20
    try:
        count = float(number) * unit
    except ValueError:
        count = 0.0
    if not (1 <= count < 2**60 and count == int(count)):
        raise ConfigError(
            "a number of tokens", expected="131072, 128k or 1m", got=text, hint="--context 128k"
        )
    return int(count)


def model_config(name: str) -> V4Config:
    """The config of a preset (flash, pro, ...), of v4-nano, or of a checkpoint folder."""
    from ..config import PRESETS, V4Config

    if name in PRESETS and not Path(name).exists():
        return V4Config.preset(name)
    if not (folder := packaged(name)) and not Path(name).exists():
        raise ConfigError(
            "no such model",
            expected=f"{', '.join(PRESETS)}, v4-nano or a checkpoint folder",
            got=name,
            hint="dsv4 plan efficiency --model flash",
        )
    return V4Config.from_json(folder or name)


def weights_of(text: str) -> dict[str, float]:
    """``bf16=1,index_fp4=1`` as a dictionary."""
    found = {}
    for pair in filter(None, text.split(",")):
        key, _, value = pair.partition("=")
        try:
            found[key.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                "--weights", expected="kind=number pairs such as bf16=1,index_fp4=1", got=pair
            ) from None
    return found


@plan_app.command("efficiency")
def efficiency_command(
    context: Annotated[str, typer.Option(help="Tokens: 131072, 128k, 1m.")] = "1m",
    model: Annotated[
        list[str] | None, typer.Option(help="Another model beside them; may be repeated.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Costs of operations, e.g. bf16=1,index_fp4=1.")
    ] = "",
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """FLOPs per token and KV cache of V4-Flash and V4-Pro, next to V3.2.

    \b
    [bold]Examples[/bold]
      dsv4 plan efficiency
      dsv4 plan efficiency --context 128k --model v4-nano --json
      dsv4 plan efficiency --plot efficiency.png
    """
    from ..planner.efficiency import CONTEXTS, PARTS, efficiency, ratios_over_context

    length, given = tokens(context), weights_of(weights)
    others = {Path(name).name: model_config(name) for name in model or []}
    report = efficiency(length, given, others)
    if plot is not None:
        from ..planner.plots import plot_efficiency

        plot_efficiency(plot, length, given)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"one sequence of {length:,} tokens", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in report["models"]:
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[dict[str, Any]] = list(report["models"].values())

    def add_total(label: str, shown: list[str], ratio: str) -> None:
        table.add_row(label, *shown)
        table.add_row("  of V3.2's", *(f"{r[ratio]:.2%}" for r in rows))
        table.add_row("  V3.2 has", *(f"{1 / r[ratio]:,.4g}x" for r in rows), end_section=True)

    table.add_row("KV bytes a token", *(f"{r['kv_bytes_per_token']:,}" for r in rows))
    add_total("KV cache", [human(r["kv_bytes"]) for r in rows], "kv_ratio")
    for part in PARTS:
        table.add_row(part.replace("_", " "), *(_giga(r["parts"][part]) for r in rows))
    add_total("GFLOPs of a token", [_giga(r["flops"]) for r in rows], "flops_ratio")
    console.print(table)
    kinds = ", ".join(f"{kind} {value:g}" for kind, value in report["weights"].items())
    console.print(f"One operation costs, in FP8 operations: {kinds} (--weights).", highlight=False)
    if given:
        return
    table = Table(title="of V3.2's, at other lengths", box=SIMPLE_HEAD)
    for column in ("tokens", "KV pro", "KV flash", "FLOPs pro", "FLOPs flash"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in ratios_over_context(CONTEXTS):
        shares = [row[m][key] for key in ("kv_ratio", "flops_ratio") for m in ("pro", "flash")]
        table.add_row(f"{row['context'] >> 10}k", *(f"{share:.1%}" for share in shares))
    console.print(table)


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f}" if flops > 1e9 else f"{flops / 1e9:.4f}"


@plan_app.command("fit")
def fit_command(
    model: Annotated[str, typer.Option(help="flash, pro, v4-nano, or a checkpoint folder.")],
    hardware: Annotated[
        str, typer.Option(help='"8xH100-80G", "M3-Ultra-512", "2xRTX-5090-32G+256" or "this".')
    ] = "this",
    context: Annotated[str, typer.Option(help="Tokens of each user: 131072, 128k, 1m.")] = "8k",
    users: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    quantization: Annotated[
        str | None,
        typer.Option(help="instruct, fp8, base, bf16, q4, q2. Default: as stored."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Predict for: sglang, ds4, llama.cpp, dsv4, ...")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="US$ a month for the machine.", show_default=False)
    ] = None,
    prompt_per_output: Annotated[
        float, typer.Option(help="Prompt tokens per output token, for costs.")
    ] = 4.0,
    hits: Annotated[float, typer.Option(help="Share of them found in the prefix cache.")] = 0.5,
    busy: Annotated[float, typer.Option(help="Share of the month the machine works.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Does a model fit on a machine, how fast will it be, what limits it, what does it cost?

    \b
    [bold]Examples[/bold]
      dsv4 plan fit --model flash --context 128k --users 8 --hardware 8xH100-80G
      dsv4 plan fit --model flash --hardware M3-Ultra-512 --quantization q2
      dsv4 plan fit --model v4-nano --hardware this
    """
    from ..planner.fit import Use, fit
    from ..planner.hardware import machine

    on = this_machine() if hardware == "this" else machine(hardware)
    report = fit(
        Path(model).name,
        model_config(model),
        on,
        tokens(context),
        users,
        quantization=quantization,
        engine_name=engine,
        month=price,
        use=Use(prompt_per_output, hits, busy),
    )
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    colour = "green" if report["fits"] else "yellow" if report["runs"] else "red"
    console.print(report["statement"], style=colour)
    if not report["fits"]:
        console.print(f"What holds it: {', '.join(report['what_fits']) or 'nothing known'}.")
    sizes = report["bytes"]
    table = Table(show_header=False, box=None)
    for key in ("weights", "kv", "workspace", "device_memory"):
        table.add_row(key.replace("_", " "), human(int(sizes[key])))
    stored = [
        f"{row['quantization']} {human(int(row['weights']))}{'' if row['fits'] else ' (no)'}"
        for row in report["quantizations"]
    ]
    table.add_row("stored as", ", ".join(stored))
    if report["runs"]:
        place, decode, prefill = report["placement"], report["decode"], report["prefill"]
        table.add_row("experts", _where(place))
        table.add_row("split", place["split"])
        table.add_row(
            f"decode, {users} users" if users > 1 else "decode",
            f"{decode['tokens_per_second']:,.1f} tok/s, bound by {decode['binding']}",
        )
        table.add_row(
            f"prefill of {report['context']:,}",
            f"{prefill['tokens_per_second']:,.0f} tok/s ({prefill['seconds_to_first_token']:,.2f}"
            f" s), bound by {prefill['binding']}",
        )
    for label, text in _costs(report["cost"]):
        table.add_row(label, text)
    console.print(table)
    if len(report.get("splits", [])) > 1:
        table = Table(box=SIMPLE_HEAD)
        for column in ("split", "fullest device", "fits"):
            table.add_column(column)
        for row in report["splits"]:
            fits = "yes" if row["fits"] else "no"
            table.add_row(row["split"], human(int(row["device_bytes"])), fits)
        console.print(table)
    console.print(f"Speeds are predictions for {report['engine']}; dsv4 plan check tests them.")


def _where(place: dict[str, Any]) -> str:
    shares = (("experts_on_device", "on the devices"), ("experts_in_host_memory", "in host memory"),
              ("experts_on_ssd", "on the SSD"))  # fmt: skip
    return ", ".join(f"{place[key]:.0%} {where}" for key, where in shares if place[key])


def _costs(cost: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if cost["month"] is not None:
        rows.append(("cost", f"${cost['month']:,.0f} a month"))
    if "output_tokens_a_month" in cost:
        most = f"at most {cost['output_tokens_a_month'] / 1e6:,.0f}M output tokens a month"
        paid = cost.get("per_million_output")
        rows.append(("output", most if paid is None else f"{most}, ${paid:,.2f} a million"))
    if "api_per_million_output" in cost:
        rows.append(("hosted API", f"${cost['api_per_million_output']:,.2f} for as much"))
    if "break_even_output_tokens_a_month" in cost:
        even = cost["break_even_output_tokens_a_month"] / 1e6
        reached = "within reach" if cost["break_even_reached"] else "more than it can make"
        rows.append(("break-even", f"{even:,.0f}M output tokens a month: {reached}"))
    return rows


def this_machine() -> Machine:
    """The machine we are on: a known card by its name, or this CPU as measured."""
    import os

    import torch

    from ..bench import measure_machine
    from ..planner.hardware import Device, Machine, devices

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        words = set(name.upper().replace("-", " ").split())
        for device in devices().values():
            if set(device.name.upper().split("-")[:-1]) <= words:
                return Machine(device, torch.cuda.device_count())
        raise ConfigError(
            "this machine's card is not in hardware.toml", expected="a known one", got=name,
            hint="name the nearest: --hardware RTX-5090-32G",
        )  # fmt: skip
    measured = measure_machine(torch.get_num_threads())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        Device(
            name=measured["cpu"],
            memory=memory / 1e9,
            bandwidth=measured["stream_read_gb_per_s"],
            bf16=max(measured["bf16_tflop_per_s"], measured["f32_tflop_per_s"]),
            engine="dsv4",
            source="measured now",
        )
    )


@plan_app.command("check")
def check_command(as_json: Json = False) -> None:
    """Published measurements beside what this planner predicts for them."""
    from ..planner.fit import median_error, published

    rows = list(published())
    errors = {key: median_error(rows, key) for key in ("decode", "prefill")}
    if as_json:
        print(json.dumps({"results": rows, "median_error": errors}, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tokens per second: measured, predicted, error", box=SIMPLE_HEAD)
    for column in ("", "decode", "prefill"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(row["what"], *(_compared(row, key) for key in ("decode", "prefill")))
    table.add_row("median of errors", *(f"{errors[key]:.0%}" for key in errors))
    Console().print(table)


def _compared(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    digits = 0 if row[key] >= 100 else 1
    predicted = row[f"{key}_predicted"]
    return f"{row[key]:,.{digits}f} {predicted:,.{digits}f} {row[f'{key}_error']:+.0%}"


@plan_app.command("fleet")
def fleet_command(
    model: Annotated[str, typer.Option(help="flash, pro, v4-nano, or a checkpoint folder.")] = (
        "flash"
    ),
    hardware: Annotated[str, typer.Option(help='A node: "8xH200-141G", "this", ...')] = (
        "8xH200-141G"
    ),
    nodes: Annotated[str, typer.Option(help="How many, e.g. 1,100,10000.")] = "1,10,100,1000,10000",
    rate: Annotated[float, typer.Option(help="Requests a second, for each node.")] = 8.0,
    message: Annotated[int, typer.Option(help="Tokens a user adds, median.")] = 1000,
    output: Annotated[int, typer.Option(help="Tokens of an answer, median.")] = 300,
    turns: Annotated[float, typer.Option(help="Requests of a conversation, mean.")] = 4.0,
    think: Annotated[float, typer.Option(help="Seconds between them, mean.")] = 20.0,
    system: Annotated[int, typer.Option(help="Tokens that open every prompt.")] = 0,
    longest: Annotated[str, typer.Option(help="Longest context, in tokens.")] = "128k",
    routing: Annotated[str, typer.Option(help="sticky, least (loaded) or random.")] = "sticky",
    max_running: Annotated[int, typer.Option(help="Requests computed at once by a node.")] = 256,
    prefill_chunk: Annotated[int, typer.Option(help="Prompt tokens of a step.")] = 2048,
    prefill_share: Annotated[float, typer.Option(help="Share of nodes that only prefill.")] = 0.0,
    split: Annotated[
        str | None, typer.Option(help='"TP8", "EP8", "TP4 x PP2": see plan fit.')
    ] = None,
    skew: Annotated[float, typer.Option(help="How unequal experts are (0: balanced).")] = 0.0,
    seconds: Annotated[float, typer.Option(help="Time that is simulated.")] = 60.0,
    quantization: Annotated[str | None, typer.Option(help="Default: as stored.")] = None,
    engine: Annotated[str | None, typer.Option(help="sglang, ds4, llama.cpp, dsv4.")] = None,
    price: Annotated[float | None, typer.Option(help="US$ a month for a node.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same traffic.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="Requests from a JSONL file.")] = None,
    measure: Annotated[
        str | None, typer.Option(help="Replay the trace on the server at this URL, and compare.")
    ] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Simulate serving, from one node to ten thousand: waiting, throughput, cost.

    \b
    [bold]Examples[/bold]
      dsv4 plan fleet
      dsv4 plan fleet --nodes 16 --routing least --prefill-share 0.25
      dsv4 plan fleet --trace trace.jsonl --measure http://127.0.0.1:8000
    """
    from ..planner.fleet import Serving, grow, simulate
    from ..planner.workload import Workload, read_trace

    serving = Serving(max_running, prefill_chunk, routing, prefill_share)
    requests = None if trace is None else read_trace(trace)
    if measure is not None:
        from ..planner.replay import measure as replay

        if requests is None:
            raise ConfigError("--measure replays a trace", expected="--trace FILE", got="none")
        _show_replay(replay(measure, requests, serving), as_json)
        return
    counts = _node_counts(nodes, most=64 if requests else None)
    config, length = model_config(model), tokens(longest)
    costs, month = _costs_of(
        config, hardware, engine, quantization, split, skew, max_running, length
    )
    month = month if price is None else price
    if requests is not None:
        reports = [simulate(requests, costs, serving, replicas=n, month=month) for n in counts]
    else:
        workload = Workload(rate, message, output, turns, think, system)
        reports = grow(
            workload, costs, length, counts, serving, seconds=seconds, month=month, seed=seed
        )
    if plot is not None:
        from ..planner.plots import plot_fleet

        plot_fleet(plot, reports)
    if as_json:
        print(json.dumps({"model": model, "hardware": hardware, "fleets": reports}, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model} on nodes of {hardware}, predicted", box=SIMPLE_HEAD)
    table.add_column("nodes", no_wrap=True)
    for report in reports:
        table.add_column(f"{report['replicas']:,}", justify="right", no_wrap=True)
    rows = (
        ("requests/s", "requests_per_second", "{:,.1f}"),
        ("output tokens/s", "output_tokens_per_second", "{:,.0f}"),
        ("prompt tokens cached", "cache_hit_rate", "{:.0%}"),
        ("busy", "busy", "{:.0%}"),
        ("waiting at the end", "waiting", "{:,}"),
        ("US$ per M output", "cost_per_million_output", "{:,.2f}"),
    )
    for label, key, form in rows:
        if all(key in report for report in reports):
            table.add_row(label, *(form.format(report[key]) for report in reports))
    for label, key in (("TTFT", "ttft"), ("between tokens", "inter_token")):
        for share in ("p50", "p95", "p99"):
            found = [report[key][share] for report in reports]
            values = ("-" if v is None else f"{1000 * v:,.1f}" for v in found)
            table.add_row(f"{label} {share}, ms", *values)
    console = Console()
    console.print(table)
    few = max(report["simulated_replicas"] for report in reports)
    if few < max(counts):
        console.print(f"{few} nodes are simulated; more are their mean-field limit.")


def _node_counts(text: str, most: int | None) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or max(counts) > (most or 1_000_000):
        raise ConfigError(
            "--nodes",
            expected=f"numbers from 1 to {most or 1_000_000:,}, such as 1,10,100",
            got=text,
            hint="a trace is simulated node by node" if most else None,
        )
    return counts


def _costs_of(
    config: V4Config,
    hardware: str,
    engine_name: str | None,
    quantization: str | None,
    split: str | None,
    skew: float,
    users: int,
    longest: int,
) -> tuple[RooflineCosts, float | None]:
    """What work costs on one node, and what the node costs a month."""
    from ..formats import storage_format
    from ..planner.fleet import RooflineCosts
    from ..planner.hardware import engine, machine
    from ..planner.roofline import Speed

    on = this_machine() if hardware == "this" else machine(hardware)
    software = engine(engine_name or on.device.engine)
    speed = Speed(config, on, software, quantization or storage_format(config))
    # the split that decodes fastest with many short sequences; memory limits what runs later
    place = speed.place(min(users, 16), 4096, split)
    if place is None:
        raise ConfigError(
            "the model does not fit on a node",
            expected=f"room for {speed.sizes.total / 1e9:,.1f} GB of weights"
            + (f" with the split {split}" if split else ""),
            got=on.name,
            hint=f"dsv4 plan fit --hardware {hardware!r}",
        )
    month = on.device.month
    costs = RooflineCosts(speed, place, longest, skew=skew)
    return costs, None if month is None else month * on.count


def _show_replay(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['requests']} requests", box=SIMPLE_HEAD)
    for column in ("", "measured", "predicted", "error"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    measured, predicted = report["measured"], report["predicted"]
    pairs = [
        (f"{label} {share}, ms", 1000 * measured[key][share], 1000 * predicted[key][share])
        for label, key in (("TTFT", "ttft"), ("between tokens", "inter_token"))
        for share in ("p50", "p95", "p99")
        if measured[key][share] and predicted[key][share]
    ]
    speed = "output_tokens_per_second"
    pairs.append(("output tokens/s", measured[speed], predicted[speed]))
    for name, a, b in pairs:
        table.add_row(name, f"{a:,.1f}", f"{b:,.1f}", f"{b / a - 1:+.0%}")
    console = Console(highlight=False)
    console.print(table)
    drift = report["drift"]
    verdict = "a fair comparison" if abs(drift) < 0.1 else "not a quiet machine, compare nothing"
    console.print(f"A token alone took {drift:+.0%} longer after than before: {verdict}.")
