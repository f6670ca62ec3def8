"""The tutorials run, say what they print, and their notebooks are what the scripts make."""

import contextlib
import inspect
import io
import json
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import harmonica.sdt
from harmonica import pictures as plots

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
BUILD: dict[str, Any] = runpy.run_path(str(ROOT / "tutorials" / "build.py"))

FULL = os.environ.get("TUTORIALS") == "full"
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def cells(script: Path) -> list[tuple[str, str]]:
    """Return (kind, source) of each cell of a script, as a notebook has them."""
    parts = re.split(r"^# %%(.*)\n", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    made = []
    for mark, source in zip(parts[::2], parts[1::2], strict=True):
        kind = "markdown" if "[markdown]" in mark else "code"
        commented = r"^# ?" if kind == "markdown" else r"^# (?=%)"  # a magic stands in a comment
        made.append((kind, re.sub(commented, "", source.strip("\n"), flags=re.MULTILINE)))
    return made


def notebook(script: Path) -> dict[str, Any]:
    return json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))


def text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def answers(script: Path) -> list[tuple[str, str]]:
    """Return the code of each folded answer, and what the tutorial says that it prints ("" if it does not)."""
    kind, folded = cells(script)[-1]
    assert kind == "markdown", "the last cell is the folded answers"
    assert folded.startswith("<details><summary>Answers</summary>\n\n"), "the answers are folded"
    assert folded.endswith("\n\n</details>"), "the answers are folded"
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", folded, re.DOTALL)


def assert_alike(printed: str, said: str, *, numbers: bool) -> None:
    """Hold what was printed to what the tutorial says: words the same, numbers within a fifth (machines differ)."""
    number = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")
    assert number.sub("#", printed).split() == number.sub("#", said).split()
    if not numbers:
        return
    found, stated = ([float(n) for n in number.findall(lines)] for lines in (printed, said))
    assert found == pytest.approx(stated, rel=0.2)


SHORTER = {
    "02": "draw(32 draw(4; repeats=3 repeats=1",
    "03": "range(25) range(2); range(3) range(1); draw(100 draw(10; updates=150 updates=10",
    "04": "range(20) range(2); draw(100 draw(12; draw(16 draw(4; range(4)] range(2)]",
    "06": "range(1500) range(400); 570 38; draw(1000 draw(100; draw(64 draw(16; (1.2, (; "
    "(256 (64; train_to(s) train_to(s,budget=1920); order=1) order=1,budget=1920)",
    "07": "noises=64 noises=12; draw(32 draw(8; noises=96 noises=12; iterations=60 iterations=2; "
    "noises=48 noises=12; iterations=10 iterations=1; iterations=20 iterations=1",
}
"""What is drawn, timed or trained less, unless TUTORIALS=full (`make tutorials`)."""
OTHER_NUMBERS = SHORTER.keys() - {"02"}
"""The tutorials whose answers then print other numbers."""


def shortened(script: Path, code: str) -> str:
    changes = "" if FULL else SHORTER.get(script.stem[:2], "")
    for change in filter(None, changes.split("; ")):
        code = code.replace(*change.split())
    return code


@each_script
def test_the_script_runs_and_its_answers_print_what_it_says(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not FULL:
        monkeypatch.setattr("harmonica.search.refine_router.NOISES", 8)
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    whole = shortened(script, script.read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(whole, script.name, "exec"), names)
    solved = answers(script)
    assert len(solved) == 3
    for code, said in solved:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(shortened(script, code), f"{script.stem}, answers", "exec"), names)
        if said:
            same_numbers = FULL or script.stem[:2] not in OTHER_NUMBERS
            assert_alike(printed.getvalue(), said, numbers=same_numbers)


@each_script
def test_the_notebook_has_the_cells_of_the_script(script):
    made = [(cell["cell_type"], text(cell["source"])) for cell in notebook(script)["cells"]]
    assert made == [("markdown", BUILD["opening"](script.stem)), *cells(script)]


