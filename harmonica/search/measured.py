"""Measured: two published methods that read a table, or its weights, off a few walks.

    invardiff    InvarDiff    entries and steps whose output has nearly stopped to change
    l2p          L²P          one set of weights a step, by least squares on a few walks

Both need no training and no images. This file does not know routers or λ.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from harmonica.cache import Cache, Compute, Feature, Gate, History, gated, reuse, weighted_sum
from harmonica.cost import macs
from harmonica.denoise import Denoiser
from harmonica.router import Schedule
from harmonica.search.baselines import every, fewest_reused, with_provenance

QUANTILES = 200
"""So many quantiles are tried for a target."""


def invardiff(denoiser: Denoiser, x: Tensor, cond: Any, *, speedup: float) -> Schedule:
    """Reuse what has nearly stopped to change (InvarDiff, arXiv 2512.05134).

    The ratio of a site at step k is ‖F_k − F_{k−1}‖₁ / ‖F_{k−1} − F_{k−2}‖₁, and that of a step is
    the same of the model's output. An entry is reused where its ratio is below a quantile of the
    sites' ratios, a whole step where its ratio is below the same quantile of the steps'. The ratios
    are measured again while the first plan is followed, and give the second plan. The first two
    steps and the last one compute. The paper sets a quantile for each kind by hand; here one
    quantile is the lowest with which the plan is fast enough.

    Args:
        denoiser: model, sampler, guidance.
        x: (B, C, H, W) pure noise to measure on.
        cond: conditions for the batch.
        speedup: theoretical, at least.

    Raises ValueError, naming the maximum, if no quantile is that fast.
    """
    table = torch.ones(denoiser.steps, len(denoiser.sites), dtype=torch.bool)
    for _ in range(2):
        plan = partial(_plan, *_ratios(denoiser, table, x, cond))
        n = fewest_reused(plan, QUANTILES, speedup, macs(denoiser))
        table = plan(n)
    return with_provenance(
        denoiser, table, "InvarDiff", {"quantile": n / QUANTILES, "noises": len(x)}
    )


def _plan(sites: Tensor, steps: Tensor, n: int) -> Tensor:
    """Return the table (T, N) that reuses what is below the n-th of QUANTILES quantiles."""
    if n == 0:
        return torch.ones_like(sites, dtype=torch.bool)
    finite = [each[each.isfinite()] for each in (sites, steps)]
    low = [float(each.quantile(n / QUANTILES)) if len(each) else -inf for each in finite]
    return ~((sites <= low[0]) | (steps <= low[1])[:, None])


def _ratios(denoiser: Denoiser, table: Tensor, x: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
    """Return the ratios of sites (T, N) and of steps (T,) along a walk under a table; +inf where
    there is none, hence at the first two steps and the last.

    Sites that the table reuses are computed all the same, to be measured, and not used.
    """
    steps, sites = table.shape
    past: dict[int, Feature] = {}
    changes = torch.zeros(steps, sites + 1, dtype=torch.float64)
    memory: dict[str, Any] = {}
    kept: Cache = {}
    with torch.no_grad():
        for k in range(steps):
            follow = reuse(table[k], kept)

            def gate(site: int, compute: Compute, k: int = k, follow: Gate = follow) -> Feature:
                fresh = compute()
                if site in past:
                    changes[k, site] = _distance(fresh, past[site])
                past[site] = fresh
                return follow(site, lambda: fresh)

            with gated(denoiser.sites, gate):
                out = denoiser.predict(x, k, cond)
            changes[k, sites] = _distance(out, past.get(sites, out))
            past[sites] = out
            x = denoiser.step(x, out, k, memory)
    ratios = torch.full_like(changes, inf)
    ratios[2:-1] = changes[2:-1] / changes[1:-2].clamp_min(1e-300)
    return ratios[:, :sites], ratios[:, sites]


def _distance(new: Feature, old: Feature) -> float:
    """Return ‖new − old‖₁ over all tensors of a feature."""
    pairs = zip(tree_leaves(new), tree_leaves(old), strict=True)
    return sum(float((a - b).abs().double().sum()) for a, b in pairs if isinstance(a, Tensor))


def l2p(
    denoiser: Denoiser,
    x: Tensor,
    cond: Any,
    *,
    speedup: float | None = None,
    schedule: Schedule | None = None,
    history: int = 3,
) -> Schedule:
    """Fit one set of weights a step, so that skipped outputs are near what would be computed (L²P,
    arXiv 2604.26365).

    At a skipped step all sites are computed once at the x of the walk so far. The weights of the
    last `history` outputs that come nearest to them by least squares, summed over sites and noises,
    are what the walk goes on with. So each step is fitted along the walk that will be run.

    Args:
        denoiser: model, sampler, guidance.
        x: (B, C, H, W) pure noise to fit on.
        cond: conditions for the batch.
        speedup: of evenly spread whole steps, as in the paper; or
        schedule: a table of whole steps to fit weights for.
        history: past outputs to combine.

    Raises ValueError unless one of speedup and schedule is given, or if a step of the schedule
    computes some of its sites only.
    """
    if (schedule is None) == (speedup is None) or history < 1:
        raise ValueError(
            f"speedup is {speedup}, schedule {'given' if schedule else 'None'} and history {history}; "
            "give one of the two, and a history of 1 or more"
        )
    schedule = every(denoiser, speedup=speedup) if schedule is None else schedule
    table = schedule.compute
    if bool((table.any(1) != table.all(1)).any()):
        raise ValueError("a step of the schedule computes some of its sites; L²P takes whole steps")
    weights = torch.zeros(*table.shape, 1 + history)
    histories: dict[int, History] = {}
    memory: dict[str, Any] = {}
    with torch.no_grad():
        for k, computes in enumerate(table[:, 0].tolist()):
            fresh: dict[int, Feature] = {}
            with gated(denoiser.sites, partial(_note, fresh)):
                out = denoiser.predict(x, k, cond)
            if computes:
                histories = {i: (f, *histories.get(i, ()))[:history] for i, f in fresh.items()}
                weights[k, :, 0] = 1.0
            else:
                fitted = _least_squares(fresh, histories)
                weights[k, :, 1 : 1 + len(fitted)] = torch.tensor(fitted)
                with gated(denoiser.sites, partial(_combine, histories, fitted)):
                    out = denoiser.predict(x, k, cond)
            x = denoiser.step(x, out, k, memory)
    facts: dict[str, str | float] = {"method": "L²P", "history": history, "noises": len(x)}
    return replace(schedule, weights=weights, provenance={**schedule.provenance, **facts})


def _note(outputs: dict[int, Feature], site: int, compute: Compute) -> Feature:
    outputs[site] = compute()
    return outputs[site]


def _combine(
    histories: dict[int, History], weights: list[float], site: int, compute: Compute
) -> Feature:
    return weighted_sum(weights, histories[site])


def _least_squares(fresh: dict[int, Feature], histories: dict[int, History]) -> list[float]:
    """Return the weights w that minimise Σ over sites of ‖fresh − Σⱼ wⱼ·hⱼ‖²."""
    count = len(histories[0])
    gram, right = torch.zeros(count, count).double(), torch.zeros(count).double()
    for site, target in fresh.items():
        rows = torch.stack([_flat(feature) for feature in histories[site]])  # (m, elements)
        gram += (rows @ rows.T).cpu()
        right += (rows @ _flat(target)).cpu()
    solution: list[float] = torch.linalg.lstsq(gram, right[:, None]).solution[:, 0].tolist()
    return solution


def _flat(feature: Feature) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(feature) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.double().flatten() for leaf in leaves])
