"""Site names: one site is called differently by different code, and a table follows its sites.

    the original DiT, this library    blocks.3.attn                 blocks.3.mlp
    diffusers                         transformer_blocks.3.attn1    transformer_blocks.3.ff
    SmoothCache                       attn-3                        mlp-3
    a table for kinds of site         attn                          mlp

`harmonica.models.sites` also reads a module's name, to tell whether the module is a site. This file
does not know models.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch.nn.functional as F

from harmonica.table import default_names

S = TypeVar("S", bound=Any)  # a Schedule

_ORIGINAL = {"attn1": "attn", "attention": "attn", "self_attn": "attn", "cross_attn": "attn2"}
_ORIGINAL |= {"ff": "mlp", "ffn": "mlp", "feed_forward": "mlp"}
KINDS = {*_ORIGINAL, "attn", "attn2", "mlp"}
"""What a kind of site may be called."""

_NUMBERED = re.compile(r"(?:transformer_)?blocks\.([0-9]{1,6})\.(\w+)|(.+)-([0-9]{1,6})")


def word_of(name: str) -> str:
    """Return the last part of a site's name, in the original's word if it has one.

    >>> word_of("transformer_blocks.3.attn1"), word_of("ff"), word_of("x.conv")
    ('attn', 'mlp', 'conv')
    """
    word = name.rpartition(".")[2]
    return _ORIGINAL.get(word, word)


def block_and_word(name: str) -> tuple[int, str] | None:
    """Return the number of the block and the word of a site in the one list of blocks, else None.

    >>> block_and_word("transformer_blocks.3.ff"), block_and_word("attn-3")
    ((3, 'mlp'), (3, 'attn'))
    """
    match = _NUMBERED.fullmatch(name)
    return match and (int(match[1] or match[4]), word_of(match[2] or match[3]))


def fit(schedule: S, site_names: Sequence[str]) -> S:
    """Return a `Schedule` with its columns renamed and ordered as a model's sites, or unchanged if
    its names do not match (`columns_for`); a site that the table lacks always computes.
    """
    columns = columns_for(schedule.sites, site_names)
    if columns is None or schedule.sites == tuple(site_names):
        return schedule
    compute, weights = F.pad(schedule.compute, (0, 1), value=True)[:, columns], schedule.weights
    if weights is not None:
        weights = F.pad(weights, (0, 0, 0, 1))
        weights[:, -1, 0] = 1.0
        weights = weights[:, columns]
    return replace(schedule, compute=compute, weights=weights, sites=tuple(site_names))


def columns_for(names: Sequence[str], site_names: Sequence[str]) -> list[int] | None:
    """Return which column of a table of sites `names` each of a model's sites follows, −1 for one
    that always computes, or None if the table is for other sites.

    A table without names ("site0", …) fits by the number of its columns. In a table for kinds of
    site ("attn", "mlp") each site follows its kind; cross-attention follows "attn" if it has no
    column of its own, and a kind that the table does not name computes.

    >>> columns_for(["attn", "mlp"], ["b.0.attn1", "b.0.conv", "b.0.ff"])
    [0, -1, 1]
    """
    if tuple(names) in (tuple(site_names), default_names(len(site_names))):
        return list(range(len(site_names)))
    mine = {block_and_word(name) or name: i for i, name in enumerate(names)}
    theirs = [block_and_word(name) or name for name in site_names]
    if len(mine) == len(names) == len(site_names) and mine.keys() == set(theirs):
        return [mine[key] for key in theirs]
    if not set(names) <= KINDS:
        return None
    words = {word_of(name): i for i, name in enumerate(names)}
    if {"attn", "attention"} & set(names):
        words.setdefault("attn2", words["attn"])
    columns = [words.get(word_of(name), -1) for name in site_names]
    return columns if max(columns) >= 0 else None
