"""What was used, for people (/usage) and for programs (/usage.json, /user/balance)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import html
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from .accounts import AccountError, Caller
from .database import LOCAL, Database
from .ledger import GROUPINGS, Ledger, UsageRow, usage
from .prices import dollars
from .surface import BASES

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
div{overflow-x:auto}
table{border-collapse:collapse;width:100%}
caption{text-align:left;padding:.5rem 0}
th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid #8886;white-space:nowrap}
th[scope=row],.text{text-align:left;font-weight:400}
tfoot th,tfoot td{font-weight:600}
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"""default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; \
form-action 'none'; frame-ancestors 'none'"""


def read(database: Database, caller: Caller) -> tuple[list[UsageRow], list[UsageRow]]:
    """Rows and their total (none or one): the caller's own, or everybody's for LOCAL."""
    owner = None if caller.id == LOCAL else caller.id
    return usage(database, GROUPINGS, owner=owner), usage(database, (), owner=owner)


def as_json(rows: Sequence[UsageRow], totals: Sequence[UsageRow]) -> dict[str, Any]:
    return {
        "usage": [row.as_json() for row in rows],
        "total": totals[0].as_json() if totals else None,
    }


def balance_routes(ledger: Ledger) -> APIRouter:
    """GET /user/balance, as the hosted API answers it; amounts are exact.

    A key without a spend limit has no balance: it is available, and the amounts are 0.
    """
    routes = APIRouter()

    def balance(request: Request) -> dict[str, Any]:
        left = ledger.balance(request.state.caller)
        amount = dollars(max(0, left or 0))
        info = {
            "currency": "USD",
            "total_balance": amount,
            "granted_balance": "0.00",
            "topped_up_balance": amount,
        }
        return {"is_available": left is None or left > 0, "balance_infos": [info]}

    for base in BASES:
        routes.get(f"{base}/user/balance")(balance)
    return routes


def page(caller: Caller, rows: Sequence[UsageRow], totals: Sequence[UsageRow]) -> Response:
    """The table as a page that needs no script and may load nothing."""
    whose = "All callers" if caller.id == LOCAL else f"Key {caller.name}"
    head = "".join(
        f'<th scope="col"{" class=text" if name in ("Day", "Caller", "Model") else ""}>{name}</th>'
        for name in ("Day", "Caller", "Model", "Requests", "Cache hits", "Misses", "Output", "USD")
    )
    body = "".join(
        f'<tr><th scope="row">{row.day}</th><td class="text">{html.escape(row.caller)}</td>'
        f'<td class="text">{html.escape(row.model)}</td>{_numbers(row)}</tr>'
        for row in rows
    )
    foot = "".join(f'<tr><th scope="row" colspan="3">Total</th>{_numbers(t)}</tr>' for t in totals)
    saved = "".join(_saved(t) for t in totals)
    table = f"""<div><table><caption>{html.escape(whose)}, by day (UTC). Tokens, and their exact
cost at the price list of that day.</caption>
<thead><tr>{head}</tr></thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table></div>{saved}"""
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Usage</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>
<body><main><h1>Usage</h1>{table if rows else "<p>Nothing was asked yet.</p>"}</main></body></html>
"""
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(text, headers=headers)


def credentials(request: Request) -> dict[str, str]:
    """The headers that hold a key; a browser sends it as the password of Basic authentication."""
    headers = dict(request.headers)
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            _, _, key = base64.b64decode(given, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            key = ""
        headers["authorization"] = f"Bearer {key}"
    return headers


def login(error: AccountError) -> Response:
    """Asks the browser for a key."""
    headers = {"WWW-Authenticate": 'Basic realm="any user name; the password is an api key"'}
    return HTMLResponse(f"<p>{html.escape(str(error))}</p>", error.status, headers)


def _numbers(row: UsageRow) -> str:
    counts = (row.requests, row.hit_tokens, row.miss_tokens, row.output_tokens)
    cells = "".join(f"<td>{n:,}</td>" for n in counts)
    return f"{cells}<td>{dollars(row.cost)}</td>"


def _saved(total: UsageRow) -> str:
    prompt = total.hit_tokens + total.miss_tokens
    if not prompt:
        return ""
    share = 100 * total.hit_tokens / prompt
    return f"<p>{share:.1f}% of all prompt tokens came from the cache.</p>"
