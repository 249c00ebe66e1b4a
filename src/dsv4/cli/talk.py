"""Commands that answer: serve, chat, generate."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import (
    Context,
    DatabaseUrl,
    ExpertMemory,
    ModelName,
    Numerics,
    Seed,
    Temperature,
    Think,
    Threads,
    TopP,
    app,
    checked_level,
    open_database,
    use_threads,
)

if TYPE_CHECKING:
    from ..api import Model
    from ..engine import SamplingParams


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
    speculate: Annotated[
        bool, typer.Option(help="Guess tokens with the MTP block where that is faster.")
    ] = True,
    cache_gb: Annotated[
        float, typer.Option(help="Memory for what requests compute and later ones reuse, in GB.")
    ] = 4.0,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Keep it here too, for when the server starts again.")
    ] = None,
    cache_dir_gb: Annotated[float, typer.Option(help="How much of it, in GB.")] = 20.0,
    expert_memory: ExpertMemory = None,
    pro: Annotated[
        str | None,
        typer.Option(help="Another model, for deepseek-v4-pro (Expert). Default: the same."),
    ] = None,
    strict_model: Annotated[
        bool, typer.Option(help="Refuse requests that name an unknown model.")
    ] = False,
    retired_names: Annotated[
        bool, typer.Option(help="Accept the retired names deepseek-chat and deepseek-reasoner.")
    ] = False,
    official_sampling: Annotated[
        bool,
        typer.Option(help="When thinking, ignore temperature and top_p as the hosted API does."),
    ] = False,
    database: DatabaseUrl = None,
    prices: Annotated[
        Path | None, typer.Option(help="A price list (TOML). Default: V4's at its launch.")
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="A web site whose pages may use the server; may be repeated. * is any."),
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="Serve HTTPS with this PEM file.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its private key, if not in it.")] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address of a reverse proxy, whose X-Forwarded-* headers are believed."),
    ] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds that SIGTERM gives to open answers.", min=0)
    ] = 30.0,
    log: Annotated[bool, typer.Option(help="Log every request to stderr, as JSON.")] = True,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log what is asked, too.")
    ] = False,
) -> None:
    """Serve a model over HTTP, with the chat completions API of DeepSeek and OpenAI.

    Without a key only this machine is served, and needs none: see dsv4 keys.

    [bold]Examples[/bold]

    \b
      dsv4 serve
      dsv4 serve ./my-model --port 9000 --api-key secret
      dsv4 keys create phone && dsv4 serve --host 0.0.0.0
    """
    from ..api import load
    from ..engine.disk import DiskTier
    from ..server import LocalBackend, create_app
    from ..server.accounts import Keys, is_loopback
    from ..server.prices import PriceList
    from ..server.process import check_tls, listen, run

    check_tls(tls_cert, tls_key)
    price_list = PriceList(prices)
    opened = open_database(database)
    Keys(opened).check_exposure(host, api_key)
    sock = listen(host, port)  # before the model is loaded, which may take long
    port = sock.getsockname()[1]
    load_here = partial(
        load, numerics=numerics, expert_memory=expert_memory, beside=int(cache_gb * 1e9)
    )
    loaded = load_here(model)
    use_threads(threads)
    options: dict[str, Any] = {
        "max_running": max_running,
        "max_waiting": max_waiting,
        "memory_bytes": int(cache_gb * 1e9),
        "context_length": context,
        "speculate": speculate,
    }

    def backend_of(model: Model) -> LocalBackend:
        disk = None
        if cache_dir is not None:
            disk = DiskTier(cache_dir, model.fingerprint(), int(cache_dir_gb * 1e9))
        return LocalBackend(model, **options, disk=disk)

    backend = backend_of(loaded)
    expert = backend_of(load_here(pro)) if pro else None
    application = create_app(
        backend,
        pro=expert,
        database=opened,
        prices=price_list,
        api_key=api_key,
        keyless=is_loopback(host),
        origins=origin or (),
        log_prompts=log_prompts,
        strict_model=strict_model,
        retired_names=retired_names,
        official_sampling=official_sampling,
    )
    scheme = "https" if tls_cert else "http"
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if api_key or Keys(opened).exist() else ""
    print(f"""{backend.model.id}: {backend.model.description}
serving on {address}  (Ctrl-C ends it)

  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'
""", flush=True)  # fmt: skip
    run(
        application,
        [backend, expert] if expert else [backend],
        sock,
        drain=drain,
        tls=(tls_cert, tls_key) if tls_cert else None,
        proxies=proxy or (),
        log=log,
    )
    opened.close()


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
    expert_memory: ExpertMemory = None,
    threads: Threads = None,
) -> None:
    """Talk to a model in the terminal; /help lists the commands there.

    [bold]Examples[/bold]

    \b
      dsv4 chat
      dsv4 chat ./my-model --think off --temperature 0
      echo 'What is 3 times 4?' | dsv4 chat
    """
    from ..api import load
    from ..chat import Chat
    from ..server import LocalBackend

    sampling = params(max_tokens, temperature, top_p, seed)
    loaded = load(model, numerics=numerics, expert_memory=expert_memory)
    use_threads(threads)
    backend = LocalBackend(loaded, context_length=context)
    try:
        Chat(backend, sampling=sampling, think=checked_level(think), system=system).run()
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
    expert_memory: ExpertMemory = None,
    threads: Threads = None,
) -> None:
    """Print what a model answers to one prompt, as it comes. Reasoning goes to stderr.

    [bold]Examples[/bold]

    \b
      dsv4 generate v4-nano 'What is 3 times 4?' --temperature 0
      dsv4 generate v4-nano 'Once upon a time' --raw --max-tokens 100 --seed 1
    """
    from ..api import load
    from ..chat import answer_once, continue_text
    from ..server import LocalBackend

    sampling = params(max_tokens, temperature, top_p, seed)
    effort = checked_level(think)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = load(model, numerics=numerics, expert_memory=expert_memory)
    use_threads(threads)
    if raw:
        continue_text(loaded, text, sampling)
        return
    backend = LocalBackend(loaded)
    try:
        answer_once(backend, text, effort, sampling)
    finally:
        backend.close()


def params(
    max_tokens: int | None, temperature: float, top_p: float, seed: int | None
) -> SamplingParams:
    from ..engine import SamplingParams

    return SamplingParams(max_tokens, temperature, top_p, seed)
