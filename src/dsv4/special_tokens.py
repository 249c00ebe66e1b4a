"""The special tokens of V4's chat template: every spelling that has a meaning to it.

Only text the template itself writes may become these tokens; the same spelling in a message or a
tool result stays plain text (``encoding.encode_segments``). Source: encoding_dsv4.py and
tokenizer.json of the official checkpoints.
"""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
EXTRACTED_URL = "<｜extracted_url｜>"
TASKS = {
    name: f"<｜{name}｜>"
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"

SPECIAL_TOKENS: tuple[str, ...] = (
    BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, DSML, LATEST_REMINDER,
    *TASKS.values(), EXTRACTED_URL, FIM_HOLE, FIM_BEGIN, FIM_END,
)  # fmt: skip
"""Every token with a meaning to the template, in the order a new tokenizer numbers them."""
