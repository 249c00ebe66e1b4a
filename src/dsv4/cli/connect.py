"""The command that says how other programs are connected to a server."""

from __future__ import annotations

import json
import shlex
from typing import Annotated, Literal

import typer

from .app import app

CONTEXT = 1048576


@app.command()
def connect(
    program: Annotated[
        Literal["claude", "codex", "opencode", "aider"], typer.Argument(help="Which program.")
    ],
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str, typer.Option(envvar="DSV4_API_KEY", help="A key of the server, if it wants one.")
    ] = "none",
    model: Annotated[str, typer.Option(help="The model to use.")] = "deepseek-v4-pro",
) -> None:
    """Print the settings that connect a program to a dsv4 server.

    [bold]Examples[/bold]

    \b
      dsv4 connect claude
      dsv4 connect codex --url http://gpu-box:8000 --key dsv4-...
    """
    print(SETTINGS[program](url.rstrip("/"), key, model), end="")


def _claude(url: str, key: str, model: str) -> str:
    settings = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": key,
        "ANTHROPIC_MODEL": f"{model}[1m]",
        "ANTHROPIC_DEFAULT_OPUS_MODEL": f"{model}[1m]",
        "ANTHROPIC_DEFAULT_SONNET_MODEL": f"{model}[1m]",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "deepseek-v4-flash",
        "CLAUDE_CODE_SUBAGENT_MODEL": "deepseek-v4-flash",
        "CLAUDE_CODE_EFFORT_LEVEL": "max",
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": "786432",
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    return "# Claude Code: in your shell, then run: claude\n" + "\n".join(lines) + "\n"


def _codex(url: str, key: str, model: str) -> str:
    return f"""# Codex: in ~/.codex/config.toml. Keep the provider's name: "OpenAI" would change
# how conversations are compacted.
model = {json.dumps(model)}
model_provider = "dsv4"
model_context_window = {CONTEXT}
model_reasoning_effort = "high"

[model_providers.dsv4]
name = "dsv4"
base_url = {json.dumps(url + "/v1")}
wire_api = "responses"
env_key = "DSV4_API_KEY"

# and in your shell:
#   export DSV4_API_KEY={shlex.quote(key)}
"""


def _opencode(url: str, key: str, model: str) -> str:
    limit = {"context": CONTEXT, "output": 393216}
    models = {
        name: {
            "name": name,
            "reasoning": True,
            "tool_call": True,
            "interleaved": {"field": "reasoning_content"},
            "limit": limit,
        }
        for name in dict.fromkeys([model, "deepseek-v4-flash"])
    }
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "dsv4",
        "options": {"baseURL": f"{url}/v1", "apiKey": key},
        "models": models,
    }
    config = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {"dsv4": provider},
        "model": f"dsv4/{model}",
    }
    return "// OpenCode: in opencode.json\n" + json.dumps(config, indent=2) + "\n"


def _aider(url: str, key: str, model: str) -> str:
    return f"""# Aider: in your shell
export OPENAI_API_BASE={shlex.quote(url + "/v1")}
export OPENAI_API_KEY={shlex.quote(key)}
aider --model {shlex.quote("openai/" + model)}
"""


SETTINGS = {"claude": _claude, "codex": _codex, "opencode": _opencode, "aider": _aider}
