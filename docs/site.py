"""Add to the documentation site what lies outside of docs/, as the site is built (see mkdocs.yml).

These are: README.md as the first page, the notebooks, every file that a page links to, and a
reference page for each folder of harmonica/, made from the docstrings. Pages keep the links that
they need in the repository; here a link to `../x` or `docs/x` becomes a link to `x`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
LINKED = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "tutorials/*.py"]
LINKED += [
    "benchmarks/*.py",
    "benchmarks/results/*",
    "tests/**/*.py",
    "examples/*",
    "harmonica/**/*.py",
]


class Examples(griffe.Extension):
    """Show the `>>>` examples of docstrings as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put a fence around each run of lines that begins with `>>>`."""
        if obj.docstring:
            run = re.compile(r"^( *)>>> .*(?:\n(?! *\n).+)*", re.MULTILINE)
            fenced = run.sub(r"\1```python\n\g<0>\n\1```", obj.docstring.value)
            obj.docstring.value = fenced


def reference(folder: Path) -> str:
    """Return the reference page of one folder: a heading and the public names of each module."""
    lines = [f"# {'.'.join(folder.relative_to(ROOT).parts)}"]
    for path in sorted(folder.glob("*.py"), key=lambda path: (path.stem != "__init__", path.stem)):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text and path.stem != "__main__":
            parts = path.relative_to(ROOT).with_suffix("").parts
            lines.append(f"\n::: {'.'.join(parts).removesuffix('.__init__')}")
    return "\n".join(lines) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages that a folder's name stands for in the navigation."""

    def listed(entry: Any) -> Any:
        if entry == "tutorials":
            return [f"tutorials/{p.stem}.md" for p in sorted((ROOT / entry).glob("*.ipynb"))]
        if entry == "decisions":
            return [f"decisions/{p.name}" for p in sorted((ROOT / "docs" / entry).glob("*.md"))]
        if entry == "reference":
            return [f"reference/{name}.md" for name in folders()]
        if isinstance(entry, dict):
            return {key: listed(value) for key, value in entry.items()}
        return [listed(item) for item in entry] if isinstance(entry, list) else entry

    config.nav = listed(config.nav)
    return config


def folders() -> dict[str, Path]:
    """Return the folders of the library that hold modules, by dotted name."""
    files = (ROOT / "harmonica").rglob("__init__.py")
    return {".".join(p.parent.relative_to(ROOT).parts): p.parent for p in sorted(files)}


def notebook(path: Path, config: MkDocsConfig) -> list[File]:
    """Return the page of a notebook as it was last run, and its pictures."""
    text, resources = MarkdownExporter().from_filename(str(path))
    folder = f"tutorials/{path.stem}"
    for name in resources["outputs"]:
        text = text.replace(f"]({name})", f"]({path.stem}/{name})")
    return [
        File.generated(config, f"{folder}.ipynb", abs_src_path=str(path)),
        File.generated(config, f"{folder}.md", content=text),
        *(
            File.generated(config, f"{folder}/{name}", content=data)
            for name, data in resources["outputs"].items()
        ),
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add files of the repository, and the reference pages."""
    for path in sorted({path for pattern in LINKED for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        for file in notebook(path, config):
            files.append(file)
    for name, folder in folders().items():
        files.append(File.generated(config, f"reference/{name}.md", content=reference(folder)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that are right in the repository into links that are right on the site."""
    if page.file.src_uri.startswith("reference/"):
        return markdown
    markdown = re.sub(r"(tutorials/\w+)\.ipynb\)", r"\1.md)", markdown)
    up = page.file.src_uri.count("/")
    prefix = "docs/" if page.file.src_uri == "README.md" else "../" * (up + 1)
    return re.sub(rf"\]\({re.escape(prefix)}", f"]({'../' * up}", markdown)
