"""Rivals: tables that the benches compare with, and nothing else uses.

    delta_dit       Δ-DiT          rear blocks early, front blocks late     measures nothing
    greedy          greedy search  entries, by what they do to the image    thousands of predictions
    random_table    chance         entries, drawn
    fewer_steps     no cache       T′ < T steps of the same sampler
    invardiff       InvarDiff      what has nearly stopped changing        two walks
    learning_to_cache   L2C        entries of every second step             trained on images
    l2p             L²P            weights of past outputs, one set a step  one or two predictions a step

Their arguments are those of `harmonica.search.baselines`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

import torch
from smoothcache import block_and_kind, fewest_reused
from torch import Tensor
from torch.optim import AdamW
from torch.utils._pytree import tree_leaves

from harmonica import Schedule, macs
from harmonica.cache import Cache, Compute, Feature, Gate, blend, gated, reuse
from harmonica.denoise import Denoiser
from harmonica.forecast import History, weighted_sum
from harmonica.iepo import objective
from harmonica.samplers import alphas_cumprod
from harmonica.search.baselines import every, named
from harmonica.search.paths import Fork, continue_walk, whole_steps
from harmonica.search.references import image_mse
from harmonica.search.target import Target
from harmonica.values import require

QUANTILES = 200
"""So many quantiles are tried for a target of `invardiff`."""


def delta_dit(denoiser: Denoiser, *, speedup: float) -> Schedule:
    """Reuse rear blocks while the outline forms, front blocks afterwards (Δ-DiT, Chen et al. 2024,
    arXiv 2406.01125).

    It takes the shortest interval, from 2 on, and then the fewest blocks that reach the speedup.
    The paper keeps what those blocks together add to the hidden state (their Δ). Here each of their
    sites keeps its output, still scaled by the step that uses it.
    """
    depth, longer = len({block_and_kind(site)[0] for site in denoiser.sites}), denoiser.steps - 2

    def interval(more: int) -> Tensor:
        return front_and_rear(denoiser, 2 + more, depth)

    n = 2 + fewest_reused(denoiser, interval, max(0, longer), speedup)
    blocks = fewest_reused(denoiser, partial(front_and_rear, denoiser, n), depth, speedup)
    settings = {"interval": n, "blocks": blocks}
    return named(denoiser, front_and_rear(denoiser, n, blocks), "Δ-DiT", settings)


def front_and_rear(denoiser: Denoiser, n: int, blocks: int) -> Tensor:
    """Return the table (T, N) of Δ-DiT: every n-th step computes all; in between the last `blocks`
    blocks are reused in the first half of the walk, the first `blocks` blocks in the second.
    """
    block_of = [block_and_kind(site)[0] for site in denoiser.sites]
    order = list(dict.fromkeys(block_of))
    front, rear = order[:blocks], order[len(order) - blocks :]
    reused = [rear if 2 * k < denoiser.steps else front for k in range(denoiser.steps)]
    rows = [[k % n == 0 or b not in skip for b in block_of] for k, skip in enumerate(reused)]
    return torch.tensor(rows)


def random_table(denoiser: Denoiser, generator: torch.Generator, *, speedup: float) -> Schedule:
    """Reuse entries drawn from all steps but the first, until the speedup is reached."""
    shape = denoiser.steps, len(denoiser.sites)
    r = torch.rand(shape, generator=generator, device=generator.device).cpu()
    r[0] = inf
    return named(denoiser, reuse_lowest(denoiser, r, speedup), "random", {"speedup": speedup})


def reuse_lowest(denoiser: Denoiser, r: Tensor, speedup: float) -> Tensor:
    """Return the table (T, N) that reuses as many of the lowest scores r (T, N) as the speedup
    takes; infinite scores compute.
    """
    order = r.flatten().argsort(stable=True)[: int(r.isfinite().sum())]

    def table(n: int) -> Tensor:
        compute = torch.ones(r.numel(), dtype=torch.bool)
        compute[order[:n]] = False
        return compute.view_as(r)

    return table(fewest_reused(denoiser, table, len(order), speedup))


def fewer_steps(steps: int, speedup: float) -> int:
    """Return the most steps T′ with T / T′ at least the speedup: no cache, a shorter walk, what
    every table must beat. Run it as `load(name, steps=fewer_steps(20, 1.4))`.

    >>> fewer_steps(20, 1.4)
    14
    """
    require(
        1 <= speedup <= steps,
        f"speedup is {speedup}; fewer than {steps} steps are 1 to {steps} times as fast",
    )
    return max(fewer for fewer in range(1, steps + 1) if steps / fewer >= speedup)


# ------------------------------------------------------------------------------- Learning-to-Cache


def learning_to_cache(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor,
    *,
    tau: float = 0.1,
    speedup: float | None = None,
    updates: int = 2000,
    batch_size: int = 32,
    beta: float = 1e-4,
    lr: float = 0.01,
    generator: torch.Generator | None = None,
) -> Schedule:
    """Train scores of every second step on real images (Learning-to-Cache, Ma et al. 2024, arXiv
    2406.01733).

    Steps come in pairs (k, k + 1), k even: k computes, k + 1 may reuse. An update draws a pair, and
    images with one noise at both steps, and lowers ‖ε − ε_router‖² + β·Σᵢ rᵢ by the scores r of
    step k + 1: ε is the plain prediction there, ε_router the one that blends with the features of
    step k. No walk is taken, so what earlier reuse did to x is never seen, and no more than half of
    the steps can reuse.

    `images` (M, C, H, W) are scaled as the model was trained on them, `labels` (M, …) are their
    conditions; the sampler must add noise as √ᾱ·x + √(1−ᾱ)·ε. β is the price of computing one site.
    With a speedup the lowest scores reuse, without one those not above τ. The generator's seed is 0
    if None.
    """
    times = len(denoiser.about.get("timesteps", ()))
    has = f"the denoiser has {denoiser.steps} steps and {times} timesteps"
    rule = "it must have 2 steps or more, and a timestep for each"
    require(times == denoiser.steps >= 2, f"{has}; {rule}")
    r = torch.full((denoiser.steps, len(denoiser.sites)), inf)  # (T, N)
    r[1::2] = 0.0
    if speedup is not None:
        reuse_lowest(denoiser, r, speedup)  # a target out of reach is refused before training
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    logits = torch.randn(r[1::2].shape, generator=generator, device=generator.device)
    rows = [row.to(images.device).requires_grad_() for row in logits.clone().unbind()]
    optimizer = AdamW(rows, lr=lr, weight_decay=0.0)
    pairs = _pairs(denoiser, images, labels, batch_size, generator)
    for _, (k, pair, cond) in zip(range(updates), pairs, strict=False):
        optimizer.zero_grad(set_to_none=True)  # a row without a gradient keeps still
        rows[k // 2].grad = _pair_gradient(denoiser, pair, cond, k, rows[k // 2], beta)
        optimizer.step()
    r[1::2] = torch.stack(rows).detach().sigmoid().cpu()
    table = r > tau if speedup is None else reuse_lowest(denoiser, r, speedup)
    settings = {"updates": updates, "batch_size": batch_size, "beta": beta, "lr": lr}
    settings |= {"tau": tau} if speedup is None else {"speedup": speedup}
    return named(denoiser, table, "Learning-to-Cache", settings)


def _pairs(
    denoiser: Denoiser, images: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """Yield an even step k, images with one noise at k and k + 1, 2 × (B, C, H, W), and labels."""
    levels = alphas_cumprod()[[round(t) for t in denoiser.about["timesteps"]]].tolist()  # ᾱ of each
    here: dict[str, Any] = {"generator": generator, "device": generator.device}
    while True:
        k = 2 * int(torch.randint(len(levels) // 2, (), **here))
        rows = torch.randint(len(images), (size,), **here).to(images.device)
        noise = torch.randn((size, *images.shape[1:]), **here).to(images)
        noisy = [a**0.5 * images[rows] + (1 - a) ** 0.5 * noise for a in levels[k : k + 2]]
        yield k, noisy, labels[rows]


def _pair_gradient(
    denoiser: Denoiser, pair: Sequence[Tensor], cond: Tensor, k: int, logits: Tensor, beta: float
) -> Tensor:
    """Return the gradient (N,) of the loss of step k + 1 by its logits; nothing else gets one."""
    cache, r = Cache(), logits.sigmoid()
    with torch.no_grad():
        with gated(denoiser.sites, reuse([True] * len(denoiser.sites), cache)):
            denoiser.predict(pair[0], k, cond)
        target = denoiser.predict(pair[1], k + 1, cond)
    with gated(denoiser.sites, blend(r, cache, 0.0)):  # any τ: the cache is not read again
        loss = objective(denoiser.predict(pair[1], k + 1, cond), target, r, 1.0, beta)
        return torch.autograd.grad(loss, logits)[0]


# ------------------------------------------------------------------------------------------ greedy


def greedy(
    denoiser: Denoiser, x: Tensor, cond: Any, *, speedup: float, budget: int = 20_000
) -> Schedule:
    """Reuse entry after entry, next the one that adds least image error for what it saves.

    `switches` finds them, within `budget` predictions.
    """
    cost = macs(denoiser)
    Target(speedup, cost, denoiser.steps)  # refuses what is out of reach before anything is spent
    compute, spent = whole_steps(denoiser, range(denoiser.steps)), 0
    search = switches(denoiser, x, cond, prices=cost.sites, budget=budget)
    while Schedule(compute).speedup(cost) < speedup:
        k, i, spent = next(search)
        compute[k, i] = False
    settings = {"budget": budget, "predictions": spent, "noises": len(x)}
    return named(denoiser, compute, "greedy", settings)


def switches(
    denoiser: Denoiser, x: Tensor, cond: Any, *, prices: Tensor, budget: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the entries to reuse, best first: step, site, predictions spent so far.

    The best is the one that adds least to the mean squared error of the final image, for its price.
    Scores are lazy (Minoux 1978): one is renewed only when it comes first, and the entry is taken
    if it then still does. When the budget is spent, the other entries follow in the order of the
    scores that they had.

    Args:
        denoiser: model, sampler, guidance.
        x: (B, C, H, W) pure noise, whose images are judged.
        cond: conditions for the batch.
        prices: (N,) what computing each site costs, in any unit.
        budget: predictions; to score every entry once takes T + N·T(T−1)/2, and less is a
            ValueError.
    """
    steps, sites = denoiser.steps, len(denoiser.sites)
    spent = steps + sites * steps * (steps - 1) // 2
    require(
        budget >= spent, f"budget is {budget} predictions; scoring each entry once takes {spent}"
    )
    table = torch.ones(steps, sites, dtype=torch.bool)
    start: Fork = (x, {}, {})
    forks = [start, *continue_walk(denoiser, cond, table, start, 0)]  # forks[k]: before step k
    plain, error, taken = forks[-1][0], 0.0, 0

    def score(k: int, i: int) -> float:
        flipped = table.clone()
        flipped[k, i] = False
        *_, (image, _, _) = continue_walk(denoiser, cond, flipped, forks[k], k)
        return (image_mse(image, plain) - error) / max(float(prices[i]), 1e-30)  # free comes last

    queue = [(score(k, i), k, i, taken) for k in range(1, steps) for i in range(sites)]
    heapify(queue)
    while queue and spent + steps <= budget:
        _, k, i, scored = heappop(queue)
        spent += steps - k
        if scored < taken:
            heappush(queue, (score(k, i), k, i, taken))
            continue
        table[k, i] = False
        forks[k + 1 :] = continue_walk(denoiser, cond, table, forks[k], k)
        error, taken = image_mse(forks[-1][0], plain), taken + 1
        yield k, i, spent
    yield from ((k, i, spent) for _, k, i, _ in sorted(queue))


