"""The ``dsv4 data`` commands: what the training data is, and which texts there are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .generators.document import Document, Split
    from .text import Passage

data_app = typer.Typer(no_args_is_help=True, help="Look at the training data.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Seed = Annotated[int, typer.Option(help="Seed of the stream.")]


@data_app.command("stats")
def data_stats(
    documents: Annotated[int, typer.Option("--n", "--documents", help="How many to draw.")] = 2000,
    seed: Seed = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of a tokenizer. Default: that of v4-nano.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="KIND or KIND=WEIGHT; may be given again. All by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Documents, tokens and trained tokens of each kind of training data.

    \b
    [bold]Examples[/bold]
      dsv4 data stats
      dsv4 data stats --kind dialogue=3 --kind text=1 --n 5000
    """
    from ..api import SHIPPED
    from ..tokenizer import Tokenizer
    from .data import KINDS, WEIGHTS, stats
    from .text import ANY_TEXT, LEXICON, SOURCES

    shares = dict(WEIGHTS) | {ANY_TEXT: 60.0}
    if SOURCES["wordnet"].find():
        shares[LEXICON] = 10.0
    if kind:
        pairs = [each.partition("=") for each in kind]
        shares = {name: _weight(weight) for name, _, weight in pairs}
    _known(shares, KINDS)
    rows = stats(seed, documents, Tokenizer.load(tokenizer or SHIPPED / "v4-nano"), shares)
    if as_json:
        more = ("mean_length", "bytes_per_token")
        print(json.dumps({k: vars(v) | {m: getattr(v, m) for m in more} for k, v in rows.items()}))
        return
    total = sum(row.tokens for row in rows.values())
    print(f"{'kind':12}{'docs':>7}{'tokens':>10}{'share':>7}{'trained':>10}{'longest':>8}"
          f"{'B/token':>8}{'again':>6}{'held out':>9}{'copies':>7}")  # fmt: skip
    for name, row in rows.items():
        held_out = "1 in 10" if row.held_out is None else f"{row.held_out:,}"
        removed = "" if row.removed is None else f"{row.removed:,}"
        print(f"{name:12}{row.documents:7,}{row.tokens:10,}{row.tokens / total:7.1%}"
              f"{row.trained:10,}{row.longest:8,}{row.bytes_per_token:8.2f}{row.repeated:6,}"
              f"{held_out:>9}{removed:>7}")  # fmt: skip
    print("\ntrained: tokens with a loss; again: documents drawn before; copies: removed at once")


@data_app.command("show")
def data_show(
    kind: Annotated[
        str | None, typer.Option("--kind", "--task", help="One kind. All by default.")
    ] = None,
    count: Annotated[int, typer.Option("--n", "--count", help="How many documents.", min=1)] = 5,
    seed: Seed = 0,
    held_out: Annotated[bool, typer.Option(help="From the held-out split.")] = False,
    longest: Annotated[int, typer.Option(help="Tokens of the longest recall text.")] = 200,
    raw: Annotated[bool, typer.Option(help="As the model sees it.")] = False,
) -> None:
    """Print documents of the training data.

    \b
    [bold]Examples[/bold]
      dsv4 data show --kind dates --n 3
      dsv4 data show --kind chitchat --raw
    """
    from itertools import islice

    from .data import KINDS, as_text, documents

    _known([kind] if kind else [], KINDS)
    split: Split = "heldout" if held_out else "train"
    stream = documents(seed, split, {kind: 1.0} if kind else None, longest)
    for doc in islice(stream, count):
        print(f"--- {doc.task}")
        print(as_text(doc) if raw else _readable(doc), end="\n\n")


@data_app.command("texts")
def data_texts() -> None:
    """Which texts can be trained on, which of them are installed, and how to get the others."""
    from .text import SOURCES

    for source in SOURCES.values():
        state = "installed" if source.find() else f"missing: {source.install}"
        print(f"{source.name:10} {source.what} ({source.licence}); {state}")


def _readable(doc: Document | Passage) -> str:
    from .text import Passage

    if isinstance(doc, Passage):
        return doc.text
    lines = []
    for message in doc.messages:
        for tool in message.get("tools", []):
            lines.append(f"    tool: {tool['function']['name']}")
        for part, label in (("reasoning_content", "thinks"), ("content", message["role"])):
            if message.get(part):
                lines.append(f"{label:>9}: " + message[part].replace("\n", "\n" + " " * 11))
        for call in message.get("tool_calls", []):
            lines.append(f"    calls: {call['function']['name']} {call['function']['arguments']}")
    return "\n".join(lines)


def _weight(text: str) -> float:
    from ..errors import ConfigError

    try:
        return float(text or 1)
    except ValueError:
        raise ConfigError("--kind", expected="KIND=WEIGHT", got=text) from None


def _known(given: Iterable[str], kinds: tuple[str, ...]) -> None:
    from ..errors import ConfigError

    for kind in given:
        if kind not in kinds:
            raise ConfigError("no such kind of data", expected=", ".join(kinds), got=kind)
