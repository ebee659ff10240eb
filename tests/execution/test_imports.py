"""Imports among the executor, the server, `app` and the parallel core go one way, also those inside functions."""

from __future__ import annotations

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SINGLE = ("execution", "server")
PACKAGES = ("comfy_execution", "app", "comfy/taco_dit", "comfy/ldm", "comfy/weights", "comfy/families")


def modules():
    """Name -> path of every module looked at."""
    found = {name: ROOT / f"{name}.py" for name in SINGLE}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path, known, name):
    """Names of known modules that a file imports anywhere but for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test)
        for inner in ast.walk(outer)
    }
    found = set()
    for statement in ast.walk(tree):
        if id(statement) in typing_only:
            continue
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            base = statement.module or ""
            if statement.level:
                parents = name.split(".")[: -statement.level]
                base = ".".join([*parents, *filter(None, [base])])
            inside = {f"{base}.{alias.name}" for alias in statement.names} & known
            found |= inside or {base}
    return found & known - {name}


@functools.cache
def graph():
    paths = modules()
    return {name: imports(path, set(paths), name) for name, path in paths.items()}


def circle(edges):
    """Modules of a circle, None when there is none."""
    edges = {name: set(targets) for name, targets in edges.items()}
    while True:
        free = [name for name, targets in edges.items() if not targets & set(edges)]
        if not free:
            return sorted(edges) or None
        for name in free:
            del edges[name]


def test_there_is_no_circle():
    found = circle(graph())
    assert found is None, f"modules that import each other, or need such: {found}"


def test_the_executor_knows_nothing_of_the_server():
    for name, targets in graph().items():
        if name.startswith("comfy_execution"):
            assert all(target.startswith("comfy_execution") for target in targets), (name, targets)
    assert not [target for target in graph()["execution"] if target.startswith(("server", "app"))]


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b"}, "b": set()}) is None
    assert len(graph()["server"]) > 5 and "execution" in graph()["app.routes_queue"]
