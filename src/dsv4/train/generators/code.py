"""Short Python programs and what they print, found out by running them."""

from __future__ import annotations

import ast
import contextlib
import io
from random import Random
from typing import Any

from .document import Item, generator
from .phrases import ANIMALS, COLORS, FOODS, NAMES, OBJECTS

# ------------------------------------------------------------------ running

_BUILTINS: dict[str, Any] = {
    f.__name__: f for f in (abs, len, list, max, min, print, range, reversed, sorted, str, sum)
}


class _Watched(ast.NodeTransformer):
    """Reports every value that a plain name gets, right after it got it."""

    def _report(self, target: ast.expr) -> list[ast.stmt]:
        if not isinstance(target, ast.Name):
            return []
        return ast.parse(f"_saw({target.id!r}, {target.id})").body

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        return [node, *self._report(node.targets[0])]

    def visit_AugAssign(self, node: ast.AugAssign) -> list[ast.stmt]:
        return [node, *self._report(node.target)]

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        node.body = [*self._report(node.target), *node.body]
        return node


def run(program: str) -> tuple[str, list[str]]:
    """What a generated program prints, and the values its names got, as ``"x = 3"``.

    For programs made here: they see a few builtins and end, but nothing guards against others.
    """
    seen: list[str] = []

    def saw(name: str, value: object) -> None:
        seen.append(f"{name} = {value!r}")

    tree = ast.fix_missing_locations(_Watched().visit(ast.parse(program)))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, "program", "exec"), {"__builtins__": _BUILTINS, "_saw": saw})
    return out.getvalue().strip("\n"), seen


# ------------------------------------------------------------------ writing


def _assigned(rng: Random) -> str:
    x, y, n = *rng.sample("abcdxyz", 2), rng.randint
    op, last = rng.choice("+-*"), rng.choice("+-")
    top = 9 if op == "*" else 30
    return f"{x} = {n(1, top)}\n{y} = {n(1, top)}\nprint({x} {op} {y} {last} {n(1, 9)})"


def _updated(rng: Random) -> str:
    x, n = rng.choice("abcdxyz"), rng.randint
    lines = [f"{x} = {n(1, 20)}"]
    lines += [f"{x} {rng.choice(('+=', '-=', '+='))} {n(1, 9)}" for _ in range(n(1, 3))]
    return "\n".join([*lines, f"print({x})"])


def _loop(rng: Random) -> str:
    total, n = rng.choice(("total", "s", "count")), rng.randint
    change = rng.choice(("i", "i", "1", "2", "i + 1"))
    loop = f"for i in range({n(2, 6)}):\n    {total} += {change}"
    return f"{total} = {n(0, 5)}\n{loop}\nprint({total})"


def _countdown(rng: Random) -> str:
    x, step = rng.randint(3, 12), rng.randint(1, 3)
    return f"x = {x}\nwhile x > {rng.randint(0, 2)}:\n    x -= {step}\nprint(x)"


def _branch(rng: Random) -> str:
    a, b, (yes, no) = rng.randint(1, 20), rng.randint(1, 20), rng.sample(OBJECTS, 2)
    test = rng.choice((f"x > {b}", f"x < {b}", f"x == {rng.choice((a, b))}", "x % 2 == 0"))
    return f'x = {a}\nif {test}:\n    print("{yes}")\nelse:\n    print("{no}")'


def _numbers(rng: Random) -> str:
    values = rng.sample(range(1, 30), rng.randint(3, 5))
    first = rng.randint(0, 1)
    shown = rng.choice(
        ("max(n)", "min(n)", "sorted(n)", "len(n)", "n[0]", "n[-1]", "n[1]", f"n[{first}:2]",
         "sum(n[:2])", "n[::-1]", "sorted(n)[0]")
    )  # fmt: skip
    return f"n = {values}\nprint({shown})"


def _text(rng: Random) -> str:
    word = rng.choice(rng.choice((ANIMALS, COLORS, FOODS, OBJECTS)))
    shown = rng.choice(
        ("w.upper()", "len(w)", "w[0]", "w[-1]", "w[:2]", "w[1:3]", "w[::-1]", "w + w",
         "w.replace(w[0], 'z')", f"w.count('{rng.choice(word)}')", "w * 2")
    )  # fmt: skip
    return f'w = "{word}"\nprint({shown})'


def _words(rng: Random) -> str:
    words = rng.sample(rng.choice((ANIMALS, COLORS, FOODS)), rng.randint(2, 4))
    shown = rng.choice(('" ".join(w)', '"-".join(w)', "w[0]", "w[-1]", "len(w)", "sorted(w)[0]"))
    lines = [f"w = {words}"]
    if rng.random() < 0.4:
        lines.append(f'w.append("{rng.choice(OBJECTS)}")')
    return "\n".join([*lines, f"print({shown})"]).replace("'", '"')


def _mapping(rng: Random) -> str:
    names = rng.sample(NAMES, rng.randint(2, 3))
    ages = {name: rng.randint(1, 60) for name in names}
    shown = rng.choice((f'ages["{rng.choice(names)}"]', "len(ages)", "max(ages.values())"))
    lines = [f"ages = {ages}".replace("'", '"')]
    if rng.random() < 0.4:
        lines.append(f'ages["{rng.choice(names)}"] = {rng.randint(1, 60)}')
    return "\n".join([*lines, f"print({shown})"])


def _function(rng: Random) -> str:
    name, n = rng.choice(("f", "g", "step")), rng.randint
    body = rng.choice((f"x + {n(1, 9)}", f"x - {n(1, 9)}", f"x * {n(2, 5)}", f"{n(2, 4)} * x + 1"))
    shown = rng.choice((f"{name}({n(1, 9)})", f"{name}({name}({n(1, 5)}))"))
    return f"def {name}(x):\n    return {body}\nprint({shown})"


def _comprehension(rng: Random) -> str:
    n, kept = rng.randint, rng.choice(("", "", " if i % 2 == 0", " if i > 2"))
    made = rng.choice(("i", f"i + {n(1, 5)}", f"i * {n(2, 4)}", "i * i"))
    return f"print([{made} for i in range({n(3, 6)}){kept}])"


def _printed(rng: Random) -> str:
    shown = rng.choice(("i", "i + 1", "i * 2", f'i, "{rng.choice(ANIMALS)}"'))
    return f"for i in range({rng.randint(2, 4)}):\n    print({shown})"


_KINDS = (
    _assigned, _updated, _loop, _countdown, _branch, _numbers, _text, _words, _mapping, _function,
    _comprehension, _printed,
)  # fmt: skip
_ASK = (
    "What does this program print?",
    "What does this code print?",
    "What is the output of this program?",
    "What is printed?",
)


def _program(rng: Random) -> Item:
    program = rng.choice(_KINDS)(rng)
    printed, values = run(program)
    ask = f"{rng.choice(_ASK)}\n```python\n{program}\n```"
    why = "; ".join([*values, "it prints " + printed.replace("\n", ", ")]) + "."
    return Item(ask, why, printed, printed, ("program", program))


code_output = generator("code_output", _program, think=0.5, most=3)
"""What a program of one to five lines prints; thinking follows every value."""
