"""The terminal chat through a real pseudo-terminal and through a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# The child opens its terminal again to make it the controlling one, so that Ctrl-C works.
PROGRAM = """
import os, signal, sys
if os.isatty(0):
    os.open(os.ttyname(0), os.O_RDWR)
from scripted_models import ScriptedModel, small_tokenizer
from dsv4.chat import Chat
from dsv4.engine import SamplingParams
from dsv4.server import LocalBackend

def answer(prompt):
    users = prompt.split("<｜User｜>")[1:]
    last = users[-1].split("<｜Assistant｜>")[0]
    text = "long " * 3000 if last == "go on" else f"[{len(users)}: {last}]"
    if last == "attack":
        text = "a\\x1b[31mb\\x07c"
    return ("hmm " * 3 + "</think>" if prompt.endswith("<think>") else "") + text

model = ScriptedModel(small_tokenizer())
model.script, model.pause = answer, 0.002
backend = LocalBackend(model, context_length=65536)
Chat(backend, sampling=SamplingParams(seed=1), think="high").run()
signal.signal(signal.SIGINT, signal.SIG_IGN)  # insist() types on until it reads that this has left
backend.close()
print("left")
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    ),
    "OMP_NUM_THREADS": "1",
    "TERM": "xterm-256color",
    "COLUMNS": "80",
}


class Terminal:
    """A program at the other end of a pseudo-terminal."""

    def __init__(self) -> None:
        self.fd, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=ENVIRONMENT,
        )  # fmt: skip
        os.close(slave)
        self.text = ""  # what was printed and not yet expected

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def until(self, pattern: str, seconds: float = 20) -> str:
        """Read until ``pattern`` appears; what was printed up to there, as the program wrote it."""
        end = time.monotonic() + seconds
        while (match := re.search(pattern, self.text)) is None:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], self.text
            try:
                self.text += os.read(self.fd, 65536).decode("utf-8", "replace")
            except OSError as gone:  # Linux's end of file of a terminal
                raise AssertionError(self.text) from gone
        seen, self.text = self.text[: match.end()], self.text[match.end() :]
        return seen

    def insist(self, keys: str, pattern: str) -> None:
        """Type again every second: a signal just before readline waits is seen at the next key."""
        for _ in range(20):
            self.type(keys)
            try:
                self.until(pattern, seconds=1)
                return
            except AssertionError:
                pass
        raise AssertionError(f"no {pattern}")

    def ends(self) -> int:
        self.until("left")
        return self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.fd)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    try:
        terminal.until("lists the commands.")
        terminal.until("> ")
        yield terminal
    finally:
        terminal.close()


def test_a_conversation_with_every_command(terminal: Terminal) -> None:
    terminal.type("Hello\r")
    seen = terminal.until(r"\[1: Hello\]")
    assert re.search("\x1b\\[2mh", seen), "reasoning is dim"
    assert not re.search("\x1b\\[2m\\[1", seen), "the answer is not"
    terminal.type("/think off\r")
    terminal.until("thinking: off")
    terminal.type("And now?\r")
    assert "hmm" not in terminal.until(r"\[2: And now\?\]")
    terminal.type("/retry\r")
    terminal.until(r"\[2: And now\?\]")
    terminal.type("/undo\r")
    terminal.until("forgotten: And now?")
    terminal.type("Again\r")
    terminal.until(r"\[2: Again\]")
    terminal.type("/clear\r")
    terminal.until("a new conversation")
    terminal.type("First\r")
    terminal.until(r"\[1: First\]")
    terminal.type("/think max\r")
    terminal.until("meant for a context of 393216 tokens; v4-scripted has 65536 here")
    terminal.type("/think harder\r")
    terminal.until("off, high or max, not harder")
    terminal.type("/help\r")
    terminal.until("/undo ")
    terminal.type("/nonsense\r")
    terminal.until("no command /nonsense")
    terminal.type("/exit\r")
    assert terminal.ends() == 0


def test_control_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.type("/think off\r")
    terminal.until("thinking: off")
    terminal.type("go on\r")
    terminal.until("long long long")
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.type("still there?\r")
    terminal.until(r"\[2: still there\?\]")
    terminal.until("> ")
    terminal.insist("\x03", "Ctrl-C again")
    terminal.insist("\x03", "left")
    assert terminal.process.wait(10) == 0


def test_control_d_leaves(terminal: Terminal) -> None:
    terminal.type("\x04")
    assert terminal.ends() == 0


def test_what_a_model_says_cannot_command_the_terminal(terminal: Terminal) -> None:
    terminal.type("/think off\r")
    terminal.until("thinking: off")
    terminal.type("attack\r")
    assert "\x07" not in terminal.until(r"a\[31mbc")


def test_questions_through_a_pipe_are_answered_in_order() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="/think off\nOne\nTwo\n", capture_output=True, text=True, timeout=60, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "thinking: off\n[1: One]\n[2: Two]\nleft\n"
    assert done.stderr == ""


def test_a_pipe_can_be_interrupted() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write("/think off\ngo on\nOne\n")
        process.stdin.close()
        assert process.stdout.read(30).startswith("thinking: off\nlong")
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert "(stopped)" in rest and "[2: One]" in rest
        assert process.wait(20) == 0
