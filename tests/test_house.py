"""What holds of the code as a whole: the public surface, which module may import which, where operators are named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import onnx.defs
import pytest

import onnxcar

PACKAGE = Path(onnxcar.__file__).parent

# Data flows one way: a room imports only from rooms on lines above its own, or from its own line.
FLOORS = [
    {"errors", "stats", "executors", "progress"},
    {"_tensors", "_wall", "_skeleton", "model", "_params"},
    {"facts", "_graphs"},
    {"_libraries", "_half", "_providers", "_device", "runtime", "metrics"},
    {"data", "testing"},
    {"channels", "ledger", "config", "journal", "classes", "bootstrap"},
    {"rules"},
    {"surgery"},
    {"_judge"},
    {"scoring"},
    {
        "scope",
        "steps",
        "greedy",
        "interpret",
        "criteria",
        "record",
        "latency",
        "latency_table",
        "recovery",
        "guarantee",
    },
    {"choosers", "shrinking", "importances"},
    {"finish"},
    {"pruning"},
    {"pages"},
    {"search", "sweep", "sensitivity", "comparison", "doctor", "explanation"},
    {"report"},
    {"cli"},
    {"__main__"},
]
# Operators are named by the rules and by what folds, counts and rewrites nodes; elsewhere they are a smell.
MAY_NAME_OPERATORS = {
    "rules",
    "facts",
    "surgery",
    "_params",
    "_graphs",
    "_wall",
    "runtime",
    "_judge",
    "scoring",
    "metrics",
    "interpret",
}


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(file: Path) -> set[str]:
    """Rooms that a file imports at run time (imports for type checkers do not count)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "onnxcar":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("onnxcar.")}
    return found


def test_every_room_has_a_floor() -> None:
    assert {_room(f) for f in _files()} - {"__init__"} == set().union(*FLOORS)


@pytest.mark.parametrize("file", _files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_rooms_import_only_what_stands_above(file: Path) -> None:
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    room = _room(file)
    if room == "__init__":
        return
    wrong = {x for x in _imports(file) if x in floor and floor[x] > floor[room]}
    assert not wrong, f"{room} imports {sorted(wrong)}, which stand below it"


@pytest.mark.parametrize("file", _files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_operators_are_named_where_rules_live(file: Path) -> None:
    if _room(file) in MAY_NAME_OPERATORS:
        return
    operators = {s.name for s in onnx.defs.get_all_schemas()}
    compared = re.findall(r"op_type\s*(?:==|!=|in)\s*[\"'(\[{]+([A-Za-z0-9]+)", file.read_text(encoding="utf-8"))
    assert not operators & set(compared)


def test_files_stay_readable() -> None:
    long = {str(f.relative_to(PACKAGE)): n for f in _files() if (n := len(f.read_text().splitlines())) > 500}
    assert not long


def test_public_names_exist_and_are_documented() -> None:
    for name in onnxcar.__all__:
        assert getattr(onnxcar, name).__doc__, name
    assert list(onnxcar._EXPORTS) == sorted(onnxcar._EXPORTS)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        onnxcar.prun  # noqa: B018 - the access is what is tested


def test_import_is_cheap() -> None:
    code = "import sys, onnxcar.cli; print([m for m in ('onnx', 'onnxruntime', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
