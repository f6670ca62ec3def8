"""Kept: what a table says of each site at each step, and what is kept of a site meanwhile.

A walk of a pipeline may start late, or compute where the table reuses. So what is kept remembers
the steps that it comes from, and whether anybody has written to it since. This file does not know
pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from harmonica.cache import Feature
from harmonica.router import Schedule


@dataclass(frozen=True)
class Entry:
    """What the table says of one site at one step.

    Attributes:
        computes: whether the site computes.
        steps: that the outputs come from which the gate adds up, newest first.
        weights: of these outputs.
        keeps: whether a later step reads what is kept.
    """

    computes: bool
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    keeps: bool


FIRST = Entry(True, (), (), True)
"""Every site of a walk's first step, before its row is known."""


class Table:
    """A schedule in Python numbers, T rows of N entries."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, weights = schedule, schedule.gate_weights
        self.longest = 1 if weights is None else weights.shape[2] - 1
        columns = [
            _column(column, None if weights is None else weights[:, site].tolist())
            for site, column in enumerate(schedule.compute.T.tolist())
        ]
        self.rows = list(zip(*columns, strict=True))

    def start(self, times: tuple[float, ...]) -> int | None:
        """Return the row of the first of these timesteps, None if the table is not for them.

        They may be a tail of the table's. A table without timesteps is for any T of them.
        """
        own, offset = self.schedule.timesteps, self.schedule.steps - len(times)
        if offset < 0 or (offset > 0 and not own):
            return None
        alike = all(isclose(a, b, rel_tol=1e-5) for a, b in zip(own[offset:], times, strict=False))
        return offset if alike else None


def _column(computes: list[bool], weights: list[list[float]] | None) -> list[Entry]:
    """Return what one site does at each of the T steps.

    >>> [entry.keeps for entry in _column([True, False, False, True, True], None)]
    [True, True, False, False, False]
    """
    outputs: list[list[int]] = []  # steps whose outputs are known after step k, newest first
    terms: list[dict[int, float]] = []  # step -> weight, of those that are read
    for k, computed in enumerate(computes):
        past = outputs[-1] if outputs else []
        outputs.append([k, *past] if computed else past)
        scales = [1.0] if weights is None else weights[k][0 if computed else 1 :]
        terms.append(dict(zip(outputs[-1], scales, strict=False)))
    last = {step: k for k, term in enumerate(terms) for step, w in term.items() if w != 0}
    return [
        Entry(computed, tuple(term), tuple(term.values()), any(last.get(s, 0) > k for s in known))
        for k, (computed, term, known) in enumerate(zip(computes, terms, outputs, strict=True))
    ]


@dataclass
class Kept:
    """The last outputs of a site, newest first.

    Attributes:
        steps: that they come from.
        features: the outputs; copies of them where `apart`.
        tensors, versions: all tensors in them, and how often each was written to when it was kept.
        apart: nobody else holds the features, because they lie in host memory, or because torch
            does not count what is written to them (inference mode).
    """

    steps: tuple[int, ...]
    features: tuple[Feature, ...]
    tensors: list[Tensor]
    versions: list[int]
    apart: bool

    def intact(self) -> bool:
        """Tell whether nobody has written to the features since."""
        return [tensor._version for tensor in self.tensors] == self.versions


def keep(steps: tuple[int, ...], features: tuple[Feature, ...], offload: bool) -> Kept:
    """Keep the outputs of a site; the newest is copied if it must be `apart`."""
    leaves = [leaf for leaf in tree_leaves(features) if isinstance(leaf, Tensor)]
    if not offload and not any(leaf.is_inference() for leaf in leaves):
        return Kept(steps, features, leaves, [leaf._version for leaf in leaves], False)
    copy = _to_host if offload else _copied
    newest = tree_map(copy, features[0])
    return Kept(steps, (newest, *features[1:]), [], [], True)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class _Hosted:
    tensor: Tensor
    device: torch.device


def _to_host(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    host = torch.empty_like(leaf, device="cpu", pin_memory=leaf.is_cuda)
    return _Hosted(host.copy_(leaf, non_blocking=True), leaf.device)


def brought_back(leaf: Any) -> Any:
    """Return a copy of a feature that is kept apart, on its own device."""
    if not isinstance(leaf, _Hosted):
        return _copied(leaf)
    there = torch.empty_like(leaf.tensor, device=leaf.device)
    return there.copy_(leaf.tensor, non_blocking=True)
