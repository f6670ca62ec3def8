"""Quadratic: what turning over entries of a table does to the image, told by two backward passes
through one walk.

    e       an entry (k, i) with k ≥ 1                                              E = (T−1)·N of them
    z       1 = turned over: reuse where the table computes, or the other way       (E,)
    v_e     ∂image/∂z_e, what turning e over does to the image, sign included       (B, C, H, W)
    d       image(table) − what it should be, a pool's image                        (B, C, H, W)

Near a table, what several entries do adds up as vectors, so entries that cancel each other are
seen, and so is a refresh that helps the steps after it (λ and a router's gradient know only the
*size* of what each does by itself):

    error(z) ≈ mean (d + Σ_e z_e·v_e)² = error + 2·z·h + zᵀGz,    h_e = mean d·v_e,    G_ef = mean v_e·v_f

To turn one entry over and walk to the end costs T − k predictions, N·T(T−1)/2 for all of them. A
gradient costs a few walks, whatever N: let every site give kept + s·(fresh − kept), with s = 1
where the table computes and 0 where it does not (`kept` is a forecast if the schedule's order says
so). That is the table's own walk, and the derivative along s is v, up to its sign. Then

    h      is the gradient of ½·mean (image − plain)²: one backward pass, from d
    G      takes one more, from random signs ξ: E[ξξᵀ] = 1, so (ξ·v_e)(ξ·v_f) is v_e·v_f on average (Hutchinson 1990)

A flip is not a derivative, but close: with the bundled model h correlates to 0.99 with what flips
do (docs/log.md). It is far from one where reuse has led a walk to another image altogether, so such
noises are weighed down (`CAP`). This file does not know routers, nor how a table is searched for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harmonica.cache import Compute, Feature, History, between, gated, weighted_sum
from harmonica.denoise import Denoiser
from harmonica.router import Schedule
from harmonica.run_again import run_again
from harmonica.search.budget import Target
from harmonica.search.errors import CAP, PORTION, image_errors, in_portions, outlier_weights
from harmonica.search.references import Pool
from harmonica.table import taylor_forecasts

WALKS = 7
"""What `flip_effects_at` costs, in walks: one forward, then one again and a backward pass (worth two) from d
and from ξ."""


@dataclass(frozen=True)
class Quadratic:
    """The model of a table's neighbourhood, over its E entries."""

    gradient: Tensor  # h, (E,) float64
    curvature: Tensor  # G, (E, E) float64

    def __call__(self, z: Tensor) -> float:
        """Return what flipping z (E,), bool, adds to the error."""
        on = z.nonzero().flatten()
        return float(2 * self.gradient[on].sum() + self.curvature[on][:, on].sum())


