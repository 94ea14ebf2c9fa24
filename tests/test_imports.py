"""The arrows between the packages: who may import whom. Reads the sources, so that lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "runtime", "cache", "clients")
ALLOWED = {
    "server": {"server", "runtime", "cache"},
    "runtime": {"runtime", "cache"},
    "cache": {"cache"},
    "clients": {"clients"},
}
EXTRA = {
    ("server/cli.py", "clients"),  # the commands `coldstream chat` and `top` start the clients
    ("runtime/checkpoint.py", "httpx"),  # only to tell the hub's network errors from others
}
FORBIDDEN = {
    "server": {"torch", "transformers", "safetensors", "gguf", "openai"},
    "runtime": {"fastapi", "starlette", "uvicorn", "httpx", "prometheus_client", "typer", "transformers", "openai"},
    "cache": {"torch", "fastapi", "pydantic", "safetensors", "tokenizers", "transformers", "openai"},
    "clients": {"torch", "numpy", "fastapi", "transformers", "openai"},
}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level name) of each import statement, wherever it stands; `.` for a relative one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
            "import_module",
        ):
            first = node.args[0] if node.args else None
            yield node.lineno, first.value.split(".")[0] if isinstance(first, ast.Constant) else "<computed>"


def violations(package: str, relative: str, source: str) -> list[str]:
    """Every import of a file that its package may not have."""
    found = []
    for line, name in imported(ast.parse(source)):
        if (relative, name) in EXTRA:
            continue
        arrow = name in PACKAGES and name not in ALLOWED[package]
        if arrow or name in FORBIDDEN[package] or name in (".", "<computed>", "tests", "benchmarks"):
            found.append(f"{relative}:{line}: {package} must not import {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [
        v for f in files for v in violations(package, f.relative_to(ROOT).as_posix(), f.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("cache", "import runtime.config"),
        ("cache", "def f():\n    from runtime import config"),
        ("runtime", "if True:\n    import server.app as x"),
        ("server", "def f():\n    import torch.nn"),
        ("clients", "from server.schemas import X"),
        ("clients", "import importlib\nimportlib.import_module('torch')"),
        ("runtime", "import importlib\nimportlib.import_module(name)"),
        ("server", "from clients import Client"),
        ("runtime", "from . import config"),
    ],
)
def test_a_wrong_arrow_is_found(package: str, source: str) -> None:
    assert len(violations(package, f"{package}/x.py", source)) == 1


def test_right_arrows_pass() -> None:
    source = "import json\nfrom runtime.request import Request\ndef f():\n    from cache.stats import CacheSnapshot"
    assert violations("server", "server/x.py", source) == []
