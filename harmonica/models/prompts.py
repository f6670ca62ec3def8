"""Prompts: the text that text-to-image models are trained and timed on, one to a line.

This file does not know models or tokenizers.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from harmonica.storage.files import read_text
from harmonica.values import StrPath, items, require


def read_prompts(given: StrPath | Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the prompts of a text file in UTF-8, of a list, or 64 bundled ones of our own.

    In a file, blank lines and lines starting with # are ignored. Raises FileNotFoundError if there
    is no such file, ValueError if there is no prompt or the file is not text.

    >>> len(read_prompts()), read_prompts(["a red house"])
    (64, ('a red house',))
    """
    if given is not None and not isinstance(given, str | os.PathLike):
        texts = items("prompts", given)
        require(len(texts) > 0, "there are no prompts; give at least one")
        strings = all(isinstance(text, str) for text in texts)
        require(strings, f"prompts are {texts!r:.60}; each must be a string")
        return texts
    file = Path(__file__).with_name("prompts.txt") if given is None else given
    lines = [line.strip() for line in read_text(file).splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    todo = "write one to a line (lines starting with # do not count)"
    require(bool(prompts), f"{file} has no prompt; {todo}")
    return prompts
