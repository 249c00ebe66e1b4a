"""What the model wrote, kept so that a conversation goes on from its own bytes.

Clients send an answer back re-written: arguments dumped anew, white space trimmed, the reasoning
gone. A prompt rendered from that differs from what the model wrote, so the cache is lost, and the
model reads a history that is not its own. ``Replay`` puts the very tokens back wherever the
message still means the same, and the reasoning wherever it is missing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..encoding import Message, Written
from ..tokenizer import Tokenizer

CAPACITY = 4_000_000  # tokens; four bytes each


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer: tokens of its reasoning and of the rest, and what the client saw of it.

    ``whole``: nothing the model wrote was left out of ``content`` and ``calls``.
    """

    reasoning: array[int]
    answer: array[int]
    content: str
    thought: str
    calls: tuple[tuple[str, Any], ...]
    whole: bool

    @property
    def size(self) -> int:
        return len(self.reasoning) + len(self.answer) + 64

    def means(self, message: Message) -> bool:
        """Whether ``message`` is this answer, up to the white space around its text."""
        same_text = message["content"].strip() == self.content.strip()
        return same_text and tuple(_calls(message)) == self.calls


class Replay:
    """Turns by call id and by the conversation that led to them; the oldest go first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()
        self._size = 0

    def keep(self, namespace: str, history: bytes, call_ids: Iterable[str], turn: Turn) -> None:
        """``history`` is ``digest`` of the messages before the turn."""
        message = {"role": "assistant", "content": turn.content.strip()}
        keys = [_by_id(namespace, call_id) for call_id in call_ids]
        with self._lock:
            for key in keys or [_by_text(namespace, history, message)]:
                if key in self._turns:
                    self._size -= self._turns.pop(key).size
                self._turns[key] = turn
                self._size += turn.size
            while self._size > self._capacity:
                self._size -= self._turns.popitem(last=False)[1].size

    def restore(self, namespace: str, messages: Sequence[Message], tokenizer: Tokenizer) -> None:
        """Put back what is known, into ``messages`` as ``normalize_messages`` gives them."""
        ids = Counter(c["id"] for m in messages for c in m.get("tool_calls", ()))
        history = digest(())
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and not message.get("wo_eos"):
                calls = message.get("tool_calls", ())
                keys = [_by_id(namespace, c["id"]) for c in calls if ids[c["id"]] == 1]
                if not calls:
                    keys = [_by_text(namespace, history, message)]
                turn = self._find(keys)
                if turn is not None:
                    _put_back(turn, message, tokenizer)
            history = digest(messages[i : i + 1], history)

    def _find(self, keys: Iterable[bytes]) -> Turn | None:
        with self._lock:
            for key in keys:
                if key in self._turns:
                    self._turns.move_to_end(key)
                    return self._turns[key]
        return None


def digest(messages: Iterable[Message], start: bytes = b"") -> bytes:
    """Names a conversation by what both sides see of it: no reasoning, no ids."""
    for message in messages:
        seen = [message["role"], message["content"].strip(), list(_calls(message))]
        text = json.dumps(seen, sort_keys=True, default=str)
        start = hashlib.sha256(start + text.encode()).digest()
    return start


def _put_back(turn: Turn, message: Message, tokenizer: Tokenizer) -> None:
    thought = str(message.get("reasoning_content") or "")
    if thought.strip() in ("", turn.thought.strip()):
        message["reasoning_content"] = Written(tokenizer.decode(turn.reasoning), turn.reasoning)
    if turn.whole and turn.means(message):
        message["written"] = Written(tokenizer.decode(turn.answer), turn.answer)


def _calls(message: Message) -> Iterable[tuple[str, Any]]:
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"], read_arguments(call["function"]["arguments"])


def read_arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _by_id(namespace: str, call_id: str) -> bytes:
    return hashlib.sha256(json.dumps([namespace, call_id]).encode()).digest()


def _by_text(namespace: str, history: bytes, message: Message) -> bytes:
    return hashlib.sha256(namespace.encode() + b"\0" + digest((message,), history)).digest()
