"""Real clients and coding agents, each in its own environment, against a live server.

The model is scripted, so that what a client must get back is known; all else is real: the agents
write files and run commands. ``make test-clients`` runs them; a client that is not installed under
$DSV4_CLIENTS is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import AGENTS, DONE, STILL
from live_server import CALL, Server
from scripted_models import ScriptedModel, one_torch_thread, small_tokenizer  # noqa: F401

import dsv4
from dsv4.server import LocalBackend
from dsv4.tokenizer import Tokenizer

CLIENTS = Path(os.environ.get("DSV4_CLIENTS", Path(__file__).parents[1] / ".clients")).absolute()
HERE = Path(__file__).parent / "clients"
pytestmark = pytest.mark.slow


def answer(prompt: str) -> str:
    """A call where tools are declared and none has answered yet, else words."""
    thought = "Let me see.</think>" if prompt.endswith("<think>") else ""
    if "## Tools" in prompt and "<tool_result>" not in prompt:
        return thought + CALL
    return thought + ("It is sunny." if "<tool_result>" in prompt else "Hello, Paris.")


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[Server, ScriptedModel]]:
    model = ScriptedModel(small_tokenizer())
    with Server(LocalBackend(model)) as server:
        yield server, model


@pytest.fixture
def server(scripted: tuple[Server, ScriptedModel]) -> Server:
    scripted[1].script = answer
    return scripted[0]


def run(*command: str | Path, cwd: Path | None = None, **more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=280, cwd=cwd,
        env={**environment, **more}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def program(client: str, name: str = "python") -> Path:
    path = CLIENTS / client / "bin" / name
    if not (CLIENTS / client / ".installed").exists():
        pytest.skip(f"{client} is not installed: make test-clients")
    return path


@pytest.mark.parametrize("name", AGENTS)
def test_a_coding_agent_does_its_work(name: str, tmp_path: Path) -> None:
    """It writes a file, runs a command and answers; asked more, it goes on in that session."""
    agent = AGENTS[name]
    if not (CLIENTS / name / ".installed").exists():
        pytest.skip(f"{name} is not installed: make test-clients")
    folder, home = tmp_path / "project", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    folder_of_nano = Path(dsv4.__file__).parent / "models" / "v4-nano"
    model = ScriptedModel(Tokenizer.load(folder_of_nano / "tokenizer.json"))
    model.script = agent.script(str(folder))
    with Server(LocalBackend(model)) as server:
        assert DONE in agent.run(CLIENTS, server.url, folder, home)
        assert (folder / "days.txt").read_text(encoding="utf-8") == "three\n"
        assert STILL in agent.run(CLIENTS, server.url, folder, home, again=True)


def node(script: str, url: str) -> Any:
    if shutil.which("node") is None or not (CLIENTS / "node" / ".installed").exists():
        pytest.skip("the Node clients are not installed: make test-clients")
    target = CLIENTS / "node" / script  # a module finds its packages beside itself
    shutil.copy(HERE / script, target)
    return json.loads(run("node", target, url))


def test_openai_for_python(server: Server) -> None:
    code = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
hello = [{"role": "user", "content": "Hello"}]
whole = client.chat.completions.create(model="deepseek-v4-pro", messages=hello)
chunks = list(client.chat.completions.create(model="x", messages=hello, stream=True))
print(json.dumps([
    whole.choices[0].message.content, whole.choices[0].message.reasoning_content,
    "".join(c.choices[0].delta.content or "" for c in chunks),
    client.responses.create(model="x", input="Hello").output_text,
    [m.id for m in client.models.list()],
]))"""
    said = json.loads(run(program("openai"), "-c", code, server.url))
    assert said[:4] == ["Hello, Paris.", "Let me see.", "Hello, Paris.", "Hello, Paris."]
    assert said[4] == ["v4-scripted", "deepseek-v4-flash", "deepseek-v4-pro"]


def test_anthropic_for_python(server: Server) -> None:
    code = """
import json, sys, anthropic
client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none")
body = dict(model="claude-opus-5", max_tokens=500, messages=[{"role": "user", "content": "Hello"}])
with client.messages.stream(**body) as stream:
    text = "".join(stream.text_stream)
counted = client.messages.count_tokens(model="x", messages=body["messages"]).input_tokens
print(json.dumps([client.messages.create(**body).content[-1].text, text, counted > 0]))"""
    said = json.loads(run(program("anthropic"), "-c", code, server.url))
    assert said == ["Hello, Paris.", "Hello, Paris.", True]


def test_openai_for_node(server: Server) -> None:
    assert node("openai.mjs", server.url) == {
        "whole": "Hello, Paris.",
        "streamed": "Hello, Paris.",
        "afterTools": "It is sunny.",
        "response": "Hello, Paris.",
        "refused": "BadRequestError",
    }


def test_anthropic_for_node(server: Server) -> None:
    assert node("anthropic.mjs", server.url) == {
        "whole": "Hello, Paris.",
        "streamed": "Hello, Paris.",
        "input": {"city": "Paris", "days": 3},
        "afterTools": "It is sunny.",
        "counted": True,
        "refused": "BadRequestError",
    }


def test_llm(server: Server, tmp_path: Path) -> None:
    llm = program("llm", "llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: dsv4\n  model_name: deepseek-v4-flash\n  api_base: {server.url}/v1\n"
        "  supports_tools: true\n  supports_schema: true\n",
        encoding="utf-8",
    )
    base = (llm, "-m", "dsv4", "--key", "none", "Hello")
    home = {"LLM_USER_PATH": str(tmp_path), "HOME": str(tmp_path)}
    assert run(*base, **home).strip() == "Hello, Paris."
    assert run(*base, "--no-stream", **home).strip() == "Hello, Paris."
    tool = "def get_weather(city: str, days: int) -> str:\n    return f'{city} {days}: sunny'"
    assert "It is sunny." in run(*base, "--functions", tool, **home)


def test_aider(scripted: tuple[Server, ScriptedModel], tmp_path: Path) -> None:
    aider = program("aider-chat", "aider")
    server, model = scripted
    file = tmp_path / "days.txt"
    file.write_text("two\n", encoding="utf-8")
    model.script = lambda prompt: (
        ("Let me see.</think>" if prompt.endswith("<think>") else "")
        + "days.txt\n```\nthree days in Paris\n```\n"
    )
    base = ("--openai-api-base", f"{server.url}/v1", "--openai-api-key", "none")
    quiet = (
        "--no-git", "--yes-always", "--no-show-model-warnings", "--no-check-update",
        "--analytics-disable", "--no-pretty", "--no-gitignore", "--no-show-release-notes",
        "--no-detect-urls",
    )  # fmt: skip
    run(
        aider, "--model", "openai/deepseek-v4-flash", *base, *quiet, "--edit-format", "whole",
        "--map-tokens", "0", "--message", "Make it three", "days.txt",
        cwd=tmp_path, HOME=str(tmp_path), LITELLM_LOCAL_MODEL_COST_MAP="True",
    )  # fmt: skip
    assert file.read_text(encoding="utf-8").strip() == "three days in Paris"
