"""README and docs: their Python runs, their commands, files, links and tests exist."""

import ast
import importlib
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@cache
def names_of_tests() -> set[str]:
    """Return the names of all tests."""
    paths = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "benchmarks").rglob("test_*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"}


@each_page
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    few = {"refine_router.NOISES": 16, "refine_router.ROUNDS": 2, "learn.TURN_ROUNDS": 1}
    for name, value in few.items():
        monkeypatch.setattr(f"harmonica.search.{name}", value)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        quick = re.sub(r"iterations=[0-9_]+", "iterations=10", block)
        quick = re.sub(r"(steps(?:=|\": ))20", r"\g<1>5", quick)
        quick = quick.replace("tune(pipe, ", "tune(pipe, budget=200, progress=False, ")
        exec(compile(quick, page.name, "exec"), scope)  # fewer updates and steps, the same lines


@each_page
def test_every_command_of_a_page_names_a_module_a_script_or_a_target_and_options_that_exist(page):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        for script in [word for word in words if word.endswith(".py")]:
            assert (ROOT / script).is_file(), line
        for at in [i for i, word in enumerate(words) if word.startswith("harmonica.")]:
            importlib.import_module(words[at]).parser().parse_args(words[at + 1 :])


@each_page
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("document", ["pitfalls.md", "fidelity.md", "faults.md", "comparison.md"])
def test_every_test_that_a_document_names_exists(document):
    named = re.findall(r"`(test_\w+)(…?)`", (ROOT / "docs" / document).read_text(encoding="utf-8"))
    assert len(named) > 10
    known = names_of_tests()
    for name, cut in named:
        assert any(test.startswith(name) for test in known) if cut else name in known, name


def test_every_pitfall_and_fault_has_a_test_or_a_number():
    pages = [ROOT / "docs" / name for name in ("pitfalls.md", "faults.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    rows = re.findall(r"^\| (?!pitfall|mistake|fault).*", text, re.MULTILINE)
    assert len(rows) > 70
    for row in rows:
        assert re.search(r"`test_|golden|`benchmarks/", row), row


def test_every_result_file_says_machine_and_command_and_the_readme_is_at_most_150_lines():
    files = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text())
        assert result["command"].startswith("python benchmarks/")
        assert {"cpu", "cores", "torch"} <= set(result["machine"])
        assert (ROOT / result["command"].split()[1]).is_file()
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_make_bench_runs_every_script_that_has_a_result_but_those_that_need_more_than_a_computer():
    run = re.search(r"^BENCHES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    scripts = {Path(json.loads(path.read_text())["command"].split()[1]).stem for path in files}
    assert set(run) == scripts - {"gpu", "imports"}
