"""Flip effects: what flipping entries of a table does to the image, told by two backward passes
through one walk.

    e       an entry (k, i) with k ≥ 1                                           E = (T−1)·N of them
    z       1 = flipped: reuse where the table computes, or the other way           (E,)
    v_e     ∂image/∂z_e, what flipping e does to the image, sign included           (B, C, H, W)
    d       image(table) − what it should be, a pool's image                        (B, C, H, W)

Near a table, what several entries do adds up as vectors:

    error(z) ≈ mean (d + Σ_e z_e·v_e)² = error + 2·z·h + zᵀGz, h_e = mean d·v_e, G_ef = mean v_e·v_f

So entries that cancel each other are seen, and so is one that moves the image towards its target;
λ and a router's gradient know only the *size* of what each entry does by itself.

How z enters a walk. Whatever its gate, a site gives a sum of the outputs that it computed so far:

    output at step k = Σ_c R[k, c]·(fresh output of step c)       R follows from the table (`reads`)

Flipping an entry e gives another table, with other sums R′. So the walk is run with
R + Σ_e z_e·(R′_e − R). At z = 0 that is the table's own walk; with one z_e at 1 it is exactly the
walk of the table with e flipped; and v_e is its derivative at 0. What a skipped entry would have
computed is computed as well, since other tables read it.

    h      is the gradient of ½·mean (image − target)²: one backward pass, from d
    G      takes one more, from random signs ξ: E[ξξᵀ] = 1, so (ξ·v_e)(ξ·v_f) is v_e·v_f on average
           (Hutchinson 1990)

That costs a few walks, whatever N; flipping each entry would cost N·T(T−1)/2 predictions. A
derivative is close to a flip (docs/log.md), but not where reuse has led a walk to another image
altogether, so such noises are weighed down (`CAP`). This file does not know routers, nor how a
table is searched for.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from harmonica.cache import Cache, Compute, Feature, Gate
from harmonica.denoise import Denoiser
from harmonica.forecast import taylor_weights
from harmonica.memory import in_portions
from harmonica.router import Schedule
from harmonica.run_again import run_again
from harmonica.search.paths import Run, differentiable_walk
from harmonica.search.references import CAP, PORTION, Pool, image_errors, outlier_weights
from harmonica.search.target import Target
from harmonica.table import outputs_before

WALKS = 7  # that `flip_effects_at` costs at most: one, and again and backward (two) from d and ξ


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
    denoiser: Denoiser, schedule: Schedule, pool: Pool, signs: Tensor, portion: int = PORTION,
    run: Run = run_again,
) -> Quadratic:  # fmt: skip
    """Return the quadratic around a schedule's table, mean over a pool's noises, on their device.

    `signs`, (M, C, H, W) of ±1, are ξ of each of the M noises. Noises whose error is far above the
    median count less (CAP). Memory is that of one step's gradient and the features at T steps, for
    `portion` noises at a time, fewer where it runs out; the result is the same to rounding.
    Guidance's halves are taken to follow one another, as in cat([x, x]); under another order h
    stays right and G mixes noises.
    """
    sums, wide = Sums(schedule, pool.x.device), torch.promote_types(pool.x.dtype, torch.float32)

    def dots_of(first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        part = pool[slice(first, last)]
        z = part.x.new_zeros(*sums.entries, last - first, dtype=wide).requires_grad_()
        image = walk_with_flips(denoiser, sums, z, part.x, part.cond, run)
        away = (image - part.images).detach()
        scale = away.square().mean().sqrt().clamp_min(1e-30)  # half precision would lose small ones
        dots: list[Tensor] = []
        for along in (away / scale, signs[first:last].to(away)):
            gradient = torch.autograd.grad(image, z, along, retain_graph=not dots)[0]
            dots.append(gradient.double().flatten(0, 1))
        return dots[0] * scale, dots[1], image_errors(image.detach(), part.images)

    portions = zip(*in_portions(dots_of, len(pool), portion), strict=True)
    away, random, errors = (torch.cat(parts, dim=-1) for parts in portions)  # d·v and ξ·v, (E, M)
    weight = outlier_weights(errors, CAP * float(errors.median())) / pool.x.numel()  # (M,)
    return Quadratic(away @ weight, (random * weight) @ random.T)


def reads(schedule: Schedule) -> Tensor:
    """Return R (T, N, T) float64: at step k, site i gives Σ_c R[k, i, c]·(its output of step c).

    >>> reads(Schedule([[True], [False], [True]], order=0))[:, 0].tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    compute, weights = schedule.compute, schedule.gate_weights
    weights = taylor_weights(compute, 0) if weights is None else weights.double()
    past = outputs_before(compute)  # (T, N)
    age = past[:, :, None] - past.T  # (T, N, T): the output of c < k is the age-th last one
    readable = compute.T & (age > 0) & (age < weights.shape[2])
    read = weights.gather(2, age.clamp(0, weights.shape[2] - 1)) * readable
    return read + torch.diag_embed(weights[:, :, 0].T).transpose(0, 1)


