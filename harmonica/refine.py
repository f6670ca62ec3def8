"""Refine: training ends with a soft table that was scored step by step; make the hard one better on whole walks.

    flip      one entry turned over: reuse where it computed, or the other way round        e = (k, i)
    v_e       what a flip does to the image, sign included: image(flipped) − image(table)   (B, C, H, W)
    d         image(table) − image without a cache                                          (B, C, H, W)

λ and a router's gradient know the *size* of what each entry does by itself. Near a table, what several flips z do adds
up as vectors, so entries that cancel each other are seen, and so is a refresh that helps the steps after it:

    error(z) ≈ mean (d + Σ_e z_e·v_e)² = error + 2·z·h + zᵀGz,    h_e = mean d·v_e,    G_ef = mean v_e·v_f

All v_e together cost one walk for each flip, from its step on: T + N·T(T−1)/2 predictions, without gradients. Choosing
the flips is then arithmetic (`choose`): the quadratic is brought down at no more than the allowed cost, by flips and
pairs of flips, and a real walk says whether it was right; if not, half as many flips are tried.

Reuse couples sites strongly: whole steps that refresh together are far better than the same refreshes spread out. No
flip finds that from afar, so the search starts from several tables: the trained one, and the cheapest paths of whole
steps (`harmonica.search`), whose refreshes are first moved one at a time to where the image is best. A table fits the
noises it is judged on better than others, by half with 32 of them, so a larger budget goes into more noises.

This file does not know how a router is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmonica.denoise import Denoiser, sample
from harmonica.distributed import mean_over_ranks, own, rank
from harmonica.metrics import image_mse
from harmonica.router import Router, Schedule
from harmonica.search import Fork, cheapest_path, onward, predictions_of_all, step_costs, turned_over, whole_steps
from harmonica.target import Target, level

Batch = tuple[Tensor, Any]
"""Noise x (B, C, H, W) and conditions; all batches of a search have one B."""

FLIPS = 32
"""At most so many entries turn over in one round; further from the table the quadratic is not believed."""

NOISES, SEED = 32, 20_000_003
"""What `reach` judges tables on, unless a batch or the budget is larger."""

ROUNDS = 6
"""What `reach` spends: two to move refreshes, one for each start, one or two for the best."""

MARGIN = 0.5
"""Of a logit that was moved across τ."""

HOPELESS = 3.0
"""A start whose error is so many times the best one's is not searched from."""


@dataclass(frozen=True)
class Round:
    """A table and what is known of it."""

    table: Tensor  # (T, N) bool
    error: float  # image error on the search's noises, measured
    on_target: bool  # a start may be too slow; what is yielded is not
    spent: int  # predictions so far, of B noises each


@dataclass(frozen=True)
class Quadratic:
    """The model of a table's neighbourhood, over its E = (T−1)·N entries that may flip."""

    gradient: Tensor  # h, (E,) float64
    curvature: Tensor  # G, (E, E) float64


