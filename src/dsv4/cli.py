"""The ``dsv4`` command. Each function parses, calls and prints; the work is done elsewhere.

Heavy imports live inside the functions, so that ``dsv4 --help`` answers at once. Whatever dsv4
refuses (DSV4Error) is printed in red on stderr, with exit code 2 and no traceback; Ctrl-C exits
with 130.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .config import PRESETS, V4Config
from .errors import ConfigError, DSV4Error
from .train.commands import data_app
from .train.launch import train_app

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .checkpoint import TensorSpec
    from .engine import SamplingParams

app = typer.Typer(
    name="dsv4",
    help="The whole DeepSeek-V4 system: its files, its models, training and serving.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def main() -> None:
    """Entry point of the ``dsv4`` command."""
    try:
        app()
    except DSV4Error as e:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(str(e), style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ------------------------------------------------------------------ commands


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
    from .checkpoint import Checkpoint, inventory, storage_format

    specs: Mapping[str, TensorSpec]
    if preset is not None:
        config, title = V4Config.preset(preset), f"preset {preset}"
        specs = inventory(config)
    elif Path(str(path)).suffix == ".json":
        config, title = V4Config.from_json(str(path)), str(path)
        specs = inventory(config)
    else:
        folder = _packaged(str(path)) or Path(str(path))
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
        numbers = (f"{row['tensors']:,}", f"{row['stored_elements']:,}", _human(row["bytes"]))
        component = row["component"] if row["component"] != shown else ""
        table.add_row(component, row["dtype"], *numbers, share)
        shown = row["component"]
    table.add_section()
    totals = (f"{report['tensors']:,}", f"{report['stored_elements']:,}", _human(report["bytes"]))
    table.add_row("all", "", *totals, "100%")
    console = Console()
    console.print(table)
    kinds_said = ", ".join(f"{n} {kind}" for kind, n in report["layers"].items() if n)
    letters = ["-" if kind == "window" else kind[0] for kind in kinds]
    lines = (
        f"parameters: {_count(counts.total)} in total (MTP {_count(counts.mtp)}),"
        f" {_count(counts.active)} active per token",
        f"experts:    {config.n_routed_experts} routed, {config.num_experts_per_tok} per token,"
        f" {config.n_shared_experts} shared",
        f"widths:     hidden {config.hidden_size}, {config.num_attention_heads} heads of"
        f" {config.head_dim}, vocabulary {config.vocab_size}",
        f"layers:     {kinds_said}",
        "(- window, C CSA, H HCA, then MTP)",
        f"{''.join(letters[: len(trunk)])} {''.join(letters[len(trunk) :])}",
    )
    console.print("\n".join(lines), highlight=False)


def _size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, factor = text.upper().strip(), 1
    for unit, value in units.items():
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), value
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"expected bytes, such as 4GB or 500MB, got {text}") from None


ShardBytes = Annotated[
    int | None,
    typer.Option(
        parser=_size, metavar="SIZE", help="Largest file, such as 500MB. Default: as published."
    ),
]


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    preset: Annotated[str, typer.Option(help=f"Start from: {', '.join(PRESETS)}.")] = "flash",
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
    from .checkpoint import inventory, save_checkpoint, with_format
    from .synth import resize, synthesize

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
    config = resize(V4Config.preset(preset), scale, **changes)
    if storage is not None:
        config = with_format(config, storage)
    _must_be_new(out, force)
    files = _small_tokenizer(config, tokenizer)
    specs = inventory(config)
    total = sum(spec.bytes for spec in specs.values())
    with _bar(f"writing {out}", total) as progress:
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
    from .checkpoint import Checkpoint, inventory, with_format
    from .convert import convert as convert_checkpoint

    checkpoint = Checkpoint.open(source)
    specs = inventory(with_format(checkpoint.config, to))
    _must_be_new(target, force)
    total = sum(spec.bytes for spec in specs.values())
    with _bar(f"writing {target}", total) as progress:
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
    from .hub import pull as pull_checkpoint

    with _bar("verifying", None) as progress:
        checkpoint = pull_checkpoint(repo, to, revision=revision, progress=progress)
    _done(checkpoint.path, len(checkpoint.specs), checkpoint.bytes)


ModelName = Annotated[str, typer.Argument(help="v4-nano, or a checkpoint folder.")]
Numerics = Annotated[str, typer.Option(help="official (as published) or float32.")]
Temperature = Annotated[float, typer.Option(help="0 (always the likeliest token) to 2.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens only: (0, 1].")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Think = Annotated[str, typer.Option(help="Reasoning before the answer: off, high or max.")]
Threads = Annotated[
    int | None,
    typer.Option(help="At most so many. Default: one per core.", min=1, show_default=False),
]
Context = Annotated[
    int | None,
    typer.Option(help="Largest prompt and answer, in tokens. Default: the model's.", min=2),
]


@app.command()
def serve(
    model: ModelName = "v4-nano",
    host: Annotated[str, typer.Option(help="0.0.0.0 serves other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    numerics: Numerics = "official",
    api_key: Annotated[
        str | None, typer.Option(envvar="DSV4_API_KEY", help="Callers must send this key.")
    ] = None,
    context: Context = None,
    threads: Threads = None,
    max_running: Annotated[int, typer.Option(help="Requests computed at once.", min=1)] = 8,
    max_waiting: Annotated[int, typer.Option(help="Requests in line.", min=0)] = 256,
    sessions: Annotated[int, typer.Option(help="Conversations kept for reuse.", min=0)] = 8,
    strict_model: Annotated[
        bool, typer.Option(help="Refuse requests that name another model.")
    ] = False,
    official_sampling: Annotated[
        bool,
        typer.Option(help="When thinking, ignore temperature and top_p as the hosted API does."),
    ] = False,
) -> None:
    """Serve a model over HTTP, with the chat completions API of DeepSeek and OpenAI.

    [bold]Examples[/bold]

    \b
      dsv4 serve
      dsv4 serve ./my-model --port 9000 --api-key secret
    """
    from .api import load
    from .server import LocalBackend, create_app, listen, run

    sock = listen(host, port)  # before the model is loaded, which may take long
    port = sock.getsockname()[1]
    loaded = load(model, numerics=numerics)
    _use_threads(threads)
    backend = LocalBackend(
        loaded,
        max_running=max_running,
        max_waiting=max_waiting,
        session_pool=sessions,
        context_length=context,
    )
    application = create_app(
        backend, api_key=api_key, strict_model=strict_model, official_sampling=official_sampling
    )
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if api_key else ""
    print(f"""{backend.model.id}: {backend.model.description}
