"""Baselines: other ways to fill the table, each a function that returns a `Schedule` for the same
engine.

    every                  FORA            whole steps, evenly spread                   measures nothing
    smoothcache            SmoothCache     kinds of site, by how fast outputs drift     one walk
    delta_dit              Δ-DiT           rear blocks early, front blocks late         measures nothing
    learning_to_cache      L2C             entries of every second step, trained        real images
    dynamic_programming    after DPCache   whole steps, the cheapest path               T²/2 predictions that reuse
    greedy                 near-oracle     entries, by what they do to the image        thousands of predictions
    random_table           chance          entries, drawn
    fewer_steps            no cache        T′ < T steps of the same sampler

    denoiser, x, cond    what `denoise` takes; x (B, C, H, W) is pure noise to measure on
    speedup              a target, theoretical (`Schedule.speedup(macs(denoiser))`)

A table lands on its target or just above, as closely as the method's grain allows: whole steps are
coarse, entries are fine. What is out of reach is a ValueError that names the maximum. Every method
here reuses the last computed feature; where its paper does something else besides, the docstring
says so. This file does not know routers or λ.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import inf, nextafter
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils._pytree import tree_leaves

from harmonica.cache import Cache, Compute, Feature, Gate, blend, gated, reuse
from harmonica.cost import Macs, macs
from harmonica.denoise import Denoiser, denoise, final_image
from harmonica.iepo import objective
from harmonica.router import Schedule
from harmonica.samplers import alphas_cumprod
from harmonica.search.paths import cheapest_path, spread, step_costs, switches, whole_steps


def every(denoiser: Denoiser, n: float | None = None, *, speedup: float | None = None) -> Schedule:
    """Compute all sites at every n-th step, reuse all in between (FORA, Selvaraju et al. 2024,
    arXiv 2407.01425).

    The computed steps are ⌈i·n⌉: for a whole n those with k % n == 0, for n = 2.5 steps 0, 3, 5, 8,
    10, … A target makes n = T / (number of steps that may compute).
    """
    asked, steps = _asked("n", n, speedup), denoiser.steps
    if n is not None and not 1 <= n < inf:
        raise ValueError(f"n is {n}; the interval is a number of steps, 1 (compute all) or more")
    interval = Fraction(steps, _computed_steps(denoiser, asked)) if n is None else Fraction(n)
    return with_provenance(
        denoiser,
        whole_steps(denoiser, spread(steps, interval)),
        "FORA",
        {"interval": float(interval)},
    )


def smoothcache(
    denoiser: Denoiser,
    x: Tensor,
    cond: Any,
    *,
    alpha: float | None = None,
    speedup: float | None = None,
    gap: int = 3,
) -> Schedule:
    """Reuse a kind of site while its output has drifted less than α (SmoothCache, Liu et al. 2024,
    arXiv 2411.10510).

    `drift` measures the kinds (attention, feed-forward, …) in one walk without a cache. A kind is
    reused while its drift since it was last computed is below α, for at most `gap` steps; α = 0
    computes everything. For a target, α is found by bisection over the measured values.
    """
    asked = _asked("alpha", alpha, speedup)
    if gap < 1 or (alpha is not None and not alpha >= 0):
        raise ValueError(
            f"found alpha {alpha}, gap {gap}; expected a relative error of 0 or more, a gap of 1 or more"
        )
    drifts = drift(denoiser, x, cond, gap)

    def table(alpha: float) -> Tensor:
        columns = {kind: _reuse_below(rows, alpha) for kind, rows in drifts.items()}
        return torch.tensor([columns[_parts(site)[1]] for site in denoiser.sites]).T  # (T, N)

    if alpha is None:
        values = {v for rows in drifts.values() for v in rows.flatten().tolist() if v < inf}
        edges = [
            0.0,
            *(nextafter(v, inf) for v in sorted(values)),
        ]  # "below": the table changes just after a value
        alpha = edges[
            fewest_reused(lambda n: table(edges[n]), len(edges) - 1, asked, macs(denoiser))
        ]
    return with_provenance(
        denoiser, table(alpha), "SmoothCache", {"alpha": alpha, "gap": gap, "noises": len(x)}
    )


def drift(denoiser: Denoiser, x: Tensor, cond: Any, gap: int = 3) -> dict[str, Tensor]:
    """Return how far each kind of site's output f is from what it was i steps ago: kind -> (T,
    gap), i = 1 … gap.

    ‖f⁽ᵏ⁾ − f⁽ᵏ⁻ⁱ⁾‖₁ / ‖f⁽ᵏ⁾‖₁, mean over samples and sites of the kind; +inf where there is no step
    k − i.
    """
    kinds = [_parts(site)[1] for site in denoiser.sites]
    errors = torch.full((denoiser.steps, gap, len(kinds)), inf, dtype=torch.float64)
    past: dict[int, list[Feature]] = {}  # site → its last outputs, newest first

    def watch(k: int) -> Gate:
        def gate(site: int, compute: Compute) -> Feature:
            fresh, kept = compute(), past.get(site, [])
            for i, old in enumerate(kept):
                errors[k, i, site] = _relative_l1(fresh, old)
            past[site] = [fresh, *kept][:gap]
            return fresh

        return gate

    final_image(denoise(denoiser, x, cond, watch))
    return {
        kind: errors[..., torch.tensor([other == kind for other in kinds])].mean(-1)
        for kind in set(kinds)
    }


def _relative_l1(fresh: Feature, old: Feature) -> float:
    """Return ‖fresh − old‖₁ / ‖fresh‖₁ of two features (B, …), or trees of them, mean over B."""
    new, past = (
        [leaf.double().flatten(1) for leaf in tree_leaves(feature)] for feature in (fresh, old)
    )
    apart = torch.stack([(a - b).abs().sum(1) for a, b in zip(new, past, strict=True)]).sum(
        0
    )  # (B,)
    size = torch.stack([a.abs().sum(1) for a in new]).sum(0)  # (B,)
    return float(
        (apart / size.clamp_min(1e-300)).mean()
    )  # an output that was and is zero has not drifted


def _reuse_below(drift: Tensor, alpha: float) -> list[bool]:
    """Return the column (T,) of a kind with this drift (T, gap)."""
    column, last = [True], 0
    for k in range(1, len(drift)):
        column.append(k - last > drift.shape[1] or not drift[k, k - last - 1] < alpha)
        last = k if column[k] else last
    return column


def delta_dit(
    denoiser: Denoiser,
    *,
    blocks: int | None = None,
    speedup: float | None = None,
    n: int = 2,
    outline: float = 0.5,
) -> Schedule:
    """Reuse rear blocks while the outline forms, front blocks afterwards (Δ-DiT, Chen et al. 2024,
    arXiv 2406.01125).

    Every n-th step computes all. In between, the last `blocks` blocks are reused during `outline`,
    a share of the walk, and the first `blocks` blocks from there on. A target takes the shortest
    interval that can meet it, from n on, and then the fewest blocks. The paper keeps what those
    blocks together add to the hidden state (their Δ). Here each of their sites keeps its output,
    still scaled by the step that uses it.
    """
    asked = _asked("blocks", blocks, speedup)
    depth = len({_parts(site)[0] for site in denoiser.sites})
    if not (n >= 1 and 0 <= outline <= 1 and 0 <= (blocks or 0) <= depth):
        found = f"n {n}, outline {outline}, blocks {blocks}"
        raise ValueError(
            f"found {found}; expected 1 or more, a share from 0 to 1, and from 0 to {depth}"
        )
    if blocks is None:
        cost, shortest = macs(denoiser), n
        longer = max(0, denoiser.steps - shortest)  # beyond T nothing changes
        n += fewest_reused(
            lambda more: _split(denoiser, shortest + more, depth, outline), longer, asked, cost
        )
        blocks = fewest_reused(
            lambda count: _split(denoiser, n, count, outline), depth, asked, cost
        )
    made = {"interval": n, "blocks": blocks, "outline": outline}
    return with_provenance(denoiser, _split(denoiser, n, blocks, outline), "Δ-DiT", made)


def _split(denoiser: Denoiser, n: int, blocks: int, outline: float) -> Tensor:
    """Return the table (T, N) of Δ-DiT."""
    block_of = [_parts(site)[0] for site in denoiser.sites]
    order = list(dict.fromkeys(block_of))
    front, rear = order[:blocks], order[len(order) - blocks :]
    reused = [rear if k < outline * denoiser.steps else front for k in range(denoiser.steps)]
    return torch.tensor(
        [[k % n == 0 or b not in skip for b in block_of] for k, skip in enumerate(reused)]
    )


def _parts(site: str) -> tuple[str, str]:
    """Return the block and the kind of a site: "blocks.3.attn" is in "blocks.3", an "attn"."""
    block, _, kind = site.rpartition(".")
    return block or site, kind


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
    alphas: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Schedule:
    """Train scores of every second step on real images (Learning-to-Cache, Ma et al. 2024, arXiv
    2406.01733).

    Steps come in pairs (k, k + 1), k even: k computes, k + 1 may reuse. An update draws a pair,
    images and noise, and takes the scores r of step k + 1 down ‖ε − ε_router‖² + β·Σᵢ rᵢ: ε is the
    plain prediction at k + 1, ε_router the one that blends with the features of step k. The same
    noise is added to an image at both steps. No walk is taken, so what earlier reuse did to x is
    never seen, and no more than half of the steps can reuse.

    Args:
        denoiser: its sampler adds noise as √ᾱ·x + √(1−ᾱ)·ε, and `about` names the timesteps.
        images: (M, C, H, W) real ones, scaled as the model was trained on them.
        labels: (M, …) their conditions.
        tau: τ, compute where r > τ; with a speedup, entries are reused in the order of their scores
            instead.
        speedup: theoretical, at least.
        updates: in all, of pairs that are drawn.
        batch_size: images in an update.
        beta: β, the price of computing one site.
        lr: of AdamW, without weight decay.
        alphas: (1000,) ᾱ of the model's training; `samplers.alphas_cumprod()` if None.
        generator: draws first scores, pairs, images and noise; seed 0 if None.
    """
    times = denoiser.about.get("timesteps", ())
    if denoiser.steps < 2 or len(times) != denoiser.steps:
        raise ValueError(
            f"found {denoiser.steps} steps, {len(times)} timesteps; pairs need 2 steps, a timestep each"
        )
    levels = (alphas_cumprod() if alphas is None else alphas)[
        [round(t) for t in times]
    ].tolist()  # ᾱ of each step
    r = torch.tensor(
        [[inf if k % 2 == 0 else 0.0] * len(denoiser.sites) for k in range(denoiser.steps)]
    )  # (T, N)
    if speedup is not None:
        _reuse_first(
            denoiser, r, speedup
        )  # refuses what is out of reach before anything is trained
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    logits = torch.randn(
        denoiser.steps // 2, len(denoiser.sites), generator=generator, device=generator.device
    )
    rows = [
        row.to(images.device).requires_grad_() for row in logits.clone().unbind()
    ]  # of steps 1, 3, 5, …
    optimizer = AdamW(rows, lr=lr, weight_decay=0.0)
    for _, (k, pair, cond) in zip(
        range(updates), _pairs(images, labels, levels, batch_size, generator), strict=False
    ):
        optimizer.zero_grad(set_to_none=True)  # a row without a gradient keeps still
        rows[k // 2].grad = _pair_gradient(denoiser, pair, cond, k, rows[k // 2], beta)
        optimizer.step()
    r[1::2] = torch.stack(rows).detach().sigmoid().cpu()
    compute = r > tau if speedup is None else _reuse_first(denoiser, r, speedup)
    made = {"updates": updates, "batch_size": batch_size, "beta": beta, "lr": lr}
    return with_provenance(
        denoiser,
        compute,
        "Learning-to-Cache",
        made | ({"speedup": speedup} if speedup else {"tau": tau}),
    )


def _pairs(
    images: Tensor,
    labels: Tensor,
    levels: Sequence[float],
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """Yield without end: an even step k, images with one noise at k and at k + 1, 2 × (B, C, H, W),
    their labels.
    """
    at = generator.device
    while True:
        k = 2 * int(torch.randint(len(levels) // 2, (), generator=generator, device=at))
        chosen = torch.randint(len(images), (batch_size,), generator=generator, device=at).to(
            images.device
        )
        noise = torch.randn(batch_size, *images.shape[1:], generator=generator, device=at).to(
            images
        )
        yield (
            k,
            [a**0.5 * images[chosen] + (1 - a) ** 0.5 * noise for a in levels[k : k + 2]],
            labels[chosen],
        )


def _pair_gradient(
    denoiser: Denoiser, pair: Sequence[Tensor], cond: Tensor, k: int, logits: Tensor, beta: float
) -> Tensor:
    """Return the gradient (N,) of the loss of step k + 1 by its logits; nothing else gets one."""
    cache: Cache = {}
    with torch.no_grad():
        with gated(denoiser.sites, reuse([True] * len(denoiser.sites), cache)):
            denoiser.predict(pair[0], k, cond)
        target = denoiser.predict(pair[1], k + 1, cond)
    r = logits.sigmoid()
    with gated(
        denoiser.sites, blend(r, cache, 0.0)
    ):  # what τ lets into the cache is not read again
        loss = objective(denoiser.predict(pair[1], k + 1, cond), target, r, 1.0, beta)
        return torch.autograd.grad(loss, logits)[0]


def dynamic_programming(denoiser: Denoiser, x: Tensor, cond: Any, *, speedup: float) -> Schedule:
    """Compute the whole steps that make the cheapest path (the idea of DPCache, Cui et al. 2026,
    arXiv 2602.22654).

    As many steps compute as the speedup allows; `cheapest_path` chooses them by their `step_costs`.
    DPCache predicts skipped features from several computed ones. Here the last is reused, so that a
    step's cost depends on it alone.
    """
    path = cheapest_path(step_costs(denoiser, x, cond), _computed_steps(denoiser, speedup))
    made = {"speedup": speedup, "noises": len(x)}
    return with_provenance(denoiser, whole_steps(denoiser, path), "dynamic programming", made)


def greedy(
    denoiser: Denoiser,
    x: Tensor,
    cond: Any,
    *,
    speedup: float | None = None,
    cur: float | None = None,
    budget: int = 20_000,
    cost: Macs | None = None,
) -> Schedule:
    """Reuse entry after entry, next the one that adds least image error for what it saves: a costly
    near-oracle.

    `search.switches` finds them, within `budget` predictions. Instead of a speedup the target may
    be a CUR; every entry then saves the same. `cost` is what sites cost, `macs(denoiser)` if None.
    """
    asked = _asked("cur", cur, speedup)
    if cur is not None:
        if not 0 <= cur < 1:
            raise ValueError(
                f"cur is {cur}; it is the share of the table to reuse, from 0 to below 1"
            )
        # At equal prices a CUR is a speedup of 1 / (1 − CUR); rounding must not ask for one entry
        # more.
        cost, asked = Macs(torch.ones(len(denoiser.sites)), 0.0), max(1.0, (1 - 1e-12) / (1 - cur))
    cost = macs(denoiser) if cost is None else cost
    _computed_steps(denoiser, asked, cost)  # refuses what is out of reach before anything is spent
    compute, spent = whole_steps(denoiser, range(denoiser.steps)), 0
    search = switches(denoiser, x, cond, prices=cost.sites, budget=budget)
    while Schedule(compute).speedup(cost) < asked:
        k, i, spent = next(search)
        compute[k, i] = False
    return with_provenance(
        denoiser, compute, "greedy", {"budget": budget, "predictions": spent, "noises": len(x)}
    )


def random_table(denoiser: Denoiser, generator: torch.Generator, *, speedup: float) -> Schedule:
    """Reuse entries drawn from all steps but the first, until the speedup is reached."""
    r = torch.rand(
        denoiser.steps, len(denoiser.sites), generator=generator, device=generator.device
    ).cpu()
    r[0] = inf
    return with_provenance(
        denoiser, _reuse_first(denoiser, r, speedup), "random", {"speedup": speedup}
    )


def fewer_steps(steps: int, speedup: float) -> int:
    """Return the most steps T′ with T / T′ at least the speedup: no cache, a shorter walk, what
    every table must beat.

    Run it as another denoiser, `load(name, steps=fewer_steps(20, 1.4))`.

    >>> fewer_steps(20, 1.4)
    14
    """
    if not 1 <= speedup <= steps:
        raise ValueError(
            f"speedup is {speedup}; fewer than {steps} steps are 1 (all of them) to {steps} times as fast"
        )
    return max(fewer for fewer in range(1, steps + 1) if steps / fewer >= speedup)


def _computed_steps(denoiser: Denoiser, speedup: float, cost: Macs | None = None) -> int:
    """Return how many whole steps may compute at a speedup."""
    steps, cost = denoiser.steps, macs(denoiser) if cost is None else cost
    return steps - fewest_reused(
        lambda n: whole_steps(denoiser, range(steps - n)), steps - 1, speedup, cost
    )


def _reuse_first(denoiser: Denoiser, r: Tensor, speedup: float) -> Tensor:
    """Return the table (T, N) that reuses the lowest of the finite scores r (T, N), as many as the
    speedup takes.
    """
    order = r.flatten().argsort(stable=True)[: int(r.isfinite().sum())]

    def table(n: int) -> Tensor:
        compute = torch.ones(r.numel(), dtype=torch.bool)
        compute[order[:n]] = False
        return compute.view_as(r)

    return table(fewest_reused(table, len(order), speedup, macs(denoiser)))


def fewest_reused(table: Callable[[int], Tensor], most: int, speedup: float, cost: Macs) -> int:
    """Return the least n ≤ most whose table(n) has the speedup; the more n, the more it reuses."""

    def speed(n: int) -> float:
        return Schedule(table(n)).speedup(cost)

    if not speedup >= 1:
        raise ValueError(f"speedup is {speedup}; it must be 1 (compute all) or more")
    n = bisect_left(range(most + 1), speedup, key=speed)
    if n > most:
        raise ValueError(
            f"speedup is {speedup:g}; the maximum of this method here is {speed(most):.4g}"
        )
    return n


def _asked(name: str, value: float | None, speedup: float | None) -> float:
    """Return the speedup asked for, or 1 if `value` is given instead; both or neither is a
    ValueError.
    """
    if (value is None) == (speedup is None):
        raise ValueError(f"found {name} {value} and speedup {speedup}; give one of the two")
    return 1.0 if speedup is None else speedup


def with_provenance(
    denoiser: Denoiser, compute: Tensor, method: str, settings: Mapping[str, float]
) -> Schedule:
    """Return a table (T, N) as a schedule for this denoiser that says how it was made."""
    about = {**denoiser.about, "provenance": {"method": method, **settings}}
    return Schedule(compute, sites=tuple(denoiser.sites), **about)