def refine(
    denoiser: Denoiser, tables: Sequence[Tensor], batches: Sequence[Batch], target: Target, *, budget: int
) -> Iterator[Round]:
    """Search around the best of several tables, yielding each that is the best so far.

    Args:
        denoiser: model, sampler, guidance.
        tables: (T, N) bool each, such as a trained one; paths of whole steps are added to them.
        batches: noises to judge on, and their conditions.
        target: no table that is slower is yielded.
        budget: predictions to spend, of B noises each; a start or a round that no longer fits is not begun.

    Raises ValueError if no table is on target, and then there is nothing to start from.
    """
    judge = _Judge(denoiser, batches, target)
    paths = judge.paths()
    paths = [judge.moved(path, (i + 1) * budget // (2 * len(paths))) for i, path in enumerate(paths)]
    starts = [judge.round(table) for table in (*tables, *(whole_steps(denoiser, path) for path in paths))]
    starts.sort(key=lambda start: start.error)
    best = next((start for start in starts if start.on_target), None)
    if best is None:
        raise ValueError(f"none of {len(starts)} tables is as fast as {target.speedup:g}; land one on the target first")
    yield best
    searched: list[Round] = []
    queue = [start for start in starts if start.error <= HOPELESS * best.error]
    while queue and judge.fits(budget):
        searched.append(queue.pop(0))
        after = judge.improve(searched[-1])
        if after is not None and after.error < best.error:
            best = after
            yield best
        if not queue and not any(best is start for start in searched):
            queue = [best]


def reach(
    denoiser: Denoiser,
    router: Router,
    target: Target,
    *,
    tau: float = 0.1,
    batch_size: int = 32,
    budget: int | None = None,
    progress: bool = False,
) -> None:
    """Put a trained router on its target: land its table, refine that, and let the scores say so at τ.

    A score whose decision changed is set just beyond τ, the others stay. The noises are drawn from a seed of their own,
    so that resuming a run does not change them.

    Args:
        denoiser: model, sampler, guidance.
        router: changed in place; provenance says what was spent.
        target: where to.
        tau: τ, at which it will be frozen, above 0: at 0 nothing is reused.
        batch_size: noises in a walk, of all processes.
        budget: predictions of batch_size noises; ROUNDS rounds on 32 noises if None, 0 only lands. A multiple of that
            goes into as many times the noises.
        progress: show a bar.
    """
    from tqdm.auto import tqdm

    if not 0.0 < tau < 1.0:
        raise ValueError(f"tau is {tau}; a target needs 0 < tau < 1, since nothing is reused at 0")
    r = router().detach().cpu()  # (T, N)
    best, spent, error = target.land(r, r > tau), 0, float("nan")
    count, generator = -(-NOISES // batch_size), torch.Generator().manual_seed(SEED)
    budget = ROUNDS * count * _one(denoiser) if budget is None else budget
    count = max(count, budget // (ROUNDS * _one(denoiser)))
    if budget > 0:
        batches = [own(denoiser.draw(batch_size, generator), batch_size) for _ in range(count)]
        quiet = None if progress and rank() == 0 else True
        with tqdm(total=budget, unit="prediction", desc="refine", disable=quiet) as bar:
            for found in refine(denoiser, [best], batches, target, budget=budget):
                bar.set_postfix(image_error=f"{found.error:.2e}", refresh=False)
                bar.update(found.spent - spent)
                best, spent, error = found.table, found.spent, found.error
    _adopt(router, best, tau)
    router.about["provenance"] |= {"refined_for": spent, "target_speedup": target.speedup}
    if spent:
        router.about["provenance"] |= {"image_error": error}


@torch.no_grad()
def _adopt(router: Router, table: Tensor, tau: float) -> None:
    """Set the scores whose decision at τ is not the table's just beyond τ."""
    for row, wanted in zip(router.rows, table[1:].to(router.rows[0].device), strict=True):
        wrong = (torch.sigmoid(row) > tau) != wanted
        row[wrong] = torch.where(wanted, level(tau) + MARGIN, level(tau) - MARGIN).to(row)[wrong]


def _one(denoiser: Denoiser) -> int:
    """Return the predictions of one round: all flips of a table, and a walk to check what they say."""
    return denoiser.steps + predictions_of_all(denoiser)


class _Judge:
    """Walks on the noises of one search, and counts them."""

    def __init__(self, denoiser: Denoiser, batches: Sequence[Batch], target: Target) -> None:
        self.denoiser, self.batches, self.target = denoiser, batches, target
        self.plain = [sample(denoiser, x, cond) for x, cond in batches]
        self.spent = len(batches) * denoiser.steps

    def paths(self) -> list[list[int]]:
        """Return the cheapest paths with as many whole steps as the target allows, and with one more."""
        steps = self.denoiser.steps
        costs = sum(step_costs(self.denoiser, x, cond) for x, cond in self.batches) / len(self.batches)
        costs = mean_over_ranks(torch.as_tensor(costs))
        self.spent += len(self.batches) * (2 * steps + steps * (steps - 1) // 2)
        most = int(self.target.allowed / float(self.target.cost.sites.sum()))
        counts = [n for n in (most, most + 1) if 1 <= n <= steps]
        return [list(cheapest_path(costs, n)) for n in counts]

    def moved(self, path: list[int], budget: int) -> list[int]:
        """Move one refresh at a time to where it helps most; its cost as a step of a path is not all that it does.

        Ends where no move helps, or another pass over all of them is not within the budget.
        """
        steps, best = self.denoiser.steps, None
        while True:
            free = [k for k in range(steps) if k not in path]
            moves = [sorted({*path, into} - {out}) for out in path[1:] for into in free]  # step 0 stays
            if not moves or self.spent + (1 + len(moves)) * len(self.batches) * steps > budget:
                return path
            best = self.error(whole_steps(self.denoiser, path)) if best is None else best
            error, there = min((self.error(whole_steps(self.denoiser, move)), move) for move in moves)
            if error >= best:
                return path
            best, path = error, there

    def error(self, table: Tensor) -> float:
        """Return the image error of a table, whether or not it is on target."""
        schedule = Schedule(table, sites=tuple(self.denoiser.sites))
        pairs = zip(self.batches, self.plain, strict=True)
        each = [image_mse(sample(self.denoiser, x, cond, schedule), plain) for (x, cond), plain in pairs]
        self.spent += len(self.batches) * self.denoiser.steps
        return float(mean_over_ranks(torch.tensor(each, dtype=torch.float64).mean()))

    def round(self, table: Tensor) -> Round:
        """Judge a table."""
        on_target = self.target.spent(table) <= self.target.allowed
        return Round(table, self.error(table), on_target, self.spent)

    def fits(self, budget: int) -> bool:
        """Return whether another quadratic, and a walk to check it, is within the budget."""
        return self.spent + len(self.batches) * _one(self.denoiser) <= budget

    def improve(self, start: Round) -> Round | None:
        """Flip what the quadratic around a table says; None where it finds nothing better."""
        model, most = self._quadratic(start.table), FLIPS
        while most:
            table = choose(model, start.table, self.target, most=most)
            flips = int((table != start.table).sum())
            if flips == 0:
                return None
            after = self.round(table)
            if after.error < start.error or not start.on_target:
                return after
            most = min(most, flips) // 2
        return None

    def _quadratic(self, table: Tensor) -> Quadratic:
        """Measure h and G around a table, mean over noises and processes."""
        gradient, curvature = torch.zeros(0), torch.zeros(0)
        for (x, cond), plain in zip(self.batches, self.plain, strict=True):
            image, moved = self._flipped(x, cond, table)  # (B, C, H, W), (E, B·C·H·W)
            away = (image - plain).flatten().to(moved)
            h, big = (moved @ away / len(away)).double().cpu(), (moved @ moved.T / len(away)).double().cpu()
            gradient, curvature = (h, big) if not len(gradient) else (gradient + h, curvature + big)
        share = 1 / len(self.batches)
        mean = [mean_over_ranks(value * share) for value in (gradient, curvature)]
        return Quadratic(*mean)

    def _flipped(self, x: Tensor, cond: Any, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image under a table, and v_e of all its flips, (E, B·C·H·W)."""
        steps, width = table.shape
        start: Fork = (x, {}, {})
        forks = [start, *onward(self.denoiser, cond, table, start, 0)]  # T + 1; forks[k] stands before step k
        image, moved = forks[-1][0], []
        for k in range(1, steps):
            for i in range(width):
                moved.append((turned_over(self.denoiser, cond, table, k, i, forks[k]) - image).flatten())
        self.spent += predictions_of_all(self.denoiser)
        return image, torch.stack(moved)


def choose(model: Quadratic, table: Tensor, target: Target, *, most: int) -> Tensor:
    """Return the table (T, N) that the quadratic likes best: on target, at most `most` flips away; greedy with pairs.

    A table that is too slow is first made fast enough, by the flips that cost least error for what they save. Then the
    flip, or pair of flips, that lowers the error most is taken until none does. The diagonal of G counts half as much
    again: the larger a single flip's effect, the less of it is linear.
    """
    compute = table[1:].flatten()  # (E,)
    price = target.cost.sites.expand(table[1:].shape).flatten()  # (E,)
    delta = torch.where(compute, -price, price)  # what a flip adds to the cost
    room = target.allowed - target.spent(table)
    gradient, twice = model.gradient.clone(), model.curvature
    own = 1.5 * twice.diagonal()
    z = torch.zeros(len(compute), dtype=torch.bool)
    never = torch.tensor(torch.inf, dtype=torch.float64)
    while True:
        sign = torch.where(z, -1.0, 1.0).double()  # a chosen flip may be taken back
        adds, gain = sign * delta, sign * (2 * gradient - 2 * z * twice.diagonal()) + own * sign
        count = int(z.sum()) + torch.where(z, -1, 1)
        if room < 0:
            e = int(torch.where(adds < 0, gain / adds.abs(), never).argmin())
            flips, change = [e], -1.0
        else:
            single = torch.where((adds <= room) & (count <= most), gain, never)
            both = gain[:, None] + gain + 2 * twice * sign[:, None] * sign  # (E, E)
            few = count[:, None] + count - int(z.sum()) <= most
            both = torch.where((adds[:, None] + adds <= room) & few, both, never).fill_diagonal_(torch.inf)
            e, pair = int(single.argmin()), int(both.argmin())
            alone = float(single[e]) <= float(both.flatten()[pair])
            flips = [e] if alone else [pair // len(z), pair % len(z)]
            change = float(single[e]) if alone else float(both.flatten()[pair])
        if change >= -1e-15:
            break
        for e in flips:
            gradient += twice[e] * float(sign[e])
            room -= float(adds[e])
            z[e] = ~z[e]
    chosen = table.clone()
    chosen[1:] ^= z.view(len(table) - 1, -1)
    return chosen