class Sums:
    """The sums R of a schedule, and how much they change when an entry is flipped."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        table, own = schedule.compute, reads(schedule)
        read, changes = own != 0, []
        for e in range(len(table) - 1):  # sites do not mix, so a row's entries are flipped together
            other = table.clone()
            other[1 + e] = ~other[1 + e]
            change = reads(with_table(schedule, other)) - own
            step, site, source = change.nonzero(as_tuple=True)  # few: a site reads step `source`
            read[step, site, source] = True
            by = change[step, site, source]
            changes.append((torch.full_like(step, e), step, site, source, by))
        row, step, site, source, by = map(torch.cat, zip(*changes, strict=True))
        at = [step == k for k in range(len(table))]
        parts = [(row[k], site[k], source[k], by[k]) for k in at]
        self.changes = [[each.to(device) for each in part] for part in parts]  # of each step
        # of each step and site, the steps c whose outputs are read, newest first
        self.read = [[site.nonzero().flatten().flip(0).tolist() for site in row] for row in read]
        self.own, self.table = own.to(device), table.tolist()
        self.entries = len(table) - 1, table.shape[1]

    def at(self, k: int, z: Tensor) -> Tensor:
        """Return the weights of each site's outputs at step k, (N, T, B), for z (T−1, N, B)."""
        row, site, source, by = self.changes[k]
        own = self.own[k, :, :, None].to(z).repeat(1, 1, z.shape[2])
        return own.index_put((site, source), by[:, None].to(z) * z[row, site], accumulate=True)


def walk_with_flips(
    denoiser: Denoiser, sums: Sums, z: Tensor, x: Tensor, cond: Any, run: Run = run_again
) -> Tensor:
    """Return the image (B, C, H, W) of a walk in which each entry of each noise is flipped by z,
    (T−1, N, B): the table's own image at 0, and differentiable there.
    """

    def gate_of(k: int, z: Tensor, outputs: Cache) -> Gate:  # of each site, one output a step
        weights = sums.at(k, z)

        def gate(site: int, compute: Compute) -> Feature:
            with torch.set_grad_enabled(torch.is_grad_enabled() and sums.table[k][site]):
                own = (*outputs.get(site, ()), compute())  # at z = 0 no skipped one is read
            outputs[site] = own
            read = sums.read[k][site]
            # a list as an index would be copied to the device, for each site
            return _sum(torch.stack([weights[site, c] for c in read]), [own[c] for c in read])

        return gate

    return differentiable_walk(denoiser, x, cond, [z] * denoiser.steps, gate_of, run)


def _sum(weights: Tensor, features: list[Feature]) -> Feature:
    """Return Σ_c w_c·f_c with weights (C, B) for each noise; what is no tensor is the first's."""

    def add(*leaves: Any) -> Any:
        if not isinstance(leaves[0], Tensor):
            return leaves[0]  # attention may return (output, None)
        twice = len(leaves[0]) // weights.shape[1]  # guidance has each noise twice
        shape = (len(leaves), -1, *[1] * (leaves[0].dim() - 1))
        scales = weights.repeat(1, twice).to(leaves[0]).view(shape)
        terms = [w * f for w, f in zip(scales, leaves, strict=True)]
        return sum(terms[1:], terms[0])

    return tree_map(add, *features)


def with_table(schedule: Schedule, table: Tensor) -> Schedule:
    """Return a schedule with another table (T, N).

    Without learned weights its order goes on to fill the gaps. Learned weights stay where the
    decision does; a flipped entry gets those of the schedule's order. The weight of an output that
    is not computed any more goes to the oldest one that is.
    """
    if schedule.weights is None:
        return replace(schedule, compute=table)
    learned, new = schedule.weights, taylor_weights(table, schedule.order).float()
    size = max(learned.shape[2], new.shape[2])
    learned, new = (F.pad(each, (0, size - each.shape[2])) for each in (learned, new))
    weights = torch.where((table == schedule.compute)[:, :, None], learned, new)
    known = outputs_before(table)[:, :, None]
    lost = torch.arange(size) > known
    moved = (weights * lost).sum(2, keepdim=True)
    oldest = known.clamp(max=size - 1)
    weights = torch.where(lost, 0.0, weights).scatter_add(2, oldest, moved)
    return replace(schedule, compute=table, weights=weights)


def best_flips(model: Quadratic, table: Tensor, target: Target, *, most: int) -> Tensor:
    """Return the table (T, N) that the quadratic likes best: on target, at most `most` flips away.

    While the table is too slow, the flip is taken that costs least error for what it saves. Then a
    flip, or pair of flips, that lowers the error most is taken until none does. The diagonal of G
    counts half as much again: the larger a single flip's effect, the less of it is linear.
    A quadratic that is not finite, as after an overflow in half precision, proposes no flip.
    """
    if not (model.gradient.isfinite().all() and model.curvature.isfinite().all()):
        return table.clone()
    price = target.cost.sites.expand(table[1:].shape).flatten()  # (E,)
    delta = torch.where(table[1:].flatten(), -price, price)  # what a flip adds to the cost
    room = target.allowed - target.spent(table)
    h, g = model.gradient.clone(), model.curvature  # h at the flips taken so far
    z = torch.zeros(len(price), dtype=torch.bool)
    while True:
        change = torch.where(z, -1, 1)  # a flip that was taken may be taken back
        adds, gain = change * delta, change * (2 * h + (1.5 - 2 * z.double()) * g.diagonal())
        if room < 0:
            flips = {int(torch.where(adds < 0, gain / adds.abs(), torch.inf).argmin())}
        else:
            gains = gain[:, None] + gain + 2 * g * change[:, None] * change  # of pairs, (E, E)
            costs, changes = adds[:, None] + adds, change[:, None] + change
            for both, one in ((gains, gain), (costs, adds), (changes, change)):
                both.diagonal().copy_(one)  # a pair of e and e is e alone
            gains[(costs > room) | (z.sum() + changes > most)] = torch.inf
            best = int(gains.argmin())
            if gains.flatten()[best] >= -1e-15:
                break
            flips = {best // len(z), best % len(z)}
        for e in flips:
            h += g[e] * float(change[e])
            room -= float(adds[e])
            z[e] = ~z[e]
    chosen = table.clone()
    chosen[1:] ^= z.view(len(table) - 1, -1)
    return chosen
