"""Lifetimes: what a frozen schedule knows before the walk, and the gates that follow from it.

A schedule is static. For each step and site it is known in advance which outputs its gate reads
(`Schedule.gate_weights`), and so when each output is read for the last time. It is freed then, or
never kept. A plan's gates give the same features as `reuse` and `weighted`, bit for bit, with fewer
of them alive. This file does not know models or samplers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from harmonica.cache import Cache, Compute, Feature, Gate, never_computed
from harmonica.forecast import History, weighted_sum
from harmonica.router import Schedule


class Entry(NamedTuple):
    """What a site does at a step, in terms of the outputs that are kept of it, newest first.

    A fresh output stands before the kept ones.
    """

    computes: bool
    weights: tuple[float, ...]  # of each output, fresh one included
    keep: tuple[int, ...]  # which of the outputs stay alive
    steps: tuple[int, ...]  # that each output is from
    looks_up: bool = False  # whether it only reuses an output that is read again later


LOOKUP = (False, (1.0,), (0,))

Plan = tuple[tuple[Entry, ...], ...]
"""A schedule in Python numbers: T rows of N entries, sites in the order of the columns."""
Add = Callable[[Sequence[float], History], Feature]
"""Weights and features -> Σⱼ wⱼ·fⱼ."""


def plan_of(schedule: Schedule) -> Plan:
    """Plan a schedule; the only time that its tensors are read.

    >>> plan = plan_of(Schedule([[True, True], [False, True], [False, True]]))
    >>> [row[0].keep for row in plan], [row[1].keep for row in plan]
    ([(0,), (0,), ()], [(), (), ()])
    """
    table, weights = schedule.compute.T.tolist(), schedule.gate_weights
    each = [None] * len(table) if weights is None else weights.unbind(1)  # N × (T, 1 + m)
    columns = [_column(*column) for column in zip(table, each, strict=True)]
    return tuple(zip(*columns, strict=True))


def planned(row: Sequence[Entry], cache: Cache, add: Add = weighted_sum) -> Gate:
    """Return the gate of one row of a plan over a walk's cache, which is empty after the last row.

    Rows come in the order of the walk, and each asks every site once. A feature that was never
    computed raises RuntimeError, as `reuse` does.
    """

    def gate(site: int, compute: Compute) -> Feature:
        try:
            entry = row[site]
            if entry.looks_up:
                return cache[site][0]
            kept: History = cache.pop(site, ()) if entry.computes else cache.pop(site)
        except LookupError:
            raise never_computed(site, len(row)) from None
        outputs = (compute(), *kept) if entry.computes else kept
        if entry.keep:
            cache[site] = tuple(outputs[j] for j in entry.keep)
        return add(entry.weights, outputs)

    return gate


def _column(computes: list[bool], weights: Tensor | None) -> list[Entry]:
    """Return what one site does at each of the T steps, from its decisions and weights (T, 1 + m).

    >>> [entry.keep for entry in _column([True, False, False, True, True], None)]
    [(0,), (0,), (), (), ()]
    """
    past: list[int] = []  # steps that computed, newest first
    weight_of: list[dict[int, float]] = []  # at each step, of the outputs of earlier ones
    last_read: dict[int, int] = {}  # step of an output -> the last step that reads it
    for k, computed in enumerate(computes):
        past = [k, *past] if computed else past
        scales = [1.0] if weights is None else weights[k, 0 if computed else 1 :].tolist()
        weight_of.append(dict(zip(past, scales, strict=False)))
        last_read |= {step: k for step, w in weight_of[k].items() if w != 0}
    column, alive = [], tuple[int, ...]()
    for k, computed in enumerate(computes):
        steps = (k, *alive) if computed else alive
        keep = tuple(j for j, step in enumerate(steps) if last_read.get(step, -1) > k)
        scale = tuple(weight_of[k].get(step, 0.0) for step in steps)
        column.append(Entry(computed, scale, keep, steps, (computed, scale, keep) == LOOKUP))
        alive = tuple(steps[j] for j in keep)
    return column
