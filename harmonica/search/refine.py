"""Refine: training ends with a soft table that was scored step by step; make the hard one better on
whole walks.

The search stands at a table, and asks `harmonica.search.flip_effects` what turning over entries
would do to the image:

    rows       two steps change places; the quadratic ranks all pairs, the likeliest are walked until one helps
    flips      where no pair helps: the best set of at most 32 entries; where a walk disagrees, half as many

A real walk has the last word, so no change is kept that does not lower the image error. Where
neither rows nor flips do, the search ends. Each quadratic sees new noises, walks are judged on the
same ones: a change that fits its own noises only is not kept.

Reuse couples sites strongly: whole steps that refresh together are far better than the same
refreshes spread out. No
flip finds that from afar, so the search starts from several tables: the trained one, and paths of
whole steps, the cheapest (`harmonica.search.paths`) and the evenly spread. A larger budget goes
into more noises. This file does not know how a router is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor

from harmonica.denoise import Denoiser, sample
from harmonica.processes import local_part, mean_over_ranks, rank, world
from harmonica.router import Router, Schedule
from harmonica.search.budget import Target, logit
from harmonica.search.errors import image_mse
from harmonica.search.flip_effects import WALKS, Quadratic, around, choose
from harmonica.search.paths import cheapest_path, spread, step_costs, whole_steps

Batch = tuple[Tensor, Any]
"""Noise x (B, C, H, W) and conditions; all batches of a search have one B."""

FLIPS = 32
"""At most so many entries turn over in one round; further from the table the quadratic is not
believed."""

PAIRS = 10
"""At most so many pairs of rows are walked in one round."""

ROUND = 1 + WALKS + PAIRS + FLIPS.bit_length()
"""Walks of one round, at most."""

NOISES, ROUNDS, SEED = 128, 12, 20_000_003
"""What `reach` judges tables on, unless a batch or the budget is larger, and what it spends if
nobody says."""

MARGIN = 0.5
"""Of a logit that was moved across τ."""


@dataclass(frozen=True)
class Round:
    """A table and what is known of it."""

    table: Tensor  # (T, N) bool
    error: float  # image error on the search's noises, measured
    on_target: bool  # a start may be too slow; what is yielded is not
    spent: int  # predictions so far, of B noises each


def refine(
    denoiser: Denoiser,
    tables: Sequence[Tensor],
    noise: Iterator[Batch],
    target: Target,
    *,
    batches: int,
    budget: int,
    order: int = 0,
) -> Iterator[Round]:
    """Search from several tables, yielding each that is the best so far.

    Args:
        denoiser: model, sampler, guidance.
        tables: (T, N) bool each, such as a trained one; paths of whole steps are added to them.
        noise: batches of x (B, C, H, W) and conditions, endless.
        batches: so many are judged on, the first ones; each round takes as many new ones for its
            quadratic.
        target: no table that is slower is yielded.
        budget: predictions to spend, of B noises each; a backward pass counts as two. A round that
            no longer fits is not begun.
        order: `Schedule.order` under which the tables are run.

    Raises ValueError if no table is on target, and then there is nothing to start from.
    """
    judge = _Judge(denoiser, noise, batches, target, order)
    starts = [judge.round(table) for table in (*tables, *judge.paths())]
    best = min(
        (start for start in starts if start.on_target), key=lambda start: start.error, default=None
    )
    if best is None:
        raise ValueError(
            f"none of {len(starts)} tables is as fast as {target.speedup:g}; land one on the target first"
        )
    yield best
    while judge.fits(budget):
        starts.sort(key=lambda start: start.error)
        at = starts.pop(0)  # best first, be it too slow
        after = judge.improve(at)
        if after is not None:
            starts.append(after)
            if after.on_target and after.error < best.error:
                best = after
                yield best
        elif at is best or not starts:  # the others are behind
            return


def reach(
    denoiser: Denoiser,
    router: Router,
    target: Target,
    *,
    tau: float = 0.1,
    batch_size: int = 32,
    budget: int | None = None,
    order: int = 0,
    progress: bool = False,
) -> None:
    """Put a trained router on its target: land its table, refine that, and let the scores say so at
    τ.

    A score whose decision changed is set just beyond τ, the others stay. The noises are drawn from
    a seed of their own, so that resuming a run does not change them.

    Args:
        denoiser: model, sampler, guidance.
        router: changed in place; provenance says what was spent.
        target: where to.
        tau: τ, at which it will be frozen, above 0: at 0 nothing is reused.
        batch_size: noises in a walk, of all processes.
        budget: predictions of batch_size noises; ROUNDS rounds on 128 noises if None, 0 only lands.
            A multiple of that goes into as many times the noises.
        order: how skipped sites are filled, `Schedule.order`; the router will say so.
        progress: show a bar.
    """
    from tqdm.auto import tqdm

    if not 0.0 < tau < 1.0:
        raise ValueError(f"tau is {tau}; a target needs 0 < tau < 1, since nothing is reused at 0")
    r = router().detach().cpu()  # (T, N)
    best, spent, error = target.fit_budget(r, r > tau), 0, float("nan")
    count, generator = -(-NOISES // batch_size), torch.Generator().manual_seed(SEED)
    one = ROUNDS * ROUND * denoiser.steps  # what a search on one batch may take
    budget = count * one if budget is None else budget
    count = max(count, budget // one)
    if budget > 0:
        noise = (local_part(denoiser.draw(batch_size, generator), batch_size) for _ in repeat(None))
        quiet = None if progress and rank() == 0 else True
        with tqdm(total=budget, unit="prediction", desc="refine", disable=quiet) as bar:
            for found in refine(
                denoiser, [best], noise, target, batches=count, budget=budget, order=order
            ):
                bar.set_postfix(image_error=f"{found.error:.2e}", refresh=False)
                bar.update(found.spent - spent)
                best, spent, error = found.table, found.spent, found.error
    _adopt(router, best, tau)
    router.about["order"] = order
    router.about["provenance"] |= {"refined_for": spent, "target_speedup": target.speedup}
    if spent:
        router.about["provenance"] |= {"image_error": error}


@torch.no_grad()
def _adopt(router: Router, table: Tensor, tau: float) -> None:
    """Set the scores whose decision at τ is not the table's just beyond τ."""
    for row, wanted in zip(router.rows, table[1:].to(router.rows[0].device), strict=True):
        wrong = (torch.sigmoid(row) > tau) != wanted
        row[wrong] = torch.where(wanted, logit(tau) + MARGIN, logit(tau) - MARGIN).to(row)[wrong]


