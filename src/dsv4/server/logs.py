"""Logs for machines: one JSON object per line on stderr, and never a prompt unless asked for."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

log = logging.getLogger("dsv4.server")


def event(name: str, /, level: int = logging.INFO, *, exc_info: Any = None, **fields: Any) -> None:
    """Log what happened, with its facts as fields; those that are None are left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    log.log(level, name, extra={"fields": known}, exc_info=exc_info)


class JsonLines(logging.Formatter):
    """A record as one line of JSON: ``time`` (UTC), ``level``, ``event``, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line |= fields
        else:
            line["logger"] = record.name
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(requests: bool = True) -> None:
    """Write what the server and uvicorn log to stderr; ``requests`` False only warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (
        ("dsv4.server", logging.INFO if requests else logging.WARNING),
        ("uvicorn", logging.WARNING),
        ("asyncio", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
