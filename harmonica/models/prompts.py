"""Prompts: the text that text-to-image models are trained and timed on, one to a line.

This file does not know models or tokenizers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from harmonica.storage.files import StrPath, read_text
from harmonica.table import require

BUNDLED = Path(__file__).with_name("prompts.txt")
"""64 prompts of our own."""


def read_prompts(path: StrPath | None = None) -> tuple[str, ...]:
    """Read prompts from a text file in UTF-8, or the bundled ones; blank lines and lines starting
    with # are ignored.

    Raises FileNotFoundError if there is no such file, ValueError if it has no prompt or is not
    text.

    >>> len(read_prompts())
    64
    """
    file = BUNDLED if path is None else path
    lines = [line.strip() for line in read_text(file).splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    todo = "write one to a line (lines starting with # do not count)"
    require(bool(prompts), f"{file} has no prompt; {todo}")
    return prompts


def prompts_from(given: StrPath | Sequence[str] | None) -> tuple[str, ...]:
    """Return prompts given as a file, as a list, or not at all, which means the bundled ones;
    raises as `read_prompts`.

    >>> prompts_from(["a red house"])
    ('a red house',)
    """
    if given is None or isinstance(given, str | os.PathLike):
        return read_prompts(given)
    return tuple(given)