serving on {address}  (Ctrl-C ends it)

  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'
""", flush=True)  # fmt: skip
    run(application, backend, sock)


@app.command()
def chat(
    model: ModelName = "v4-nano",
    think: Think = "high",
    system: Annotated[str, typer.Option(help="Instructions that stand before the chat.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.", min=1)] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    numerics: Numerics = "official",
    context: Context = None,
    threads: Threads = None,
) -> None:
    """Talk to a model in the terminal; /help lists the commands there.

    [bold]Examples[/bold]

    \b
      dsv4 chat
      dsv4 chat ./my-model --think off --temperature 0
      echo 'What is 3 times 4?' | dsv4 chat
    """
    from .api import load
    from .chat import Chat
    from .server import LocalBackend

    sampling = _sampling(max_tokens, temperature, top_p, seed)
    loaded = load(model, numerics=numerics)
    _use_threads(threads)
    backend = LocalBackend(loaded, context_length=context)
    try:
        Chat(backend, sampling=sampling, think=_level(think), system=system).run()
    finally:
        backend.close()


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="The message; - reads standard input.")],
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.", min=1)] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    think: Think = "off",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    numerics: Numerics = "official",
    threads: Threads = None,
) -> None:
    """Print what a model answers to one prompt, as it comes. Reasoning goes to stderr.

    [bold]Examples[/bold]

    \b
      dsv4 generate v4-nano 'What is 3 times 4?' --temperature 0
      dsv4 generate v4-nano 'Once upon a time' --raw --max-tokens 100 --seed 1
    """
    from .api import load
    from .chat import answer_once, continue_text
    from .server import LocalBackend

    sampling = _sampling(max_tokens, temperature, top_p, seed)
    level = _level(think)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = load(model, numerics=numerics)
    _use_threads(threads)
    if raw:
        continue_text(loaded, text, sampling)
        return
    backend = LocalBackend(loaded)
    try:
        answer_once(backend, text, level, sampling)
    finally:
        backend.close()


def _use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _level(think: str) -> str:
    if think not in ("off", "high", "max"):
        raise ConfigError("--think", expected="off, high or max", got=think)
    return think


def _sampling(
    max_tokens: int | None, temperature: float, top_p: float, seed: int | None
) -> SamplingParams:
    from .engine import SamplingParams

    return SamplingParams(max_tokens, temperature, top_p, seed)


app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")


@app.command("eval")
def evaluate(
    model: ModelName,
    seed: Annotated[int, typer.Option(help="Another seed asks other questions.")] = 0,
    n: Annotated[int, typer.Option("--n", help="Questions per task.", min=1)] = 100,
    task: Annotated[
        list[str] | None, typer.Option(help="One task; may be given again. All by default.")
    ] = None,
    think: Annotated[
        str | None, typer.Option(help="off, high or max, instead of the tasks' own.")
    ] = None,
    numerics: Numerics = "official",
    as_json: Json = False,
) -> None:
    """Measure a model on held-out questions, greedily: accuracy with its 95% interval.

    Without --task the mean loss on held-out documents is measured too.

    \b
    [bold]Examples[/bold]
      dsv4 eval v4-nano
      dsv4 eval v4-nano --task recall_500 --n 200 --seed 1 --json
    """
    from .api import load
    from .evals.run import evaluate as run
    from .evals.run import heldout_loss

    def show(name: str, done: int, correct: int) -> None:
        print(f"\r{name}: {correct} of {done} \033[K", end="", file=sys.stderr, flush=True)

    loaded = load(model, numerics=numerics)
    report = run(
        loaded,
        seed,
        n,
        task or None,
        show if sys.stderr.isatty() else None,
        thinking=_level(think) if think else None,
    )
    if task is None and loaded.tokenizer is not None:
        report["heldout_loss"] = heldout_loss(loaded, loaded.tokenizer, seed, n)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if as_json:
        print(json.dumps({"model": model, "numerics": numerics} | report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {n} held-out questions a task, seed {seed}", box=SIMPLE_HEAD)
    table.add_column("task", no_wrap=True)
    table.add_column("thinking")
    for column in ("right", "95% interval", "chance"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in report["tasks"].items():
        low, high = row["interval"]
        shares = f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", f"{row['chance']:.0%}"
        table.add_row(name, row["thinking"], *shares)
    Console().print(table)
    if "heldout_loss" in report:
        losses = (f"{name} {loss:.3f}" for name, loss in report["heldout_loss"].items())
        print("held-out loss, nats a token: " + ", ".join(losses))


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="v4-nano (default), or a checkpoint folder.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another implementation on the same weights: transformers.")
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
    """Measure speed and memory, alone or next to another implementation.

    Medians of alternating runs, each implementation in its own process.
    The JSON is a receipt: it names the machine, the commit and the command.

    \b
    [bold]Examples[/bold]
      dsv4 bench
      dsv4 bench ./my-model --prompt 4096 --threads 1
      dsv4 bench --synth small --against transformers --json
    """
    from .bench import SPEEDS, run

    if model is not None and synth is not None:
        raise ConfigError("bench measures one model", expected="MODEL or --synth", got="both")
    watched = sys.stderr.isatty()

    def say(text: str) -> None:
        if watched:
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)

    report = run(
        model or "v4-nano",
        against=against,
        synth=synth,
        prompt=prompt,
        new=new,
        repeats=repeats,
        threads=threads,
        say=say,
    )
    say("")
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    machine, engines, size = report["machine"], report["engines"], report["model"]["file_bytes"]
    table = Table(title=f"{report['model']['name']}, {_human(size)}", box=SIMPLE_HEAD)
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
    table.add_row("memory added", *(_human(e["memory"]["resident_bytes"]) for e in each), *last)
    table.add_row("peak memory added", *(_human(e["memory"]["peak_bytes"]) for e in each))
    table.add_row(
        "without KV / file",
        *(f"{e['memory']['resident_without_kv_of_file']:.2f}" for e in each),
    )
    table.add_row("loading, s", *(f"{e['load_seconds']:.2f}" for e in each))
    table.add_row("top-1 of float32", *(f"{e['agreement']['top1']:.1%}" for e in each))
    table.add_row("median KL to float32", *(f"{e['agreement']['kl_median']:.1e}" for e in each))
    console = Console()
    console.print(table)
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, reads"
        f" {machine['stream_read_gb_per_s']:.1f} GB/s, multiplies"
        f" {machine['bf16_tflop_per_s']:.2f} (BF16) and {machine['f32_tflop_per_s']:.2f}"
        " (F32) TFLOP/s",
        highlight=False,
    )


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

    nano = _packaged("v4-nano")
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
        "kernels": "torch reference; native kernels not built",
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
        "memory_bytes": _human(int(page * os.sysconf("SC_PHYS_PAGES"))),
        "disk_free_bytes": _human(shutil.disk_usage(".").free),
        "v4_nano": "in the package" if nano else "not in the package",
    }
    for key, value in shown.items():
        table.add_row(key.removesuffix("_bytes").replace("_", " "), str(value))
    Console().print(table)


# ------------------------------------------------------------------ helpers


def _packaged(name: str) -> Path | None:
    """The folder of a model that ships in the package, such as v4-nano."""
    folder = Path(__file__).parent / "models" / name
    return folder if (folder / "config.json").is_file() and not Path(name).exists() else None


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


def _human(size: int) -> str:
    for unit, value in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= value:
            return f"{size / value:,.2f} {unit}"
    return f"{size} B"


def _count(number: int) -> str:
    for unit, value in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if number >= value:
            return f"{number / value:.2f}{unit}"
    return f"{number:,}"


def _must_be_new(folder: Path, force: bool) -> None:
    if folder.exists() and not force and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists", expected="a new or empty folder", hint="--force replaces it"
        )


def _done(folder: Path, tensors: int, size: int) -> None:
    print(f"{folder}: {tensors:,} tensors, {_human(size)}")


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, in bytes; silent when stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    quiet = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


def _small_tokenizer(config: V4Config, wanted: bool | None) -> dict[str, bytes]:
    """The files of a byte-level tokenizer that fits ``config``, or none."""
    import tempfile

    from .checkpoint import inventory
    from .encoding import SPECIAL_TOKENS
    from .tokenizer import Tokenizer

    least = len(SPECIAL_TOKENS) + 256
    if wanted is False or (wanted is None and config.vocab_size < least):
        return {}
    text = "\n".join(name for name in inventory(config) if "experts" not in name)
    trained = Tokenizer.train([text], min(config.vocab_size, least + 256), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        trained.save(folder)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


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


if __name__ == "__main__":
    main()