@each_script
def test_the_notebook_was_run_without_an_error_and_knows_nothing_of_the_machine(script):
    made = notebook(script)
    code = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [n + 1 for n in range(len(code))]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2, "a tutorial has pictures"
    machine = r"site-packages|/home/|/root/|/tmp/|/Users/|[A-Z]:\\|0x[0-9a-f]{8}"
    for output in outputs:
        said = text(output.get("text", "")) + text(output.get("data", {}).get("text/plain", ""))
        assert not re.search(machine, said), said
    left = "what changes with the machine is left out"
    assert set(made["metadata"]) == {"kernelspec", "language_info"}, left


@each_script
def test_a_tutorial_opens_with_what_it_teaches_and_asks_before_each_plot(script):
    made = cells(script)
    title = made[0][1]
    assert title.startswith(f"# {int(script.stem[:2])}. ")
    assert "After this tutorial you can" in title
    outputs = [cell.get("outputs", []) for cell in notebook(script)["cells"][1:]]
    for i, (shown, (kind, _)) in enumerate(zip(outputs, made, strict=True)):
        if any("image/png" in output.get("data", {}) for output in shown):
            question = next(source for kind, source in reversed(made[:i]) if kind == "markdown")
            assert "?" in question, f"cell {i} draws and nothing was asked"
            assert kind == "code"


def test_the_third_tutorial_names_what_is_in_the_loop_that_it_prints():
    assert [script.stem[:3] for script in SCRIPTS] == [f"0{n}_" for n in range(1, 8)]
    (said,) = (text for _, text in cells(SCRIPTS[2]) if "the library's loop" in text)
    names = re.findall(r"[a-z_]+", " ".join(re.findall(r"`(.*?)`", said)))
    assert len(names) >= 3
    assert all(name in inspect.getsource(harmonica.sdt) for name in names), names


@each_script
def test_files_that_a_tutorial_names_exist(script):
    written = "\n".join(source for kind, source in cells(script) if kind == "markdown")
    written = re.sub(r"```.*?```", "", written, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\((.*?)\)", written) if "://" not in link]
    files = re.findall(r"`((?:docs|benchmarks|harmonica|tests|tutorials)/[\w/.]+)`", written)
    for link in links:
        assert (script.parent / link).exists(), link
    for file in files:
        assert (ROOT / file).exists(), file


def test_with_an_address_a_notebook_links_to_its_own_page_in_colab():
    page = BUILD["opening"]("01_x", "a/b")
    assert "https://colab.research.google.com/github/a/b/blob/main/tutorials/01_x.ipynb" in page
    assert "git+https://github.com/a/b" in page
    assert "github" not in BUILD["opening"]("01_x", None)


def test_what_the_tutorials_draw_is_a_figure_with_every_line_and_site():
    names = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
    values = torch.rand(5, 4)
    values[0] = torch.nan
    heat = plots.site_heatmap(values, names, label="change", most=0.4)
    images = [image for ax in heat.axes for image in ax.get_images()]
    assert len(images) == 2, "a panel for each kind"
    assert all(image.get_clim() == (0.0, 0.4) for image in images)
    cells = torch.as_tensor(images[1].get_array().filled(-1)[:, 1:])
    assert torch.equal(cells, values[1:, [1, 3]].T)
    points = lambda figure: [line.get_xydata().tolist() for line in figure.axes[0].lines]  # noqa: E731
    series = {"a": [0.0, 1.0, float("nan"), 2.0], "b": [1.0]}
    shown = [[[1.0, 1.0], [3.0, 2.0]], [[0.0, 1.0]]]
    assert points(plots.per_step(series, ylabel="error", log=True)) == shown
    pairs = {"a": [(2.0, 1e-2), (1.5, 1e-3), (1.0, 0.0)]}
    assert points(plots.tradeoff(pairs, ylabel="error"))[0] == [[1.5, 1e-3], [2.0, 1e-2]]
