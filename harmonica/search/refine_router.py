"""Refine a router: put a trained router on a target speedup, and search from its table.

The router keeps its scores; only those whose decision the search changed are moved, just beyond τ.
This file does not know how the router was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor

from harmonica.denoise import Denoiser
from harmonica.processes import local_part, rank, world
from harmonica.router import Router
from harmonica.search.references import Pool, Toward, factor_of, finer_walk, with_images
from harmonica.search.refine import WALKS_PER_ROUND, JudgedTable, few_of, refine
from harmonica.search.target import Target, logit

NOISES = 128
"""Noises that tables are judged on, unless the budget is larger than the default."""

ROUNDS = 12
"""Rounds of the search that the default budget is enough for."""

NOISES_SEED = 20_000_003
"""Seed of the noises."""

MARGIN = 0.5
"""Distance from τ, in logits, at which a flipped decision is placed."""


def refine_router(
    denoiser: Denoiser,
    router: Router,
    target: Target,
    *,
    tau: float = 0.1,
    batch_size: int = 32,
    budget: int | None = None,
    order: int = 0,
    toward: Toward = "uncached",
    progress: bool = False,
) -> None:
    """Flip entries of the router's table until it is on target, refine the table, and set the
    scores so that freezing at τ gives it.

    A score whose decision changed is set just beyond τ, the others stay. The noises are drawn from
    a seed of their own, so that resuming a run does not change them.

    Args:
        denoiser: model, sampler, guidance.
        router: changed in place; provenance says what was spent.
        target: the speedup, and the cost it is counted in.
        tau: τ, at which it will be frozen, above 0: at 0 nothing is reused.
        batch_size: noises of all processes that `budget` counts in.
        budget: predictions of batch_size noises; ROUNDS rounds on NOISES noises if None, 0 only
            flips until the table is on target. A budget m times the default uses m times as many
            noises.
        order: how skipped sites are filled, `Schedule.order`; the router will say so.
        toward: what images should be near; a reference costs 10·T predictions a noise beside the
            budget.
        progress: show a bar.
    """
    if not 0.0 < tau < 1.0:
        raise ValueError(f"tau is {tau}; a target needs 0 < tau < 1, since nothing is reused at 0")
    r = router().detach().cpu()  # (T, N)
    best, facts = target.fit_budget(r, r > tau), {"refined_for": 0.0}
    one = ROUNDS * WALKS_PER_ROUND * denoiser.steps  # predictions of a whole search, a noise
    allowed = NOISES * one if budget is None else float(budget * batch_size)
    if allowed > 0:
        noises = world() * max(NOISES, int(allowed / one)) // world()
        for judged in _searched(denoiser, best, target, noises, allowed, order, toward, progress):
            best = judged.table
            facts = {"refined_for": round(judged.spent / batch_size), "image_error": judged.error}
    _adopt(router, best, tau)
    router.about["order"] = order
    before = router.about.get("provenance", {})
    router.about["provenance"] = before | facts | {"target_speedup": target.speedup}
    if toward == "reference":
        router.about["provenance"] |= {"toward": toward}


def _searched(
    denoiser: Denoiser,
    table: Tensor,
    target: Target,
    noises: int,
    budget: float,
    order: int,
    toward: Toward,
    progress: bool,
) -> Iterator[JudgedTable]:
    """Yield the tables of a search on noises of its own, under a bar; `budget` and `spent` are
    predictions of one noise, of all processes.
    """
    from tqdm.auto import tqdm

    generator = torch.Generator().manual_seed(NOISES_SEED)
    finer = finer_walk(denoiser, factor_of(toward))

    def draw(count: int) -> Pool:
        joint = -(-count // world()) * world()
        return with_images(finer, *local_part(denoiser.draw(joint, generator), joint))

    pool, share = draw(noises), few_of(noises)
    if finer is denoiser:
        others = (draw(share) for _ in repeat(None))
    else:  # references are dear: two pools that are used again and again
        pools = [draw(share), draw(share)]
        others = (each for _ in repeat(None) for each in pools)
    quiet = None if progress and rank() == 0 else True
    spent, scale = 0.0, 1.0 / noises
    with tqdm(total=round(budget * scale), unit="prediction", desc="refine", disable=quiet) as bar:
        local = budget / world()
        for judged in refine(denoiser, [table], pool, others, target, budget=local, gate=order):
            bar.set_postfix(error=f"{judged.error:.2e}", refresh=False)
            bar.update(round(judged.spent * world() * scale) - round(spent * scale))
            spent = judged.spent * world()
            yield replace(judged, spent=spent)


@torch.no_grad()
def _adopt(router: Router, table: Tensor, tau: float) -> None:
    """Set the scores whose decision at τ is not the table's just beyond τ."""
    for row, wanted in zip(router.rows, table[1:].to(router.rows[0].device), strict=True):
        wrong = (torch.sigmoid(row) > tau) != wanted
        row[wrong] = torch.where(wanted, logit(tau) + MARGIN, logit(tau) - MARGIN).to(row)[wrong]