# --------------------------------------------------------------------------------------- InvarDiff


def invardiff(denoiser: Denoiser, x: Tensor, cond: Any, *, speedup: float) -> Schedule:
    """Reuse what has nearly stopped changing (InvarDiff, arXiv 2512.05134).

    The ratio of a site at step k is ‖F_k − F_{k−1}‖₁ / ‖F_{k−1} − F_{k−2}‖₁, and that of a step is
    the same of the model's output. An entry is reused where its ratio is below a quantile of the
    sites' ratios, a whole step where its ratio is below the same quantile of the steps'. The ratios
    are measured again while the first plan is followed, and give the second plan. The first two
    steps and the last one compute. The paper sets a quantile for each kind by hand; here one
    quantile is the lowest with which the plan is fast enough.

    Raises ValueError, naming the maximum, if no quantile is that fast.
    """
    table = torch.ones(denoiser.steps, len(denoiser.sites), dtype=torch.bool)
    for _ in range(2):
        plan = partial(_plan, *ratios(denoiser, table, x, cond))
        n = fewest_reused(denoiser, plan, QUANTILES, speedup)
        table = plan(n)
    return named(denoiser, table, "InvarDiff", {"quantile": n / QUANTILES, "noises": len(x)})


def _plan(sites: Tensor, steps: Tensor, n: int) -> Tensor:
    """Return the table (T, N) that reuses what is below the n-th of QUANTILES quantiles."""
    if n == 0:
        return torch.ones_like(sites, dtype=torch.bool)
    finite = [each[each.isfinite()] for each in (sites, steps)]
    low = [float(each.quantile(n / QUANTILES)) if len(each) else -inf for each in finite]
    return ~((sites <= low[0]) | (steps <= low[1])[:, None])


def ratios(denoiser: Denoiser, table: Tensor, x: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
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


# --------------------------------------------------------------------------------------------- L²P


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
    require(
        (schedule is None) != (speedup is None) and history >= 1,
        f"speedup is {speedup}, schedule {'given' if schedule else None} and history {history}; "
        "give one of the two, and a history of 1 or more",
    )
    schedule = every(denoiser, speedup=speedup) if schedule is None else schedule
    table = schedule.compute
    whole = torch.equal(table.any(1), table.all(1))
    require(whole, "a step of the schedule computes some of its sites; L²P takes whole steps")
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
