"""Refine: a search that changes entries of a table and keeps a change if the error of the final
image falls.

The search stands at a table, and asks `harmonica.search.flip_effects` what flipping entries would
do to the image:

    rows     exchange two rows. The quadratic ranks all pairs, and the best PAIRS are tested with
             real walks
    flips    where no pair helps: the best set of at most FLIPS entries, then half as many

A change is kept only if real walks show a lower error. Where neither kind helps, the search ends.
Tables are judged on the same noises throughout, each quadratic sees others, so a change that fits
its own noises only is not kept.

What a walk should be near is a pool's to say: the image of the uncached walk, or the reference
(`harmonica.search.references`). Two things save time: a candidate is walked on a quarter of the
noises first, and on all only if it is better there; and the quadratic, which only proposes, sees a
quarter of the noises.

Reuse couples sites strongly: whole steps that refresh together are far better than the same
refreshes spread out. No flip finds that from afar, so the search starts from several tables: the
given ones, and the cheapest and the evenly spread paths of whole steps. This file does not know how
a router is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from harmonica.denoise import Denoiser
from harmonica.memory import in_portions
from harmonica.processes import local_part, mean_over_ranks, world
from harmonica.router import Schedule
from harmonica.search.errors import noises_that_fit
from harmonica.search.flip_effects import WALKS, Quadratic, best_flips, flip_effects_at, with_table
from harmonica.search.paths import cheapest_path, reuse_errors, spread, whole_steps
from harmonica.search.references import Pool, pool_errors
from harmonica.search.target import Target

FLIPS = 32
"""Entries that flip in one round, at most; farther from the table the quadratic is not believed."""

PAIRS = 10
"""At most so many pairs of rows are walked in one round."""

SIGNS_SEED = 20_000_003
"""Seed of the random signs that a quadratic takes."""

SCREENING_SHARE, FEW = 4, 32
"""A candidate is walked on one noise of SCREENING_SHARE first, and a quadratic sees as many; never
fewer than FEW, so that chance does not decide."""

WALKS_PER_ROUND = 2 + (1 + WALKS) / SCREENING_SHARE + PAIRS + FLIPS.bit_length()
"""Walks of one round on all noises, at most."""


def few_of(noises: int) -> int:
    """Return how many of a search's noises candidates are walked on first."""
    return min(noises, max(FEW, noises // SCREENING_SHARE))


@dataclass(frozen=True)
class JudgedTable:
    """A table and what real walks say of it."""

    table: Tensor  # (T, N) bool
    error: float  # mean error on the search's noises, of all processes
    on_target: bool  # a start may be too slow; what is yielded is not
    spent: float  # predictions of one noise so far


def refine(
    denoiser: Denoiser,
    tables: Sequence[Tensor],
    pool: Pool,
    others: Iterator[Pool],
    target: Target,
    *,
    budget: float,
    gate: Schedule | int = 0,
) -> Iterator[JudgedTable]:
    """Search from several tables, yielding each that is the best so far.

    Args:
        denoiser: model, sampler, guidance.
        tables: (T, N) bool each, such as a trained one; paths of whole steps are added to them.
        pool: the noises that tables are judged on, and their targets.
        others: noises for the quadratics, a pool for each round.
        target: no table that is slower is yielded.
        budget: predictions of one noise to spend; a backward pass counts as two. A round that no
            longer fits is not begun.
        gate: `Schedule.order` under which tables are run, or a schedule whose learned weights stay
            as they are wherever its table does.

    Raises ValueError if no table is on target, and then there is nothing to start from.
    """
    judge = _Judge(denoiser, pool, others, target, gate)
    starts = [judge.judge(table) for table in (*tables, *judge.paths())]
    on_target = [start for start in starts if start.on_target]
    if not on_target:
        raise ValueError(
            f"none of {len(starts)} tables is as fast as {target.speedup:g}; make one with "
            "target.fit_budget"
        )
    best = min(on_target, key=lambda start: start.error)
    yield best
    while judge.spent + WALKS_PER_ROUND * judge.walk <= budget:
        starts.sort(key=lambda start: start.error)
        at = starts.pop(0)  # best first, be it too slow
        after = judge.improve(at)
        if after is not None:
            starts.append(after)
            if after.on_target and after.error < best.error:
                best = after
                yield best
        elif at is best or not starts:  # no other start is better than the best one
            return


class _Judge:
    """Walks on the noises of one search, and counts them."""

    def __init__(
        self,
        denoiser: Denoiser,
        pool: Pool,
        others: Iterator[Pool],
        target: Target,
        gate: Schedule | int,
    ) -> None:
        self.denoiser, self.pool, self.others, self.target = denoiser, pool, others, target
        sites = tuple(denoiser.sites)
        everything = torch.ones(denoiser.steps, len(sites), dtype=torch.bool)
        self.gate = Schedule(everything, sites, order=gate) if isinstance(gate, int) else gate
        self.walk = len(pool) * denoiser.steps  # predictions of a walk on all noises
        self.spent = float(self.walk)
        self.portion = noises_that_fit(denoiser, pool.x, pool.cond)
        self._kinds = [_Judge._rows, _Judge._flips]
        self._of_few = torch.empty(0), 0.0  # a table, and its error on few noises
        self._known: dict[bytes, JudgedTable] = {}
        self._signs = torch.Generator().manual_seed(SIGNS_SEED)

    def schedule(self, table: Tensor) -> Schedule:
        """Return a table with its gates."""
        return with_table(self.gate, table)

    def paths(self) -> list[Tensor]:
        """Return the cheapest and the evenly spread path of as many whole steps as the target
        allows, and one more.
        """
        steps = self.denoiser.steps

        def run(first: int, last: int) -> Tensor:
            part = self.pool[slice(first, last)]
            errors = reuse_errors(self.denoiser, part.x, part.cond)
            return errors.to(part.x.device) * (last - first)

        portions = in_portions(run, len(self.pool), self.portion)
        errors = mean_over_ranks(torch.stack(list(portions)).sum(0) / len(self.pool)).cpu()
        self.spent += 2 * self.walk + self.walk * (steps - 1) // 2
        most = int(self.target.allowed / float(self.target.cost.sites.sum()))
        paths: list[Collection[int]] = []
        for n in (most, most + 1):
            if 1 <= n <= steps:
                paths += [cheapest_path(errors, n), spread(steps, Fraction(steps, n))]
        return [whole_steps(self.denoiser, path) for path in paths]

    def judge(self, table: Tensor) -> JudgedTable:
        """Judge a table on all noises; one that was judged before is remembered."""
        key = table.numpy().tobytes()
        if key not in self._known:
            error = self._error(table, len(self.pool))
            fast = self.target.spent(table) <= self.target.allowed
            self._known[key] = JudgedTable(table, error, fast, self.spent)
        return self._known[key]

    def better(self, table: Tensor, at: JudgedTable) -> JudgedTable | None:
        """Return a table's judgement if it is better than `at`, on the first noises as well."""
        few = few_of(len(self.pool))
        if self._of_few[0] is not at.table:
            self._of_few = at.table, self._error(at.table, few)
        if (
            table.numpy().tobytes() not in self._known
            and self._error(table, few) >= self._of_few[1]
        ):
            return None
        after = self.judge(table)
        return after if after.error < at.error else None

    def _error(self, table: Tensor, noises: int) -> float:
        """Return the mean error of a table on the first noises of every process."""
        self.spent += noises * self.denoiser.steps
        part = self.pool[slice(noises)]
        errors = pool_errors(self.denoiser, part, self.schedule(table))
        return float(mean_over_ranks(errors.mean()))

    def improve(self, at: JudgedTable) -> JudgedTable | None:
        """Return a better table nearby, or a faster one if this is too slow; None where there is
        none.
        """
        model = self._quadratic(at.table)
        for kind in self._kinds if at.on_target else (_Judge._rows, _Judge._flips):
            after = kind(self, model, at)
            if after is not None:  # what helped is tried first next time
                self._kinds.sort(key=lambda each: each is not kind)
                return after
        return None

    def _rows(self, model: Quadratic, at: JudgedTable) -> JudgedTable | None:
        """Exchange the pair of rows that helps, if one of the likeliest does."""
        candidates = (self.better(table, at) for table in _pairs(model, at.table))
        return next((after for after in candidates if after is not None), None)

    def _flips(self, model: Quadratic, at: JudgedTable) -> JudgedTable | None:
        """Flip the entries that the quadratic proposes, or half as many, if that helps or brings
        the table on target.
        """
        most = FLIPS
        while most:
            table = best_flips(model, at.table, self.target, most=most)
            flips = int((table != at.table).sum())
            if flips == 0:
                return None
            after = self.better(table, at) if at.on_target else self.judge(table)
            if after is not None:
                return after
            most = min(most, flips) // 2
        return None

    def _quadratic(self, table: Tensor) -> Quadratic:
        """Return the quadratic around a table, mean over noises and processes."""
        pool = next(self.others)
        joint = (len(pool) * world(), *pool.x.shape[1:])
        signs = local_part(torch.randint(2, joint, generator=self._signs) * 2 - 1, joint[0])
        schedule = self.schedule(table)
        model = flip_effects_at(self.denoiser, schedule, pool, signs, portion=self.portion)
        self.spent += WALKS * len(pool) * self.denoiser.steps
        means = [mean_over_ranks(each).cpu() for each in (model.gradient, model.curvature)]
        return Quadratic(*means)


def _pairs(model: Quadratic, table: Tensor) -> list[Tensor]:
    """Return the tables (T, N) with two rows exchanged that the quadratic likes best, PAIRS at
    most.
    """
    steps, ranked = len(table), []
    for j in range(1, steps):
        for k in range(j + 1, steps):
            order = list(range(steps))
            order[j], order[k] = k, j
            z = (table[order] != table)[1:].flatten()  # (E,)
            if z.sum() >= table.shape[1]:  # rows that are nearly alike are left to flips
                ranked.append((model(z), table[order]))
    ranked.sort(key=lambda each: each[0])
    return [exchanged for _, exchanged in ranked[:PAIRS]]
