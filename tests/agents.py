"""The coding agents that tests run for real, or replay: what they are asked, told and answered.

Each works in a folder of its own with a home of its own, reaches no host but the server, and is
set up by what ``dsv4 connect`` prints.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from dsv4.cli import app
from dsv4.encoding import DSML

TASK, QUESTION = "Write three into days.txt", "And what is in it?"
THOUGHT, DONE, STILL = "I think about it.", "It is written: three.", "There is three in it."
TITLE = "Three days"
# documented switches: no telemetry, no looking for updates; and no way out for what is left
ALONE = {
    "DISABLE_TELEMETRY": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_AUTOUPDATER": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
}


@dataclass(frozen=True)
class Agent:
    """``name`` is that of ``dsv4 connect``; ``steps`` are the calls it is made to do, in order,
    in a folder: text before the call, tool, arguments."""

    name: str
    package: str
    program: str
    title: str
    steps: Callable[[str], list[tuple[str, str, dict[str, str]]]]

    def script(self, folder: str) -> Callable[[str], str]:
        """What a scripted model says to this agent's prompts."""

        def answer(prompt: str) -> str:
            thought = f"{THOUGHT}</think>" if prompt.endswith("<think>") else ""
            done, steps = prompt.count("<tool_result>"), self.steps(folder)
            if "## Tools" not in prompt:
                return thought + self.title
            if QUESTION in prompt:
                return thought + STILL
            if done < len(steps):
                text, tool, arguments = steps[done]
                return thought + text + call(tool, arguments)
            return thought + DONE

        return answer

    def answers(self, folder: str) -> list[Any]:
        """What a session must get, in order: a title, calls as (tool, arguments), texts."""
        calls = [(tool, arguments) for _, tool, arguments in self.steps(folder)]
        return [*calls, DONE, STILL]

    def run(self, clients: Path, url: str, folder: Path, home: Path, *, again: bool = False) -> str:
        """Do the task, or ``again``: ask the question in the same session. What it printed."""
        settings = connect(self.name, url)
        environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "TERM")}
        environment |= {"HOME": str(home), "DSV4_API_KEY": "none", **ALONE}
        start = [str(clients / self.name / "node_modules" / ".bin" / self.program)]
        if self.name == "claude":
            lines = [x for x in settings.splitlines() if x.startswith("export ")]
            start = ["sh", "-c", "\n".join(lines) + '\nexec "$0" "$@"', *start]
            more = ["--output-format", "json", "--allowedTools", "Write,Bash"]
            order = [*(["-c"] if again else []), "-p", QUESTION if again else TASK, *more]
        elif self.name == "codex":
            (home / ".codex").mkdir(exist_ok=True)
            (home / ".codex" / "config.toml").write_text(settings, encoding="utf-8")
            catalog = connect(self.name, url, "--catalog")
            (home / ".codex" / "dsv4.json").write_text(catalog, encoding="utf-8")
            quiet = ["-c", "analytics.enabled=false", "-c", "check_for_update_on_startup=false"]
            free = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
            order = ["exec", *(["resume", "--last"] if again else []), *quiet, *free]
            order.append(QUESTION if again else TASK)
        else:
            (folder / "opencode.json").write_text(settings, encoding="utf-8")
            order = ["run", *(["-c"] if again else []), QUESTION if again else TASK]
        done = subprocess.run(
            [*start, *order], capture_output=True, text=True, timeout=280, cwd=folder,
            env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


def connect(program: str, url: str, *more: str) -> str:
    """What ``dsv4 connect`` prints."""
    command = ["connect", program, "--url", url, *more]
    done = CliRunner().invoke(app, command, env={"DSV4_API_KEY": None})
    assert done.exit_code == 0, done.output
    return done.output


def call(tool: str, arguments: dict[str, str]) -> str:
    parameters = "".join(
        f'<{DSML}parameter name="{name}" string="true">{value}</{DSML}parameter>\n'
        for name, value in arguments.items()
    )
    return (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="{tool}">\n{parameters}</{DSML}invoke>\n'
        f"</{DSML}tool_calls>"
    )


PATCH = "*** Begin Patch\n*** Add File: days.txt\n+three\n*** End Patch\n"
SHOW = {"command": "cat days.txt", "description": "Show the file"}
SAID = "I write the file."
AGENTS = {
    agent.name: agent
    for agent in (
        Agent(
            "claude", "@anthropic-ai/claude-code", "claude", json.dumps({"title": TITLE}),
            lambda folder: [
                (SAID, "Write", {"file_path": f"{folder}/days.txt", "content": "three\n"}),
                ("", "Bash", SHOW),
            ],
        ),
        Agent(
            "codex", "@openai/codex", "codex", TITLE,
            lambda folder: [
                (SAID, "apply_patch", {"input": PATCH}),
                ("", "exec_command", {"cmd": "cat days.txt"}),
            ],
        ),
        Agent(
            "opencode", "opencode-ai", "opencode", TITLE,
            lambda folder: [
                (SAID, "write", {"filePath": f"{folder}/days.txt", "content": "three\n"}),
                ("", "bash", SHOW),
            ],
        ),
    )
}  # fmt: skip
