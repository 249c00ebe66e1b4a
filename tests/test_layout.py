"""The arrow rule and the house rules of the layout (CONTRIBUTING.md), read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dsv4

SOURCE = Path(dsv4.__file__).parent
# A module imports only from lines below its own, or from its own package.
ORDER = """
cli
chat
bench_peers bench_report
bench_cache
bench_context bench_engines bench_experts
bench_kernels bench_layers bench_soak bench_speculation bench_training
bench
peers
server router
evals
train
api
engine
convert hub synth
checkpoint
planner
tokenizer
encoding
completion
model
layers
protocols numerics rotary
kernels
packing
formats
quant
config
tool_arguments special_tokens errors
"""
RANK = {name: i for i, line in enumerate(ORDER.split("\n")) for name in line.split()}
NEVER = {
    "engine": {"encoding", "completion", "tool_arguments", "special_tokens", "tokenizer"},
    "server": {"torch", "model", "kernels", "quant", "checkpoint"},
    "kernels": {"config"},
}
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def imports(text: str, *package: str) -> set[str]:
    """Parts of dsv4, and other top-level packages, that a module of ``package`` imports.

    What is imported for type checking only does not count.
    """

    class Runtime(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST:
            for_types = "TYPE_CHECKING" in ast.unparse(node.test)
            return ast.Module(node.orelse, []) if for_types else self.generic_visit(node)

    here = ("dsv4", *package)
    names: list[str] = []
    for node in ast.walk(Runtime().visit(ast.parse(text))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else ()
            home = [*above, node.module] if node.module else above
            names += [".".join([*home, alias.name]) for alias in node.names]
    split = [name.split(".") for name in names]
    return {parts[1] if parts[0] == "dsv4" else parts[0] for parts in split}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_down(path: Path) -> None:
    *package, _ = path.relative_to(SOURCE).parts
    own = package[0] if package else path.stem
    assert own in RANK, f"give {own} a place in ORDER"
    found = imports(path.read_text(encoding="utf-8"), *package)
    wrong = {name for name in found if name != own and RANK.get(name, 99) <= RANK[own]}
    wrong |= found & NEVER.get(own, set())
    assert not wrong, f"{own} must not import {', '.join(sorted(wrong))}"


def test_surfaces_share_one_request_and_know_no_other_surface() -> None:
    surfaces = {"openai", "anthropic", "responses"}
    for name in sorted(surfaces):
        tree = ast.parse((SOURCE / "server" / f"{name}.py").read_text(encoding="utf-8"))
        found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1]
        known = {part for n in found for part in (n.module or "", *(a.name for a in n.names))}
        assert {"backend", "surface"} <= known and not surfaces & known, name


def test_every_form_of_import_is_seen() -> None:
    for text, name in {
        "from ..model import Pass": "model",
        "from .. import kernels as k": "kernels",
        "from . import wire": "server",
        "from .wire import ApiError": "server",
        "import dsv4.quant": "quant",
        "def f():\n    from dsv4 import checkpoint": "checkpoint",
        "import torch.nn as nn": "torch",
        "from torch import Tensor": "torch",
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import json": "json",
    }.items():
        assert imports(text, "server") == {name}, text


def test_files_have_one_subject_and_its_name() -> None:
    written = (".py", ".cpp", ".h", ".js", ".css", ".html")
    ours = (p for p in SOURCE.rglob("*") if p.suffix in written and p.is_file())
    files = {p.relative_to(SOURCE): p for p in ours if "vendor" not in p.parts}
    sizes = {str(name): p.stat().st_size for name, p in files.items()}
    assert {name: size for name, size in sizes.items() if size > 40_000} == {}
    nameless = {"utils", "util", "common", "core", "helpers", "misc"}
    assert {str(name) for name in files if nameless & {name.stem, *name.parts}} == set()


@pytest.mark.parametrize("name", dsv4.__all__)
def test_what_is_public_says_what_it_promises(name: str) -> None:
    doc = getattr(dsv4, name).__doc__
    made_up = f"{name}("  # what a dataclass has when nobody wrote anything
    assert doc and not doc.startswith(made_up)