class _Judge:
    """Walks on the noises of one search, and counts them."""

    def __init__(
        self,
        denoiser: Denoiser,
        noise: Iterator[Batch],
        batches: int,
        target: Target,
        order: int = 0,
    ) -> None:
        self.denoiser, self.noise, self.target, self.order = denoiser, noise, target, order
        self.batches = list(islice(noise, batches))
        self.plain = [sample(denoiser, x, cond) for x, cond in self.batches]
        self.walk = batches * denoiser.steps  # predictions of a walk on all noises
        self.spent = self.walk
        self._kinds = [_Judge._rows, _Judge._flips]
        self._judged: dict[bytes, Round] = {}
        self._signs = torch.Generator().manual_seed(SEED)

    def paths(self) -> list[Tensor]:
        """Return the cheapest and the evenly spread path of as many whole steps as the target
        allows, and one more.
        """
        steps = self.denoiser.steps
        costs = sum(step_costs(self.denoiser, x, cond) for x, cond in self.batches) / len(
            self.batches
        )
        costs = mean_over_ranks(torch.as_tensor(costs))
        self.spent += 2 * self.walk + self.walk * (steps - 1) // 2
        most = int(self.target.allowed / float(self.target.cost.sites.sum()))
        paths: list[Collection[int]] = []
        for n in (most, most + 1):
            if 1 <= n <= steps:
                paths += [cheapest_path(costs, n), spread(steps, Fraction(steps, n))]
        return [whole_steps(self.denoiser, path) for path in paths]

    def round(self, table: Tensor) -> Round:
        """Judge a table, which need not be on target; one that was judged before is remembered."""
        key = table.numpy().tobytes()
        if key in self._judged:
            return self._judged[key]
        schedule = self._schedule(table)
        pairs = zip(self.batches, self.plain, strict=True)
        each = [
            image_mse(sample(self.denoiser, x, cond, schedule), plain) for (x, cond), plain in pairs
        ]
        self.spent += self.walk
        error = float(mean_over_ranks(torch.tensor(each, dtype=torch.float64).mean()))
        self._judged[key] = Round(
            table, error, self.target.spent(table) <= self.target.allowed, self.spent
        )
        return self._judged[key]

    def _schedule(self, table: Tensor) -> Schedule:
        return Schedule(table, sites=tuple(self.denoiser.sites), order=self.order)

    def fits(self, budget: int) -> bool:
        """Return whether another round is within the budget."""
        return self.spent + ROUND * self.walk <= budget

    def improve(self, at: Round) -> Round | None:
        """Return a better table nearby, or a faster one if this is too slow; None where there is
        none.
        """
        model = self._quadratic(at.table)
        for kind in self._kinds if at.on_target else (_Judge._rows, _Judge._flips):
            after = kind(self, model, at)
            if after is not None:
                self._kinds.sort(
                    key=lambda each: each is not kind
                )  # what helped is tried first next time
                return after
        return None

    def _rows(self, model: Quadratic, at: Round) -> Round | None:
        """Exchange the pair of rows that helps, if one of the likeliest does."""
        tried = map(self.round, _pairs(model, at.table))
        return next((after for after in tried if after.error < at.error), None)

    def _flips(self, model: Quadratic, at: Round) -> Round | None:
        """Turn over the entries that the quadratic says, or half as many, if that helps or brings
        it on target.
        """
        most = FLIPS
        while most:
            table = choose(model, at.table, self.target, most=most)
            flips = int((table != at.table).sum())
            if flips == 0:
                return None
            after = self.round(table)
            if after.error < at.error or not at.on_target:
                return after
            most = min(most, flips) // 2
        return None

    def _quadratic(self, table: Tensor) -> Quadratic:
        """Return the quadratic around a table, mean over noises and processes."""
        found = []
        for x, cond in islice(self.noise, len(self.batches)):
            plain = sample(self.denoiser, x, cond)
            joint = (len(x) * world(), *x.shape[1:])
            signs = local_part(
                torch.randint(2, joint, generator=self._signs) * 2 - 1, len(x) * world()
            )
            found.append(around(self.denoiser, self._schedule(table), x, cond, plain, signs))
        self.spent += (1 + WALKS) * self.walk
        gradient = torch.stack([each.gradient for each in found]).mean(0)
        curvature = sum(each.curvature for each in found) / len(found)
        return Quadratic(mean_over_ranks(gradient), mean_over_ranks(torch.as_tensor(curvature)))


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
