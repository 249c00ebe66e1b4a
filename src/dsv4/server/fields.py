"""What every field of a request does here: for the documentation, and for the OpenAPI document.

``python -m dsv4.server.fields docs/api.md`` writes the tables into the documentation; a test keeps
them current, and the names in step with what the surfaces read.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from . import anthropic, openai, responses

BEGIN, END = "<!-- fields: written by dsv4.server.fields -->", "<!-- end of fields -->"


@dataclass(frozen=True)
class Surface:
    """One request body: what is honoured, what changes nothing, and which values are refused."""

    title: str
    body: type[BaseModel]
    honoured: Mapping[str, str]
    ignored: tuple[str, ...]
    refused: tuple[str, ...]


_MODEL = "any name; see [Model names](#model-names)"
_SAMPLING = "default 1; counts while thinking, too, but with `--official-sampling`"
_BUDGET = "longest thought in tokens; then it is closed and the answer begins"
_CHAT = Surface(
    "POST /v1/chat/completions",
    openai.ChatCompletionRequest,
    {
        "model": _MODEL,
        "messages": "one or more, in any order; see [Messages](#messages)",
        "thinking": "its `type`: `enabled` (the default), `adaptive` (the same) or `disabled`",
        "reasoning_effort": "`none` `minimal` `low` `medium` `high` `xhigh` `max` `ultra`",
        "max_thinking_tokens": _BUDGET,
        "chat_template_kwargs": "`thinking`, `enable_thinking`, `reasoning_effort`: the spelling "
        "of vLLM and SGLang",
        "max_tokens": "1 to 393216, reasoning and answer together; cut to what the context leaves",
        "max_completion_tokens": "the same; `max_tokens` wins",
        "temperature": f"0 to 2, {_SAMPLING}",
        "top_p": f"above 0, to 1; {_SAMPLING}",
        "seed": "an integer; fixes the answer, whatever runs beside it",
        "stop": "a string, or up to 16; reasoning is not searched",
        "stream": "server-sent events",
        "stream_options": "`include_usage`: all chunks but the last say `usage: null`",
        "response_format": "`text`, `json_object`, `json_schema`: enforced by a grammar, after "
        "the thought",
        "tools": "up to 128; type `function`, with `strict` held to the schema; other types are "
        "left out",
        "tool_choice": "`none`, `auto`, `required`, or a named function; also while thinking",
        "parallel_tool_calls": "false: the answer ends with its first call",
        "logprobs": "of content and reasoning, before temperature and top_p",
        "top_logprobs": "0 to 20, with `logprobs`",
        "n": "1 to 32 answers; with a seed each has the next one",
        "user_id": "any string; replayed history is kept apart by it",
        "user": "the same; `user_id` wins",
    },
    (
        "frequency_penalty", "presence_penalty", "logit_bias", "service_tier", "store",
        "metadata", "prediction", "modalities", "prompt_cache_key", "safety_identifier",
        "verbosity", "web_search_options",
    ),
    (
        "an unknown role, effort, thinking type, `tool_choice` or format",
        "no messages; a value out of its range; `top_logprobs` without `logprobs`",
        "a schema that cannot be enforced, in `response_format` or a `strict` tool",
        "a prompt that leaves no room in the context",
    ),
)  # fmt: skip
_FILL = Surface(
    "POST /v1/completions",
    openai.CompletionRequest,
    {
        "model": _MODEL,
        "prompt": "a string; or a list of one",
        "suffix": "what comes after the gap; without it the prompt is continued",
        "max_tokens": "1 to 393216",
        "temperature": "0 to 2, default 1",
        "top_p": "above 0, to 1; default 1",
        "seed": "an integer",
        "stop": "a string, or up to 16",
        "stream": "server-sent events",
        "stream_options": "`include_usage`",
        "echo": "the prompt comes before the answer",
        "logprobs": "0 to 20 alternatives",
        "n": "1 to 32",
    },
    ("best_of", "frequency_penalty", "presence_penalty", "logit_bias", "user"),
    ("several prompts; a value out of its range",),
)
_MESSAGES = Surface(
    "POST /v1/messages",
    anthropic.MessagesRequest,
    {
        "model": _MODEL,
        "messages": "roles `user`, `assistant`, `system` anywhere; blocks `text`, `thinking`, "
        "`tool_use`, `tool_result`; any other kind leaves a mark such as `[Unsupported Image]`",
        "system": "a string or text blocks; a line `x-anthropic-billing-header:` is left out",
        "tools": "those with an `input_schema`; `strict` holds arguments to it; others are left "
        "out",
        "tool_choice": "`none`, `auto`, `any`, `tool`; `disable_parallel_tool_use`; of a tool that "
        "is left out: `auto`",
        "thinking": "`enabled`, `adaptive`, `disabled`; default enabled; budget ignored",
        "output_config": "`effort` as `reasoning_effort` above; `format` of type `json_schema`",
        "max_tokens": "1 to 393216; required",
        "max_thinking_tokens": _BUDGET,
        "stop_sequences": "up to 16",
        "stream": "server-sent events",
        "temperature": f"0 to 2, {_SAMPLING}",
        "top_p": f"above 0, to 1; {_SAMPLING}",
        "metadata": "`user_id`: any value; replayed history is kept apart by it",
    },
    (
        "container", "context_management", "mcp_servers", "service_tier", "top_k",
    ),
    (
        "an unknown role, effort, thinking or `tool_choice` type",
        "no messages; no `max_tokens`; a value out of its range",
    ),
)  # fmt: skip
_RESPONSES = Surface(
    "POST /v1/responses",
    responses.ResponsesRequest,
    {
        "model": _MODEL,
        "input": "a string, or items `message`, `reasoning`, `function_call`, "
        "`function_call_output`, `custom_tool_call`, `custom_tool_call_output`, "
        "`additional_tools`, `compaction`, `compaction_trigger`; others are left out",
        "instructions": "the first system message",
        "stream": "server-sent events, without `[DONE]`",
        "temperature": f"0 to 2, {_SAMPLING}",
        "top_p": f"above 0, to 1; {_SAMPLING}",
        "top_logprobs": "0 to 20: logprobs of the answer, and so many alternatives",
        "include": "`message.output_text.logprobs`; the rest is ignored",
        "max_output_tokens": "1 to 393216",
        "max_thinking_tokens": _BUDGET,
        "tools": "`function`, `namespace` groups of functions, `custom` named `apply_patch`; "
        "others are left out",
        "tool_choice": "`none`, `auto`, `required`, or a named function",
        "parallel_tool_calls": "false: the answer ends with its first call",
        "reasoning": "`effort`; `none` is off, absent is on",
        "text": "`format`: `text`, `json_object`, `json_schema`",
        "user": "any string; replayed history is kept apart by it",
    },
    (
        "background", "context_management", "conversation", "max_tool_calls",
        "metadata", "previous_response_id", "prompt", "prompt_cache_key",
        "prompt_cache_retention", "safety_identifier", "service_tier", "store", "stream_options",
        "truncation",
    ),
    ("neither `input` nor `instructions`; an unknown effort; a value out of its range",),
)  # fmt: skip
SURFACES = (_CHAT, _FILL, _MESSAGES, _RESPONSES)


def markdown() -> str:
    """The tables, as docs/api.md has them."""
    parts = []
    for surface in SURFACES:
        rows = [f"| `{name}` | {what} |" for name, what in surface.honoured.items()]
        rows += [f"| {', '.join(f'`{n}`' for n in surface.ignored)} | ignored |"]
        rows += [f"| {what} | refused with 400 |" for what in surface.refused]
        parts.append(
            "\n".join([f"### {surface.title}", "", "| field | here |", "|---|---|", *rows])
        )
    parts.append("Fields that no table names are ignored on every surface.")
    return "\n\n".join(parts) + "\n"


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of ``app``, with the bodies that the surfaces read themselves."""
    spec = get_openapi(title=app.title, version="1", routes=app.routes)
    schemas = spec.setdefault("components", {}).setdefault("schemas", {})
    for methods in spec["paths"].values():
        operation = methods.get("post", {})
        body = _BODIES.get(operation.get("summary", ""))
        if body is None:
            continue
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[body.__name__] = schema
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        content = {"application/json": {"schema": reference}}
        operation["requestBody"] = {"required": True, "content": content}
        refused = {"description": "Refused; the body has the surface's own error shape"}
        operation["responses"]["4XX"] = refused
    for surface in SURFACES:
        for name, what in surface.honoured.items():
            properties = schemas.get(surface.body.__name__, {}).get("properties", {})
            if name in properties:
                properties[name]["description"] = what
    return spec


# by the summary that FastAPI makes of the name of an endpoint's function
_BODIES: Mapping[str, type[BaseModel]] = {
    "Chat Completions": openai.ChatCompletionRequest,
    "Completions": openai.CompletionRequest,
    "Messages": anthropic.MessagesRequest,
    "Count Tokens": anthropic.CountRequest,
    "Responses": responses.ResponsesRequest,
}


def write(path: Path) -> None:
    """Put the tables into a document, between its marks."""
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n\n{markdown()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
