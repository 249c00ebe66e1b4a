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
    catalog: Annotated[
        bool, typer.Option("--catalog", help="Codex: print the file that describes the models.")
    ] = False,
) -> None:
    """Print the settings that connect a program to a dsv4 server.

    [bold]Examples[/bold]

    \b
      dsv4 connect claude
      dsv4 connect codex --url http://gpu-box:8000 --key dsv4-...
      dsv4 connect codex --catalog > ~/.codex/dsv4.json
    """
    if catalog:
        if program != "codex":
            raise typer.BadParameter(f"only codex reads a catalog of models, not {program}")
        print(json.dumps(_codex_catalog(model), indent=2))
        return
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
model_catalog_json = "dsv4.json"
model_reasoning_effort = "high"
web_search = "disabled"

[model_providers.dsv4]
name = "dsv4"
base_url = {json.dumps(url + "/v1")}
wire_api = "responses"
env_key = "DSV4_API_KEY"

# and in your shell, which also writes the file that describes the models to Codex:
#   export DSV4_API_KEY={shlex.quote(key)}
#   dsv4 connect codex --model {shlex.quote(model)} --catalog > ~/.codex/dsv4.json
"""


# What Codex tells a model that it does not know by itself; the tools describe themselves.
_AGENT = """You are a coding agent in a terminal, working in the user's folder with the tools given.

- Read before you write: look at the files that matter, and follow how they are written.
- Do what was asked, completely, and nothing beside it. Fix causes rather than symptoms.
- Change files with apply_patch; search, build and test with commands.
- Check your work by running it when that is possible, and say what you saw. If something failed
  or was not checked, say that.
- Never undo changes that you did not make, and do not commit unless you are asked to.
- Work until the task is done; ask only when you cannot decide alone.
- End with a short answer: what changed and where, in plain words, paths in backticks.
"""


def _codex_catalog(model: str) -> dict[str, object]:
    """The models as Codex's ``model_catalog_json`` describes them; without it Codex has neither
    the patch tool nor the right context for them."""
    efforts = {"low": "Short thoughts", "high": "The usual depth", "max": "As deep as it goes"}
    levels = [{"effort": name, "description": about} for name, about in efforts.items()]
    models = [
        {
            "slug": name,
            "display_name": name,
            "description": "Served by dsv4",
            "base_instructions": _AGENT,
            "context_window": CONTEXT,
            "effective_context_window_percent": 95,
            "default_reasoning_level": "high",
            "supported_reasoning_levels": levels,
            "apply_patch_tool_type": "freeform",
            "shell_type": "shell_command",
            "supports_parallel_tool_calls": True,
            "supports_reasoning_summaries": False,
            "support_verbosity": False,
            "truncation_policy": {"mode": "tokens", "limit": 10000},
            "input_modalities": ["text"],
            "experimental_supported_tools": [],
            "visibility": "list",
            "supported_in_api": True,
            "priority": place,
        }
        for place, name in enumerate(dict.fromkeys([model, "deepseek-v4-flash"]))
    ]
    return {"models": models}


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
        "small_model": "dsv4/deepseek-v4-flash",
    }
    return "// OpenCode: in opencode.json\n" + json.dumps(config, indent=2) + "\n"


def _aider(url: str, key: str, model: str) -> str:
    return f"""# Aider: in your shell
export OPENAI_API_BASE={shlex.quote(url + "/v1")}
export OPENAI_API_KEY={shlex.quote(key)}
aider --model {shlex.quote("openai/" + model)}
"""


SETTINGS = {"claude": _claude, "codex": _codex, "opencode": _opencode, "aider": _aider}
