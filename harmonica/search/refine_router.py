"""Refine a router: put a trained router on a target speedup, and search from its table.

The router keeps its scores; only those whose decision the search changed are moved, just beyond τ.
This file does not know how the router was trained.
"""

from collections.abc import Iterator
from itertools import cycle, repeat
from typing import Any

import torch
from torch import Tensor

from harmonica.check import require_denoiser
from harmonica.denoise import Denoiser, check_fit
from harmonica.processes import local_part, progress_bar, world
from harmonica.router import Router
from harmonica.search.references import Pool, with_images
from harmonica.search.refine import WALKS_PER_ROUND, few_of, refine
from harmonica.search.target import Target, logit, require_target
from harmonica.values import number, of_type, require, whole

NOISES = 128  # that tables are judged on, unless the budget is larger than the default
ROUNDS = 12  # of the search that the default budget is enough for
NOISES_SEED = 20_000_003  # of its own, so that resuming a run does not change the noises
MARGIN = 0.5  # distance from τ, in logits, at which a flipped decision is placed


def refine_router(  # noqa: D417 (some arguments share a line)
    denoiser: Denoiser, router: Router, target: Target, *, tau: float = 0.1,
    budget: int | None = None, order: int = 0, finer: Denoiser | None = None,
    progress: bool = False,
) -> None:  # fmt: skip
    """Flip entries of the router's table until it is on target, refine the table, and set the
    scores so that freezing at τ > 0 gives it: one whose decision changed just beyond τ.

    Args:
        router: changed in place; provenance says what was spent, and the table's `typical_error`.
        budget: as in `refine`; enough for ROUNDS rounds on NOISES noises if None. 0 only flips
            entries until the table is on target; m times the default uses m times as many noises.
        order: how skipped sites are filled, `Schedule.order`; the router will say so.
        finer: whose images are to be met, such as a `finer_walk`; the denoiser itself if None.
    """
    require_target(target, denoiser)
    reused = number("tau", tau, 0, 1) > 0
    require(reused, "tau is 0; a search needs more than that, since nothing is reused at 0")
    start = of_type("router", router, Router, "train_sdt gives one").schedule(tau)
    check_fit(start, denoiser)
    usual, finer = default_budget(denoiser.steps), denoiser if finer is None else finer
    budget = whole("budget", usual if budget is None else budget, 0)
    order = whole("order", order, 0, 10)
    require_denoiser(finer)
    facts: dict[str, Any] = {"search_predictions": 0}
    table = target.fit_budget(router().detach().cpu(), start.compute)
    if budget > 0:
        pool, others = _pools(denoiser, max(NOISES, NOISES * budget // usual), finer)
        search = refine(denoiser, [table], pool, others, target, budget=budget, fill=order)
        with progress_bar(progress, total=budget, unit="prediction", desc="refine") as bar:
            for judged in search:
                table, spent = judged.table, round(judged.spent)
                bar.set_postfix(error=f"{judged.error:.2e}", refresh=False)
                bar.update(spent - bar.n)
                facts = {"search_predictions": spent, "typical_error": judged.error}
    _adopt(router, table, tau)
    facts["target_speedup"] = target.speedup
    if finer is not denoiser:
        facts["toward"] = "reference"
    router.about |= {"order": order, "provenance": router.about.get("provenance", {}) | facts}


def default_budget(steps: int) -> int:
    """Return the budget of a search on T steps, unless another is given."""
    return NOISES * ROUNDS * int(WALKS_PER_ROUND * steps)


def _pools(denoiser: Denoiser, noises: int, finer: Denoiser) -> tuple[Pool, Iterator[Pool]]:
    """Return this process's part of a pool of so many noises, and of fresh pools of fewer."""
    generator = torch.Generator().manual_seed(NOISES_SEED)

    def draw(count: int) -> Pool:
        joint = -(-count // world()) * world()
        return with_images(finer, *local_part(denoiser.draw(joint, generator), joint))

    pool, few = draw(noises), few_of(noises)
    if finer is denoiser:
        return pool, (draw(few) for _ in repeat(None))
    return pool, cycle([draw(few), draw(few)])  # references are dear: two pools, again and again


@torch.no_grad()
def _adopt(router: Router, table: Tensor, tau: float) -> None:
    """Set the scores whose decision at τ is not the table's just beyond τ."""
    for row, wanted in zip(router.rows, table[1:].to(router.rows[0].device), strict=True):
        wrong = (torch.sigmoid(row) > tau) != wanted
        row[wrong] = torch.where(wanted, logit(tau) + MARGIN, logit(tau) - MARGIN).to(row)[wrong]
