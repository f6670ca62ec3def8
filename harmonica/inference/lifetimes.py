"""Plan: what a frozen table tells before the walk begins.

A schedule is static, so for each step k and site i it is known in advance not only whether the site
computes, but also whether anybody will read what it computed, and when a feature is read for the
last time:

    compute, unread    the next decision of this site is to compute again, or there is none: keep nothing
    compute, keep      some later step reads it: keep a reference
    read               reuse, and a later step reads it too
    read, let go       reuse for the last time: the feature is freed right after

A forecast (`Schedule.order` above 0) looks back at what was computed before, so there a feature is
kept until no later step reads the site at all. A plan's gates are a drop-in for `reuse` and
`forecast`: the same images bit for bit, with fewer features alive. This file does not know models
or samplers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harmonica.cache import Cache, Compute, Feature, Gate, never_computed
from harmonica.forecast import continued, seen

if TYPE_CHECKING:
    from harmonica.router import Schedule

UNREAD, KEEP, READ, LET_GO = range(4)
"""What a site does at a step; the first two compute."""

Row = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A schedule in Python numbers, each entry one of UNREAD, KEEP, READ and LET_GO.

    Attributes:
        rows: T rows of N entries, sites in the order in which a model asks them.
        order: of the schedule.

    >>> from harmonica import Schedule
    >>> Plan.of(Schedule([[True, True], [False, True], [False, True]])).rows
    ((1, 0), (2, 0), (3, 0))
    """

    rows: tuple[Row, ...]
    order: int = 0

    @classmethod
    def of(cls, schedule: Schedule) -> Plan:
        """Plan a schedule; the only time that its tensor is looked at."""
        columns = (
            _column(column, forecasts=schedule.order > 0) for column in schedule.compute.T.tolist()
        )
        return cls(tuple(zip(*columns, strict=True)), schedule.order)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.rows)

    def gate(self, k: int, cache: Cache) -> Gate:
        """Return the gate of step k over a trajectory's cache, which is empty after the last step.

        Asked in the order of the walk, each site once a step, it answers what `reuse` answers. A
        feature that was never computed raises RuntimeError, as there.
        """
        row = self.rows[k]
        if self.order:
            return self._forecasts(row, k, cache)

        def gate(site: int, compute: Compute) -> Feature:
            try:
                what = row[site]
                if what == READ:
                    return cache[site]
                if what == LET_GO:
                    return cache.pop(site)
            except LookupError:
                raise never_computed(site, len(row)) from None
            feature = compute()
            if what == KEEP:
                cache[site] = feature
            return feature

        return gate

    def _forecasts(self, row: Row, k: int, cache: Cache) -> Gate:
        def gate(site: int, compute: Compute) -> Feature:
            what = row[site]
            if what in (UNREAD, KEEP):
                now = seen(k, compute(), cache.pop(site, None), self.order)
                if what == KEEP:
                    cache[site] = now
                return now[1][0]
            if site not in cache:
                raise never_computed(site, len(row))
            return continued(cache[site] if what == READ else cache.pop(site), k)

        return gate

    def peak(self, sizes: Sequence[float] | None = None) -> float:
        """Return the most that is alive in the cache at once: features, or their sizes if N of them
        are given.

        >>> from harmonica import Schedule
        >>> plan = Plan.of(Schedule([[True, True], [False, False], [True, False]]))
        >>> plan.peak(), plan.peak([10, 1])
        (2, 11)
        """
        weigh = [1] * len(self.rows[0]) if sizes is None else list(sizes)
        if len(weigh) != len(self.rows[0]):
            raise ValueError(
                f"sizes has {len(weigh)} entries; the plan has {len(self.rows[0])} sites"
            )
        alive, most = [0] * len(weigh), 0.0  # features of each site
        for row in self.rows:
            for site, what in enumerate(row):
                if what != READ:
                    alive[site] = min(alive[site] + 1, self.order + 1) if what == KEEP else 0
                most = max(
                    most, sum(count * size for count, size in zip(alive, weigh, strict=True))
                )
        return int(most) if sizes is None or all(isinstance(size, int) for size in weigh) else most


def _column(computes: Sequence[bool], *, forecasts: bool = False) -> Row:
    """Return what one site does at each of the T steps, given where it computes.

    >>> _column([True, False, False, True, True]), _column([True, False, True, False, True],
    ...     forecasts=True)
    ((1, 2, 3, 0, 0), (1, 2, 1, 3, 0))
    """
    ahead = [
        computes[k + 1 :] if forecasts else computes[k + 1 : k + 2] for k in range(len(computes))
    ]
    return tuple(
        (KEEP if False in later else UNREAD) if compute else (READ if False in later else LET_GO)
        for compute, later in zip(computes, ahead, strict=True)
    )
