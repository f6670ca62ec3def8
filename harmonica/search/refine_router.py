"""Refine a router: put a trained router on a target speedup, and search from its table.

The router keeps its scores; only those whose decision the search changed are moved, just beyond τ.
This file does not know how the router was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from harmonica.denoise import Denoiser
from harmonica.processes import local_part, rank, world
from harmonica.router import Router
from harmonica.search.budget import Target, logit
from harmonica.search.references import Pool, Toward, factor_of, finer_walk, with_images
from harmonica.search.refine import ROUND, Round, few_of, refine

NOISES, ROUNDS, SEED = 128, 12, 20_000_003
"""What tables are judged on, unless the budget is larger, what is spent by default, and the seed of
the noises."""

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
    """Put a trained router on its target: fit its table to the budget, refine that, and let the
    scores say so at τ.

    A score whose decision changed is set just beyond τ, the others stay. The noises are drawn from
    a seed of their own, so that resuming a run does not change them.

    Args:
        denoiser: model, sampler, guidance.
        router: changed in place; provenance says what was spent.
        target: the speedup, and the cost it is counted in.
        tau: τ, at which it will be frozen, above 0: at 0 nothing is reused.
        batch_size: noises of all processes that `budget` counts in.
        budget: predictions of batch_size noises; ROUNDS rounds on NOISES noises if None, 0 only
            fits the table. A multiple of that goes into as many times the noises.
        order: how skipped sites are filled, `Schedule.order`; the router will say so.
        toward: what images should be near; a reference costs 10·T predictions a noise beside the
            budget.
        progress: show a bar.
    """
    if not 0.0 < tau < 1.0:
        raise ValueError(f"tau is {tau}; a target needs 0 < tau < 1, since nothing is reused at 0")
    r = router().detach().cpu()  # (T, N)
    best, facts = target.fit_budget(r, r > tau), {"refined_for": 0.0}
    one = ROUNDS * ROUND * denoiser.steps  # predictions of a whole search, a noise
    allowed = NOISES * one if budget is None else float(budget * batch_size)
    if allowed > 0:
        noises = world() * max(NOISES, int(allowed / one)) // world()
        for found in _searched(denoiser, best, target, noises, allowed, order, toward, progress):
            best = found.table
            facts = {"refined_for": round(found.spent / batch_size), "image_error": found.error}
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
) -> Iterator[Round]:
    """Yield the rounds of a search on noises of its own, under a bar."""
    from tqdm.auto import tqdm

    generator = torch.Generator().manual_seed(SEED)
    finer = finer_walk(denoiser, factor_of(toward))

    def draw(count: int) -> Pool:
        joint = -(-count // world()) * world()
        return with_images(finer, *local_part(denoiser.draw(joint, generator), joint))

    judged, share = draw(noises), few_of(noises)
    if finer is denoiser:
        others = (draw(share) for _ in repeat(None))
    else:  # references are dear: two pools that are used again and again
        pools = [draw(share), draw(share)]
        others = (pool for _ in repeat(None) for pool in pools)
    quiet = None if progress and rank() == 0 else True
    spent, scale = 0.0, 1.0 / noises
    with tqdm(total=round(budget * scale), unit="prediction", desc="refine", disable=quiet) as bar:
        for found in refine(
            denoiser, [table], judged, others, target, budget=budget / world(), gate=order
        ):
            bar.set_postfix(error=f"{found.error:.2e}", refresh=False)
            bar.update(round(found.spent * world() * scale) - round(spent * scale))
            spent = found.spent * world()
            yield Round(found.table, found.error, found.on_target, spent)


@torch.no_grad()
def _adopt(router: Router, table: Tensor, tau: float) -> None:
    """Set the scores whose decision at τ is not the table's just beyond τ."""
    for row, wanted in zip(router.rows, table[1:].to(router.rows[0].device), strict=True):
        wrong = (torch.sigmoid(row) > tau) != wanted
        row[wrong] = torch.where(wanted, logit(tau) + MARGIN, logit(tau) - MARGIN).to(row)[wrong]
