"""Talking to a model in the terminal: streaming, many turns, and a few commands."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .engine import Engine, SamplingParams
from .errors import ConfigError, DSV4Error
from .server.backend import Backend, ChatRequest, ContentDelta, Finish, ReasoningDelta, ToolCall
from .server.surface import note

if TYPE_CHECKING:
    from .api import Model

HELP = """\
/think off|high|max   how much to reason before answering
/retry                answer the last message again
/undo                 forget the last message and its answer
/clear                forget the conversation
/exit                 leave (also Ctrl-D, or Ctrl-C twice)
Ctrl-C stops an answer."""
THINK = {"off": "none", "high": "high", "max": "max"}
# Control characters could make the terminal do things; a model's text only says things.
_SILENT = {c: None for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


@dataclass
class Turn:
    user: str
    answer: str = ""
    reasoning: str = ""

    def messages(self) -> list[dict[str, Any]]:
        asked = {"role": "user", "content": self.user}
        if not self.answer:  # stopped before it said anything
            return [asked]
        said = {"role": "assistant", "content": self.answer, "reasoning_content": self.reasoning}
        return [asked, said]


class Chat:
    """A conversation with ``backend``, printed to ``console``.

    ``sampling`` applies to every answer; a retry with a seed uses the next seed, so that it can
    come out differently.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        sampling: SamplingParams | None = None,
        think: str = "high",
        system: str = "",
        console: Console | None = None,
    ) -> None:
        self._backend = backend
        self._sampling = sampling or SamplingParams()
        self._think = think
        self._system = system
        self._console = console or Console(highlight=False)
        self._turns: list[Turn] = []
        self._retries = 0

    def run(self, read: Callable[[str], str] = input) -> None:
        """Read lines (with ``read``, given the prompt to show) until the end; never raises.

        What comes through a pipe is answered line by line, without prompts.
        """
        terminal = sys.stdin.isatty()
        if terminal:
            _enable_line_editing()
            self._say(f"{self._backend.model.id}: {self._backend.model.description}", "bold")
            self._say("/help lists the commands.\n", "dim")
            self._note()
        interrupted = False
        while True:
            try:
                line = read("> " if terminal else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                self._say("")
                if interrupted:
                    break
                interrupted = True
                self._say("Ctrl-C again, or Ctrl-D, leaves.", "dim")
                continue
            interrupted = False
            if line.startswith("/"):
                if not self.command(line):
                    break
            elif line:
                self._turns.append(Turn(line))
                self._retries = 0
                interrupted = self._answer()
        if terminal:
            self._say("")

    def command(self, line: str) -> bool:
        """Obey a line that starts with ``/``; False when it says to leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/exit", "/quit"):
            return False
        if name == "/think":
            if argument in THINK:
                self._think = argument
            elif argument:
                self._say(f"/think off, high or max, not {argument}", "red")
            self._say(f"thinking: {self._think}", "dim")
            self._note()
        elif name == "/retry" and self._turns:
            self._turns[-1] = Turn(self._turns[-1].user)
            self._retries += 1
            self._answer()
        elif name == "/undo" and self._turns:
            gone = self._turns.pop()
            self._say(f"forgotten: {gone.user}", "dim")
        elif name in ("/retry", "/undo"):
            self._say("there is no message yet", "dim")
        elif name == "/clear":
            self._turns.clear()
            self._say("a new conversation", "dim")
        elif name == "/help":
            self._say(HELP)
        else:
            self._say(f"there is no command {name}; /help lists them", "red")
        return True

    def _note(self) -> None:
        for text in note(self._backend.model, THINK[self._think]).values():
            self._say(text, "dim")

    def _answer(self) -> bool:
        """Answer the last turn; True when Ctrl-C stopped it."""
        seed = self._sampling.seed
        if seed is not None and self._retries:
            seed += self._retries
        request = ChatRequest(
            messages=[
                *([{"role": "system", "content": self._system}] if self._system else []),
                *(message for turn in self._turns for message in turn.messages()),
            ],
            effort=THINK[self._think],
            sampling=replace(self._sampling, seed=seed),
        )
        try:
            finished = interruptible(self._stream(request, self._turns[-1]))
        except DSV4Error as error:
            self._say(str(error), "red")
            self._turns.pop()
            return False
        except Exception as error:
            self._say(f"the answer failed: {error!r}", "red")
            return False
        if not finished:
            self._say("\n(stopped)", "dim")
        return not finished

    async def _stream(self, request: ChatRequest, turn: Turn) -> None:
        end = "\n"
        async with aclosing(await self._backend.chat(request)) as events:
            async for event in events:
                if isinstance(event, ReasoningDelta):
                    turn.reasoning += event.text
                    self._write(event.text, "dim")
                elif isinstance(event, ContentDelta):
                    if turn.reasoning and not turn.answer:
                        self._write("\n\n")
                    turn.answer += event.text
                    self._write(event.text)
                elif isinstance(event, ToolCall):
                    self._write(f"\n{event.name}({event.arguments})", "cyan")
                elif isinstance(event, Finish) and event.reason == "length":
                    end = "\n(the answer was cut: it reached the limit of tokens)\n"
        self._write(end, "dim")

    def _write(self, text: str, style: str = "") -> None:
        shown = text.translate(_SILENT)
        self._console.print(
            shown, style=style, end="", markup=False, highlight=False, soft_wrap=True, emoji=False
        )
        self._console.file.flush()

    def _say(self, text: str, style: str = "") -> None:
        self._write(text + "\n", style)


def answer_once(backend: Backend, text: str, think: str, sampling: SamplingParams) -> None:
    """Print the answer to one message on stdout while it comes, its reasoning on stderr.

    Ctrl-C raises KeyboardInterrupt, whatever the model raises is raised.
    """
    message = {"role": "user", "content": text}
    request = ChatRequest(messages=[message], effort=THINK[think], sampling=sampling)

    async def stream() -> None:
        reasoning = False
        async with aclosing(await backend.chat(request)) as events:
            async for event in events:
                if isinstance(event, ReasoningDelta):
                    reasoning = True
                    print(event.text, end="", file=sys.stderr, flush=True)
                elif isinstance(event, ContentDelta):
                    if reasoning:
                        reasoning = False
                        print("\n", file=sys.stderr, flush=True)
                    print(event.text, end="", flush=True)
        print()

    if not interruptible(stream()):
        raise KeyboardInterrupt


def continue_text(model: Model, text: str, sampling: SamplingParams) -> None:
    """Print what ``model`` writes after ``text``, with no chat template but the leading BOS."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{model.name} has no tokenizer", expected="tokenizer.json beside it")
    decoder = tokenizer.stream(skip_special=True)
    with Engine(model) as engine:
        for token in engine.submit([tokenizer.bos_id, *tokenizer.encode(text)], sampling):
            print(decoder.push(token.id), end="", flush=True)
    print(decoder.flush())


def interruptible(work: Coroutine[Any, Any, None]) -> bool:
    """Run ``work`` to its end, or until Ctrl-C, which cancels it; False in that case."""
    return asyncio.run(_until_interrupt(work))


async def _until_interrupt(work: Coroutine[Any, Any, None]) -> bool:
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return False
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    return True


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  # input() then has history and arrow keys
    except ImportError:
        pass
