"""Build the notebooks of tutorials, and run them.

    python tutorials/build.py tutorials/01_features_repeat.py …

A script is in jupytext's percent format. Its notebook has the same cells below one that says how to open it elsewhere.
The same script makes the same file: cells are numbered, and times, paths and the machine's Python are left out.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

REPOSITORY: str | None = None
"""OWNER/NAME on GitHub, once the project lies there. The one place that says so; notebooks link to Colab with it."""

PACKAGE = "harmonica-dit[pixart]"


def opening(name: str, repository: str | None = REPOSITORY) -> str:
    """Return the first cell: how to run the notebook called `name` in Colab."""
    colab = "https://colab.research.google.com/"
    if repository is None:
        return f"To run it in [Colab]({colab}), upload it there; the first cell to run is `%pip install {PACKAGE}`."
    link = f"{colab}github/{repository}/blob/main/tutorials/{name}.ipynb"
    package = f'"{PACKAGE} @ git+https://github.com/{repository}"'
    return f"[Open in Colab]({link}); there, the first cell to run is `%pip install {package}`."


def notebook(script: Path) -> Any:
    """Return the notebook of a script, not run."""
    import jupytext
    from nbformat import v4

    cells = jupytext.read(script).cells
    made = v4.new_notebook(cells=[v4.new_markdown_cell(opening(script.stem)), *cells])
    for i, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{i:02}", {}
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return made


def main(scripts: list[str]) -> None:
    """Build, run and write the notebooks of scripts."""
    import nbformat
    from nbclient import NotebookClient

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it tells what else could be installed
    os.environ["PYTHONWARNINGS"] = (
        "ignore:IProgress"  # tqdm asks for widgets, and says where it is installed
    )
    for script in map(Path, scripts):
        made = notebook(script)
        about = dict(made.metadata)
        NotebookClient(
            made, kernel_name="python3", record_timing=False, coalesce_streams=True
        ).execute(cwd=str(script.parent))
        made.metadata = about  # running adds the version of Python
        nbformat.write(made, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("scripts", nargs="+")
    main(parser.parse_args().scripts)