def flip_effects_at(
    denoiser: Denoiser, schedule: Schedule, pool: Pool, signs: Tensor, *, portion: int = PORTION
) -> Quadratic:
    """Return the quadratic around a schedule's table, mean over a pool's noises, on their device.

    Noises whose error is far above the median count less (CAP). Memory is that of one step's
    gradient and the features at T steps, for `portion` noises at a time. Guidance's halves are
    taken to follow one another, as in cat([x, x]); under another order h stays right and G mixes
    noises.

    Args:
        denoiser: model, sampler, guidance.
        schedule: table, order and weights; weights stay as they are where nothing flips.
        pool: M noises, and the images that they should become.
        signs: (M, C, H, W) of ±1, ξ of each noise.
        portion: noises at a time, fewer where memory runs out; the same result to rounding.
    """
    table, wide = schedule.compute, torch.promote_types(pool.x.dtype, torch.float32)
    flipped = torch.where(table, -1.0, 1.0)[1:].double()[:, :, None]  # ∂s/∂z, (T−1, N, 1)

    def run(first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        part = pool[slice(first, last)]
        s = table.to(part.x.device, wide)[:, :, None].repeat(1, 1, last - first).requires_grad_()
        image = _walk(denoiser, s, part.x, part.cond, schedule)
        away = (image - part.images).detach()
        scale = away.square().mean().sqrt().clamp_min(1e-30)  # half precision would lose small ones
        dots: list[Tensor] = []
        for along in (away / scale, signs[first:last].to(away)):
            gradient = torch.autograd.grad(image, s, along, retain_graph=not dots)[0]
            dots.append((flipped.to(s.device) * gradient[1:].double()).flatten(0, 1))
        return dots[0] * scale, dots[1], image_errors(image.detach(), part.images)

    portions = zip(*in_portions(run, len(pool), portion), strict=True)
    away, random, errors = (torch.cat(parts, dim=-1) for parts in portions)  # d·v and ξ·v, (E, M)
    weight = outlier_weights(errors, CAP * float(errors.median())) / pool.x.numel()  # (M,)
    return Quadratic(away @ weight, (random * weight) @ random.T)


def _walk(denoiser: Denoiser, s: Tensor, x: Tensor, cond: Any, schedule: Schedule) -> Tensor:
    """Return the image (B, C, H, W), differentiable in s (T, N, B).

    Histories are blended as outputs are: s·(what follows a computation) + (1−s)·(what was there).
    Before a site's first m outputs its history is filled up with the oldest.
    """
    computed, skipped = both_weights(schedule)
    past = len(skipped[0][0])
    histories: dict[int, History] = {}
    memory: dict[str, Any] = {}

    def step(
        x: Tensor, k: int, histories: dict[int, History], memory: dict[str, Any]
    ) -> tuple[Tensor, dict[int, History], dict[str, Any]]:
        memory, after = memory.copy(), {}

        def gate(site: int, compute: Compute) -> Feature:
            fresh = compute()
            if site not in histories:
                after[site] = (fresh,) * past
                return weighted_sum(computed[k][site], after[site])
            old, new = histories[site], (fresh, *histories[site])
            reused = weighted_sum(skipped[k][site], old)
            renewed = weighted_sum(computed[k][site], new)
            out = between(reused, renewed, s[k, site])
            first = out if reused is old[0] and renewed is fresh else None  # not the same sum twice
            after[site] = tuple(
                first if j == 0 and first is not None else between(*pair, s[k, site])
                for j, pair in enumerate(zip(old, new, strict=False))
            )
            return out

        with gated(denoiser.sites, gate):
            out = denoiser.predict(x, k, cond)
        return denoiser.step(x, out, k, memory), histories | after, memory

    for k in range(denoiser.steps):  # a step's activations live only while it is differentiated
        x, histories, memory = run_again(step, x, k, histories, memory)
    return x


def both_weights(schedule: Schedule) -> tuple[list[list[list[float]]], list[list[list[float]]]]:
    """Return each entry's weights if it computes, (T, N, 1 + m), and if it skips, (T, N, m).

    The schedule knows one of the two. A skipped entry that is flipped gets (1, 0, …), a computed
    one the forecast of the schedule's order.
    """
    compute = schedule.compute[:, :, None]
    skipped = taylor_forecasts(schedule.compute, schedule.order)
    fresh = torch.zeros(*schedule.compute.shape, 1 + skipped.shape[2], dtype=torch.float64)
    fresh[:, :, 0] = 1.0
    if schedule.gate_weights is None:
        return fresh.tolist(), skipped.tolist()
    mine = schedule.gate_weights.double()
    wider = mine.shape[2] - fresh.shape[2]  # the longer memory of the two
    skipped, fresh = F.pad(skipped, (0, max(wider, 0))), F.pad(fresh, (0, max(wider, 0)))
    mine = F.pad(mine, (0, max(-wider, 0)))
    fresh = torch.where(compute, mine, fresh)
    skipped = torch.where(compute, skipped, mine[:, :, 1:])
    return fresh.tolist(), skipped.tolist()


def with_table(schedule: Schedule, table: Tensor) -> Schedule:
    """Return a schedule with another table (T, N).

    Without learned weights its order goes on to fill the gaps. Learned weights stay where the
    decision does; a flipped entry gets those of `both_weights`. The weight of an output that is not
    computed any more goes to the oldest one that is.
    """
    if schedule.weights is None:
        return replace(schedule, compute=table)
    computed, skipped = (torch.tensor(each) for each in both_weights(schedule))
    weights = torch.where(table[:, :, None], computed, F.pad(skipped, (1, 0)))
    known = (table.cumsum(0) - table.long())[:, :, None]  # outputs computed before each entry
    lost = torch.arange(weights.shape[2]) > known
    moved = (weights * lost).sum(2, keepdim=True)
    weights = torch.where(lost, 0.0, weights)
    oldest = known.clamp(max=weights.shape[2] - 1)
    return replace(schedule, compute=table, weights=weights.scatter_add(2, oldest, moved))


def best_flips(model: Quadratic, table: Tensor, target: Target, *, most: int) -> Tensor:
    """Return the table (T, N) that the quadratic likes best: on target, at most `most` flips away;
    greedy with pairs.

    A table that is too slow is first made fast enough, by the flips that cost least error for what
    they save. Then the flip, or pair of flips, that lowers the error most is taken until none does.
    The diagonal of G counts half as much again: the larger a single flip's effect, the less of it
    is linear.
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
            both = torch.where((adds[:, None] + adds <= room) & few, both, never).fill_diagonal_(
                torch.inf
            )
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
