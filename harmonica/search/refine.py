"""Refine: a search that changes entries of a table and keeps a change if the error of the final
image falls.

The search stands at a table, and asks `harmonica.search.flip_effects` what flipping entries would
do to the image:

    rows     exchange two rows: of all pairs, the PAIRS that the quadratic likes best are walked
    flips    where no pair helps: the best set of at most FLIPS entries, then half as many

A change is kept only if real walks show a lower error. Where neither kind helps, the search ends.
Tables are judged on the same noises throughout, each quadratic sees others, so a change that fits
its own noises only is not kept. To save time, a candidate is walked on FEW noises first, then on a
half of them, and the quadratic, which only proposes, sees a half.

    budget     what a search may spend, of all processes together, in predictions of one noise; a
               backward pass counts as two. Whatever has a budget counts it so.

Reuse couples sites strongly: whole steps that refresh together are far better than the same
refreshes spread out. No flip finds that from afar, so the search starts from several tables: the
given ones, and the cheapest and the evenly spread paths of whole steps. This file does not know how
a router is trained, nor whether a pool's images are references or those of the uncached walk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import torch
from torch import Tensor

from harmonica.denoise import Denoiser
from harmonica.processes import local_part, mean_over_ranks, world
from harmonica.router import Schedule
from harmonica.search.flip_effects import WALKS, Quadratic, best_flips, flip_effects_at, with_table
from harmonica.search.paths import cheapest_path, reuse_errors, room_for, spread, whole_steps
from harmonica.search.references import PORTION, Pool, pool_errors, typical_error
from harmonica.search.target import Target, require_target
from harmonica.values import require

FLIPS = 32  # entries that flip in one round, at most; the quadratic is believed no farther away
PAIRS = 10  # pairs of rows that are walked in one round, at most
SIGNS_SEED = 20_000_003  # of the random signs that a quadratic takes
SCREENING_SHARE = 2  # one noise of so many screens candidates, and a quadratic sees as many
FEW = 32  # never fewer noises than these, so that chance does not decide
HOPELESS = 1.15  # a candidate whose error on FEW noises is so many times as large is given up
WALKS_PER_ROUND = 2 + (1 + WALKS) / SCREENING_SHARE + PAIRS + FLIPS.bit_length()
"""Walks of one round on all noises, at most."""


def few_of(noises: int) -> int:
    """Return how many of a search's noises candidates are walked on first."""
    return min(noises, max(FEW, noises // SCREENING_SHARE))


@dataclass(frozen=True)
class JudgedTable:
    """A table and what real walks say of it."""

    table: Tensor  # (T, N) bool
    error: float  # typical error on the search's noises, of all processes
    on_target: bool  # a start may be too slow; what is yielded is not
    spent: float  # of the budget, so far


def refine(  # noqa: D417
    denoiser: Denoiser, tables: Sequence[Tensor], pool: Pool, others: Iterator[Pool],
    target: Target, *, budget: float, fill: Schedule | int = 0,
) -> Iterator[JudgedTable]:  # fmt: skip
    """Search from several tables, yielding each that is the best so far.

    Args:
        tables: (T, N) bool each, such as a trained one; paths of whole steps are added to them.
        pool: the noises that tables are judged on, and their targets.
        others: noises for the quadratics, a pool for each round.
        target: no table that is slower is yielded.
        budget: see above; a round that no longer fits is not begun.
        fill: what a skipped entry returns, `Schedule.order` or a schedule whose learned weights
            stay as they are wherever its table does.

    Raises ValueError if no table is on target, and then there is nothing to start from.
    """
    require_target(target, denoiser)
    search = Search(denoiser, pool, others, target, fill)
    starts = [search.judge(table) for table in (*tables, *search.paths())]
    on_target = [start for start in starts if start.on_target]
    fastest = f"none of {len(starts)} tables is as fast as {target.speedup:g}"
    require(bool(on_target), f"{fastest}; make one with target.fit_budget")
    best = min(on_target, key=lambda start: start.error)
    yield best
    while world() * (search.spent + WALKS_PER_ROUND * search.walk) <= budget:
        starts.sort(key=lambda start: start.error)
        at = starts.pop(0)  # best first, be it too slow
        after = search.improve(at)
        if after is not None:
            starts.append(after)
            if after.on_target and after.error < best.error:
                best = after
                yield best
        elif at is best or not starts:  # no other start is better than the best one
            return


class Search:
    """The walks of one search; `spent` counts this process's share of the budget. See `refine`."""

    def __init__(
        self, denoiser: Denoiser, pool: Pool, others: Iterator[Pool], target: Target,
        fill: Schedule | int = 0,
    ) -> None:  # fmt: skip
        self.denoiser, self.pool, self.others, self.target = denoiser, pool, others, target
        everything = whole_steps(denoiser, range(denoiser.steps))
        self.fill = Schedule(everything, order=fill) if isinstance(fill, int) else fill
        self.walk = len(pool) * denoiser.steps  # predictions of a walk on all noises
        self.spent = float(self.walk)
        self._room = room_for(denoiser, pool.x, pool.cond, PORTION)
        self._changes = [Search._exchange, Search._flip]
        self._known: dict[bytes, Tensor] = {}  # errors of a table, on noises walked so far
        self._signs = torch.Generator().manual_seed(SIGNS_SEED)

    def paths(self) -> list[Tensor]:
        """Return the cheapest and the evenly spread path of the steps allowed, and of one more."""
        steps, pool = self.denoiser.steps, self.pool[slice(few_of(len(self.pool)))]
        sums = lambda part: len(part) * reuse_errors(self.denoiser, part.x, part.cond)  # noqa: E731
        errors = torch.stack(list(pool.portions(sums, self._room[0]))).sum(0)
        errors = mean_over_ranks(errors / len(pool))
        self.spent += len(pool) * steps * (2 + (steps - 1) / 2)
        most = self.target.steps_that_compute
        counts = [n for n in (most, most + 1) if 1 <= n <= steps]
        pairs = [(cheapest_path(errors, n), spread(steps, Fraction(steps, n))) for n in counts]
        return [whole_steps(self.denoiser, path) for pair in pairs for path in pair]

    def judge(self, table: Tensor) -> JudgedTable:
        """Judge a table on all noises."""
        error, spent = self._error(table, len(self.pool)), self.target.spent(table)
        return JudgedTable(table, error, spent <= self.target.allowed, world() * self.spent)

    def better(self, table: Tensor, at: JudgedTable) -> JudgedTable | None:
        """Return a table's judgement if it is better than `at`, on few noises as well."""
        for noises, most in ((FEW, HOPELESS), (few_of(len(self.pool)), 1.0)):
            if self._error(table, noises) >= most * self._error(at.table, noises):
                return None
        after = self.judge(table)
        return after if after.error < at.error else None

    def improve(self, at: JudgedTable) -> JudgedTable | None:
        """Return a better table nearby, or a faster one if this is too slow, or None."""
        model = self._quadratic(at.table)
        for change in self._changes if at.on_target else (Search._exchange, Search._flip):
            after = change(self, model, at)
            if after is not None:  # what helped is tried first next time
                self._changes.sort(key=lambda each: each is not change)
                return after
        return None

    def _exchange(self, model: Quadratic, at: JudgedTable) -> JudgedTable | None:
        """Exchange the pair of rows that helps, if one of the likeliest does."""
        candidates = (self.better(table, at) for table in _pairs(model, at.table))
        return next((after for after in candidates if after is not None), None)

    def _flip(self, model: Quadratic, at: JudgedTable) -> JudgedTable | None:
        """Flip proposed entries, or half as many, if that helps or brings the table on target."""
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

    def _error(self, table: Tensor, noises: int) -> float:
        """Return a table's typical error on each process's first noises; walked ones are known."""
        errors = self._known.get(key := table.numpy().tobytes(), torch.empty(0))
        if len(errors) < min(noises, len(self.pool)):
            rest = self.pool[slice(len(errors), noises)]
            self.spent += len(rest) * self.denoiser.steps
            more = pool_errors(self.denoiser, rest, with_table(self.fill, table))
            errors = self._known[key] = torch.cat([errors.to(more), more])
        return float(mean_over_ranks(typical_error(errors[:noises])))

    def _quadratic(self, table: Tensor) -> Quadratic:
        """Return the quadratic around a table, mean over noises and processes."""
        pool, schedule = next(self.others), with_table(self.fill, table)
        joint = (len(pool) * world(), *pool.x.shape[1:])
        signs = local_part(torch.randint(2, joint, generator=self._signs) * 2 - 1, joint[0])
        model = flip_effects_at(self.denoiser, schedule, pool, signs, *self._room)
        self.spent += WALKS * len(pool) * self.denoiser.steps
        means = [mean_over_ranks(each).cpu() for each in (model.gradient, model.curvature)]
        return Quadratic(*means)


def _pairs(model: Quadratic, table: Tensor) -> list[Tensor]:
    """Return the PAIRS tables with two rows exchanged that the quadratic likes best."""
    ranked = []
    for j, k in combinations(range(1, len(table)), 2):
        order = list(range(len(table)))
        order[j], order[k] = k, j
        z = (table[order] != table)[1:].flatten()  # (E,)
        if z.sum() >= table.shape[1]:  # rows that are nearly alike are left to flips
            ranked.append((model(z), table[order]))
    ranked.sort(key=lambda each: each[0])
    return [exchanged for _, exchanged in ranked[:PAIRS]]
