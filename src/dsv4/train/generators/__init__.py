"""The documents v4-nano learns from, made by chance and rule: one function for each task.

``TASKS`` names them all. The vocabulary is small and every answer has one fixed form, because the
model is small too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from .code import code_output
from .dictionary import dictionary
from .document import Document, Split
from .everyday import everyday
from .knowledge import knowledge
from .needles import key_value, multi_needle, recall
from .problems import dates, units, word_problem
from .structured import json_convert, json_extract, json_nested
from .sums import addition, arithmetic, number_facts, subtraction, times_table
from .talk import dialogue
from .tools import tool_call
from .words import letters, sorting

TASKS: Mapping[str, Callable[[Random, Split], Document]] = {
    "arithmetic": arithmetic,
    "number_facts": number_facts,
    "times_table": times_table,
    "addition": addition,
    "subtraction": subtraction,
    "word_problem": word_problem,
    "units": units,
    "dates": dates,
    "sorting": sorting,
    "letters": letters,
    "recall": recall,
    "multi_needle": multi_needle,
    "key_value": key_value,
    "json_extract": json_extract,
    "json_nested": json_nested,
    "json_convert": json_convert,
    "tool_call": tool_call,
    "code_output": code_output,
    "dictionary": dictionary,
    "knowledge": knowledge,
    "dialogue": dialogue,
    "everyday": everyday,
}
