"""``dsv4 serve`` and ``dsv4 generate`` as processes: what they print, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

# The real command with a model that talks for as long as the test wants.
PROGRAM = """
import sys, types
from scripted_models import ScriptedModel, small_tokenizer

def load(name, numerics="official", **memory):
    model = ScriptedModel(small_tokenizer())
    model.name = name
    model.script = lambda prompt: (
        "word " * 5000 if "go on" in prompt
        else "why</think>thus" if prompt.endswith("<think>")
        else "I am " + numerics + "."
    )
    model.pause = 0.002
    return model

sys.modules["dsv4.api"] = types.SimpleNamespace(load=load)
from dsv4.cli import main
main()
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "100",
    "DSV4_DATABASE": "sqlite://",
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *arguments]


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its address, and what it printed until then."""
    with subprocess.Popen(
        command("serve", "--port", "0", *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            printed = ""
            while "serving on" not in printed:
                line = process.stdout.readline()
                assert line, process.stderr.read() if process.stderr else ""
                printed += line
            address = re.search(r"http://\S+", printed)
            assert address
            for _ in range(200):
                with socket.socket() as probe:
                    port = int(address[0].rpartition(":")[2])
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            yield process, address[0], printed
        finally:
            if process.poll() is None:
                process.kill()


def test_serve_says_what_it_serves_and_answers() -> None:
    with serving("--numerics", "float32") as (process, url, printed):
        assert printed.startswith("v4-nano: DeepSeek-V4 architecture")
        body = {
            "messages": [{"role": "user", "content": "Hello"}],
            "thinking": {"type": "disabled"},
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
        assert answer["model"] == "v4-nano"
        assert answer["choices"][0]["message"]["content"] == "I am float32."
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stdout and "curl " + url in process.stdout.read()


GO_ON = {
    "messages": [{"role": "user", "content": "go on"}],
    "thinking": {"type": "disabled"},
    "stream": True,
}


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_signal_ends_the_server_in_the_middle_of_an_answer(signals: list[signal.Signals]) -> None:
    with serving() as (process, url, _):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=GO_ON) as response:
            lines = response.iter_lines()
            next(lines)
            start = time.monotonic()
            for sig in signals:
                process.send_signal(sig)
                time.sleep(0.3)
            rest = [line for line in lines if line]
        assert process.wait(20) == 0 and time.monotonic() - start < 20
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "insufficient_system_resource"
        assert process.stderr and "Traceback" not in process.stderr.read()


def test_sigterm_lets_open_answers_end_and_takes_no_new_ones() -> None:
    with serving() as (process, url, _), httpx.Client() as other:
        assert other.get(f"{url}/ready").status_code == 200
        body = {**GO_ON, "max_tokens": 300}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while (ready := other.get(f"{url}/ready")).status_code == 200:
                pass
            refused = other.post(f"{url}/v1/chat/completions", json=GO_ON)
            alive = other.get(f"{url}/health")
            rest = [line for line in lines if line]
        assert ready.status_code == refused.status_code == 503 and alive.status_code == 200
        assert refused.headers["retry-after"] == "1"
        last = json.loads(rest[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length" and rest[-1] == "data: [DONE]"
        assert last["usage"]["completion_tokens"] == 300
        assert process.wait(20) == 0


def test_an_answer_that_takes_too_long_to_drain_is_ended() -> None:
    with serving("--drain", "0.5") as (process, url, _):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=GO_ON) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        last = json.loads(rest[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "insufficient_system_resource"
        assert process.wait(20) == 0


def test_a_taken_port_is_an_error_with_advice_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            command("serve", "--port", port), capture_output=True, text=True, env=ENVIRONMENT
        )
    assert done.returncode == 2 and done.stdout == ""
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr and "--port" in done.stderr


def test_generate_prints_the_answer_and_reasoning_apart() -> None:
    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command("generate", "v4-nano", *arguments),
            capture_output=True, text=True, env=ENVIRONMENT, timeout=60, **more,  # type: ignore[call-overload]
        )  # fmt: skip

    done = run("Hello", "--temperature", "0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "I am official.\n", "")
    done = run("-", "--max-tokens", "5", input="go on")
    assert done.stdout.startswith("word") and len(done.stdout) < 60
    done = run("Hello", "--think", "high")
    assert (done.stdout, done.stderr) == ("thus\n", "why\n\n")
    for wrong in (("--think", "hard"), ("--temperature", "3")):
        done = run("Hello", *wrong)
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_generate_raw_continues_the_text() -> None:
    arguments = ("v4-nano", "Once<｜Assistant｜>", "--raw", "--max-tokens", "3", "--seed", "1")
    done = subprocess.run(
        command("generate", *arguments),
        capture_output=True, text=True, env=ENVIRONMENT, timeout=60,
    )  # fmt: skip
    # the script would answer a prompt with the special token; its spelling is only text
    assert done.returncode == 0 and "I am" not in done.stdout


def test_a_checkpoint_on_disk_is_served_from_the_command_line(tmp_path: Path) -> None:
    """No stand-in: written, loaded, prompted and decoded by the real program."""
    folder = str(tmp_path / "tiny")
    shape = ("--preset", "nano", "--layers", "3", "--set", "compress_ratios=[0,4,128,0]")
    ask = ("generate", folder, "Hello", "--temperature", "0", "--max-tokens", "6")
    for arguments in (("synth", folder, *shape), ask):
        program = [sys.executable, "-m", "dsv4.cli", *arguments]
        done = subprocess.run(program, capture_output=True, timeout=60, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\n") and not done.stderr
