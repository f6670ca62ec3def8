"""Columns: a table for a model that calls its sites otherwise (harmonica.site_names)."""

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F

from harmonica.router import Schedule
from harmonica.site_names import KINDS, block_and_word, word_of
from harmonica.table import default_names


def fit(schedule: Schedule, site_names: Sequence[str]) -> Schedule:
    """Return a schedule with its columns renamed and ordered as a model's sites, or unchanged if
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
