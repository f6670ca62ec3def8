"""The documents name tests; the tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def names_of_tests() -> set[str]:
    """Return the names of all tests."""
    trees = [
        ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("test_*.py")
    ]
    return {
        n.name
        for tree in trees
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"
    }


@pytest.mark.parametrize("document", ["pitfalls.md", "fidelity.md", "faults.md", "comparison.md"])
def test_every_test_that_a_document_names_exists(document):
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)(…?)`", text)
    assert len(named) > 10
    known = names_of_tests()
    for name, cut in named:
        assert any(test.startswith(name) for test in known) if cut else name in known, name


def test_every_pitfall_and_fault_has_a_test_or_a_number():
    rows = [
        line
        for name in ("pitfalls.md", "faults.md")
        for line in (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith(("| pitfall", "| mistake", "| fault"))
    ]
    assert len(rows) > 70
    for row in rows:
        assert re.search(r"`test_|golden|`benchmarks/", row), row
