"""Names: one site, called differently by different code.

    the original DiT, this library    blocks.3.attn                 blocks.3.mlp
    diffusers                         transformer_blocks.3.attn1    transformer_blocks.3.ff
    a table for kinds of site         attn                          mlp

`fit` gives a schedule the names of the model it is about to run on, if the two mean the same sites.
It never guesses: a schedule that does not fit comes back as it is, and `schedule.check` says what
is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from harmonica.router import Schedule

_KINDS = {
    "attn": "attn",
    "attn1": "attn",
    "attention": "attn",
    "self_attn": "attn",
    "attn2": "attn2",
}
_KINDS |= {"cross_attn": "attn2", "mlp": "mlp", "ff": "mlp", "ffn": "mlp", "feed_forward": "mlp"}
_BLOCK = re.compile(r"(?:transformer_)?blocks\.(\d+)\.(\w+)")


def fit(schedule: Schedule, sites: Sequence[str]) -> Schedule:
    """Return the schedule in the names and the order of `sites`, or as it is if it is for other
    sites.

    A table without names fits by the number of its columns. A table for kinds of site ("attn",
    "mlp") gives each site the column of its kind; cross-attention follows "attn" if it has none of
    its own, and a kind that the table does not name computes.

    >>> fit(Schedule([[1, 1], [0, 1]], sites=("attn", "mlp")), ["b.0.attn", "b.0.mlp", "b.1.mlp"]).sites
    ('b.0.attn', 'b.0.mlp', 'b.1.mlp')
    """
    mine, theirs = schedule.sites, tuple(sites)
    if mine == theirs:
        return schedule
    if mine == tuple(f"site{i}" for i in range(len(theirs))):
        return replace(schedule, sites=theirs)
    columns = {_canonical(name): i for i, name in enumerate(mine)}
    if len(columns) == len(mine) == len(theirs) and set(columns) == {
        _canonical(name) for name in theirs
    }:
        return replace(
            schedule,
            compute=schedule.compute[:, [columns[_canonical(n)] for n in theirs]],
            sites=theirs,
        )
    if set(mine) <= set(_KINDS):
        kinds = {_KINDS[name]: schedule.compute[:, i] for i, name in enumerate(mine)}
        if {"attn", "attention"} & set(mine):
            kinds.setdefault("attn2", kinds["attn"])
        always = torch.ones(schedule.steps, dtype=torch.bool)
        wanted = [kinds.get(_KINDS.get(name.rsplit(".", 1)[-1], ""), always) for name in theirs]
        if any(column is not always for column in wanted):
            return replace(schedule, compute=torch.stack(wanted, dim=1), sites=theirs)
    return schedule


def _canonical(name: str) -> str:
    """Return the name in the original's words, if it is one of a numbered block."""
    match = _BLOCK.fullmatch(name)
    return f"blocks.{match[1]}.{_KINDS.get(match[2], match[2])}" if match else name
