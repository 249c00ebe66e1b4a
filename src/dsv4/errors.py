"""Every error that dsv4 raises on purpose.

    DSV4Error
    ├── ConfigError        a configuration that no V4 model has, or that contradicts itself
    ├── CheckpointError    a file that is not the checkpoint it claims to be
    ├── EncodingError      messages that have no prompt text, or text that no model wrote
    ├── RequestError       a request the engine or server cannot honour (becomes HTTP 400)
    │   └── ContextLengthError   more tokens than the model's context holds
    └── TrainingError      a run that cannot start or go on

Every message says three things: what was expected, what came, and what to try.
"""

from __future__ import annotations


class DSV4Error(Exception):
    """Base of the tree; catch it to catch everything dsv4 refuses.

    ``expected``, ``got`` and ``hint`` are folded into the message in that order.
    """

    def __init__(
        self,
        message: str,
        *,
        expected: object | None = None,
        got: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.expected, self.got, self.hint = expected, got, hint
        parts = [message]
        if expected is not None:
            parts.append(f"expected: {expected}")
        if got is not None:
            parts.append(f"got: {got}")
        if hint is not None:
            parts.append(f"try: {hint}")
        super().__init__("\n  ".join(parts))


class ConfigError(DSV4Error):
    """A configuration that no V4 model has, or that contradicts itself."""


class CheckpointError(DSV4Error):
    """A file that is not the checkpoint it claims to be."""


class EncodingError(DSV4Error):
    """Messages that have no prompt text, or text that no model wrote."""


class RequestError(DSV4Error):
    """A request the engine or server cannot honour (becomes HTTP 400)."""


class ContextLengthError(RequestError):
    """More tokens than the model's context holds."""


class TrainingError(DSV4Error):
    """A run that cannot start or go on."""
