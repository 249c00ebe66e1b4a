"""Commands about files: inspect, synth, convert, pull."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import PRESETS, V4Config
from ..errors import ConfigError
from .app import Json, app, bar, count, human, packaged, size_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..checkpoint import TensorSpec

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@app.command()
def inspect(
    path: Annotated[
        str | None,
        typer.Argument(help="A checkpoint folder, or a config.json.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"A published shape: {', '.join(PRESETS)}.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint holds, or what a config implies; nothing is loaded.

    A folder is validated: all names, shapes, dtypes, offsets and scales.

    \b
    [bold]Examples[/bold]
      dsv4 inspect ./DeepSeek-V4-Flash     what is in it, and is it sound?
      dsv4 inspect --preset pro            the same for V4-Pro, without 865 GB
      dsv4 inspect --preset flash --json   tensors, stored_elements, bytes, ...
    """
    if (path is None) == (preset is None):
        raise ConfigError("inspect needs one thing to look at", expected="PATH or --preset NAME")
    from ..checkpoint import Checkpoint, inventory, storage_format

    specs: Mapping[str, TensorSpec]
    if preset is not None:
        config, title = V4Config.preset(preset), f"preset {preset}"
        specs = inventory(config)
    elif Path(str(path)).suffix == ".json":
        config, title = V4Config.from_json(str(path)), str(path)
        specs = inventory(config)
    else:
        folder = packaged(str(path)) or Path(str(path))
        checkpoint = Checkpoint.open(folder)
        config, specs, title = checkpoint.config, checkpoint.specs, str(folder)
    counts = config.parameter_counts()
    kinds = ["window" if r == 0 else "CSA" if r == 4 else "HCA" for r in config.compress_ratios]
    trunk = kinds[: config.num_hidden_layers]
    report: dict[str, Any] = {
        "name": title,
        "format": storage_format(config),
        "tensors": len(specs),
        "stored_elements": sum(s.elements for s in specs.values()),
        "bytes": sum(s.bytes for s in specs.values()),
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "parameters_mtp": counts.mtp,
        "layers": {kind: trunk.count(kind) for kind in ("window", "CSA", "HCA")}
        | {"hash-routed": config.num_hash_layers, "MTP": config.mtp_layers},
        "components": _components(specs),
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title} ({report['format']} format)", box=SIMPLE_HEAD)
    for column in ("component", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("tensors", "stored elements", "bytes", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = ""
    for row in report["components"]:
        share = f"{100 * row['bytes'] / report['bytes']:.2f}%"
        numbers = (f"{row['tensors']:,}", f"{row['stored_elements']:,}", human(row["bytes"]))
        component = row["component"] if row["component"] != shown else ""
        table.add_row(component, row["dtype"], *numbers, share)
        shown = row["component"]
    table.add_section()
    totals = (f"{report['tensors']:,}", f"{report['stored_elements']:,}", human(report["bytes"]))
    table.add_row("all", "", *totals, "100%")
    console = Console()
    console.print(table)
    kinds_said = ", ".join(f"{n} {kind}" for kind, n in report["layers"].items() if n)
    letters = ["-" if kind == "window" else kind[0] for kind in kinds]
    lines = (
        f"parameters: {count(counts.total)} in total (MTP {count(counts.mtp)}),"
        f" {count(counts.active)} active per token",
        f"experts:    {config.n_routed_experts} routed, {config.num_experts_per_tok} per token,"
        f" {config.n_shared_experts} shared",
        f"widths:     hidden {config.hidden_size}, {config.num_attention_heads} heads of"
        f" {config.head_dim}, vocabulary {config.vocab_size}",
        f"layers:     {kinds_said}",
        "(- window, C CSA, H HCA, then MTP)",
        f"{''.join(letters[: len(trunk)])} {''.join(letters[len(trunk) :])}",
    )
    console.print("\n".join(lines), highlight=False)


ShardBytes = Annotated[
    int | None,
    typer.Option(
        parser=size_of, metavar="SIZE", help="Largest file, such as 500MB. Default: as published."
    ),
]


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    preset: Annotated[
        str, typer.Option(help=f"Start from: {', '.join(PRESETS)}, small or mid.")
    ] = "flash",
    layers: Annotated[int | None, typer.Option(help="Layers; keeps the first ones.")] = None,
    hidden: Annotated[int | None, typer.Option(help="hidden_size")] = None,
    heads: Annotated[int | None, typer.Option(help="num_attention_heads")] = None,
    experts: Annotated[int | None, typer.Option(help="n_routed_experts")] = None,
    vocab: Annotated[int | None, typer.Option(help="vocab_size")] = None,
    scale: Annotated[float, typer.Option(help="Multiply all widths by this.")] = 1.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any config key: KEY=JSON. Repeatable.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option("--format", help="instruct, fp8, base or bf16.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    shard_bytes: ShardBytes = None,
    tokenizer: Annotated[
        bool | None,
        typer.Option(
            help="Add a small byte-level tokenizer. Default: when the vocabulary has room for it."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write a checkpoint of any shape with random weights, in the official format.

    For tests and benchmarks of anything that reads V4 files: names, dtypes and
    scales are right, activations of ordinary size. Memory stays that of one tensor.

    \b
    [bold]Examples[/bold]
      dsv4 synth /tmp/tiny --preset nano
      dsv4 synth /tmp/flash-4 --layers 4            four layers of real width
      dsv4 synth /tmp/small --scale 0.25 --layers 8 --shard-bytes 500MB
      dsv4 synth /tmp/odd --preset nano --layers 3 --seed 1 \\
          --set 'compress_ratios=[0,4,128,0]' --set index_topk=64
    """
    from ..checkpoint import inventory, save_checkpoint, with_format
    from ..synth import SHAPES, resize, shape, small_tokenizer, synthesize

    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "n_routed_experts": experts,
        "vocab_size": vocab,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError("--set", expected="KEY=VALUE", got=setting)
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
    base = shape(preset) if preset in SHAPES else V4Config.preset(preset)
    config = resize(base, scale, **changes)
    if storage is not None:
        config = with_format(config, storage)
    _must_be_new(out, force)
    files = small_tokenizer(config, tokenizer)
    specs = inventory(config)
    total = sum(spec.bytes for spec in specs.values())
    with bar(f"writing {out}", total) as progress:
        save_checkpoint(
            out,
            config,
            synthesize(config, seed),
            max_shard_bytes=shard_bytes,
            extra_files=files,
            progress=progress,
        )
    _done(out, len(specs), total)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="instruct, fp8, bf16 or base.")],
    shard_bytes: ShardBytes = None,
    force: Force = False,
) -> None:
    """Store a checkpoint in another format.

    \b
      instruct   FP4 experts, FP8 dense (as DeepSeek-V4-Flash and -Pro)
      fp8        FP8 experts too; exact
      base       FP8, F32 scales, own MTP embedding (as -Base models); exact
      bf16       no quantisation; exact, 3.5 times larger than instruct

    To instruct, experts are rounded to FP4 unless they were FP4 before.

    \b
    [bold]Examples[/bold]
      dsv4 convert ./DeepSeek-V4-Flash ./flash-fp8 --to fp8
      dsv4 convert ./my-finetune-bf16 ./my-finetune --to instruct
    """
    from ..checkpoint import Checkpoint, inventory, with_format
    from ..convert import convert as convert_checkpoint

    checkpoint = Checkpoint.open(source)
    specs = inventory(with_format(checkpoint.config, to))
    _must_be_new(target, force)
    total = sum(spec.bytes for spec in specs.values())
    with bar(f"writing {target}", total) as progress:
        convert_checkpoint(checkpoint, target, to, max_shard_bytes=shard_bytes, progress=progress)
    _done(target, len(specs), total)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    to: Annotated[
        Path | None, typer.Option(help="Folder. Default: the repo's name.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. Default: main.", show_default=False)
    ] = None,
) -> None:
    """Fetch a checkpoint from the Hugging Face hub and verify every byte of it.

    Run it again after an interruption: finished files are kept.
    HF_ENDPOINT names a mirror, HF_TOKEN logs in (environment variables).

    \b
    [bold]Examples[/bold]
      dsv4 pull deepseek-ai/DeepSeek-V4-Flash      160 GB
      dsv4 pull deepseek-ai/DeepSeek-V4-Flash-Base --to /data/flash-base
    """
    from ..hub import pull as pull_checkpoint

    with bar("verifying", None) as progress:
        checkpoint = pull_checkpoint(repo, to, revision=revision, progress=progress)
    _done(checkpoint.path, len(checkpoint.specs), checkpoint.bytes)


def _component(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "mtp":
        return "MTP block"
    if parts[0] in ("embed", "head"):
        return {"embed": "embedding", "head": "output head"}[parts[0]]
    if "hc_" in parts[-1]:
        return "mHC"
    if "norm" in name and "compressor" not in name:
        return "norms"
    if "indexer" in parts:
        return "indexer"
    if "compressor" in parts:
        return "compressors"
    if "attn" in parts:
        return "attention"
    if "experts" in parts:
        return "routed experts"
    return "shared experts" if "shared_experts" in parts else "router"


def _components(specs: Mapping[str, TensorSpec]) -> list[dict[str, Any]]:
    """One row per component and dtype, components in the order of the file's reading order."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    order: list[str] = []
    for name, spec in specs.items():
        component = _component(name)
        if component not in order:
            order.append(component)
        row = rows.setdefault(
            (component, spec.dtype),
            {
                "component": component,
                "dtype": spec.dtype,
                "tensors": 0,
                "stored_elements": 0,
                "bytes": 0,
            },
        )
        row["tensors"] += 1
        row["stored_elements"] += spec.elements
        row["bytes"] += spec.bytes
    return sorted(rows.values(), key=lambda row: order.index(row["component"]))


def _must_be_new(folder: Path, force: bool) -> None:
    if folder.exists() and not force and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists", expected="a new or empty folder", hint="--force replaces it"
        )


def _done(folder: Path, tensors: int, size: int) -> None:
    print(f"{folder}: {tensors:,} tensors, {human(size)}")
