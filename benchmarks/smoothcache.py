"""SmoothCache, a rival of the bench: a kind of site is reused while its output has drifted little."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from math import inf, nextafter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from harmonica import Schedule, macs
from harmonica.cache import Compute, Feature, Gate
from harmonica.denoise import Denoiser, denoise, final_image
from harmonica.search.baselines import named
from harmonica.values import require


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
    reused while its drift since it was last computed is below α, for at most `gap` steps. With a
    speedup, α is the smallest measured drift that reaches it.
    """
    given = f"alpha is {alpha} and speedup {speedup}"
    require((alpha is None) != (speedup is None), f"{given}; give one of the two")
    holds, todo = gap >= 1 and (alpha is None or alpha >= 0), "0 (compute all) or more, and 1 step"
    require(holds, f"alpha is {alpha} and gap {gap}; expected {todo} or more")
    drifts = drift(denoiser, x, cond, gap)

    def table(alpha: float) -> Tensor:
        columns = {kind: _reuse_below(rows, alpha) for kind, rows in drifts.items()}
        return torch.tensor([columns[block_and_kind(site)[1]] for site in denoiser.sites]).T

    if alpha is None:
        values = {v for rows in drifts.values() for v in rows.flatten().tolist() if v < inf}
        edges = [0.0, *(nextafter(v, inf) for v in sorted(values))]  # the table changes just after
        most = len(edges) - 1
        alpha = edges[fewest_reused(denoiser, lambda n: table(edges[n]), most, speedup or 1.0)]
    settings = {"alpha": alpha, "gap": gap, "noises": len(x)}
    return named(denoiser, table(alpha), "SmoothCache", settings)


def drift(denoiser: Denoiser, x: Tensor, cond: Any, gap: int = 3) -> dict[str, Tensor]:
    """Return how far each kind of site's output f is from what it was i steps ago: kind -> (T,
    gap), i = 1 … gap.

    ‖f⁽ᵏ⁾ − f⁽ᵏ⁻ⁱ⁾‖₁ / ‖f⁽ᵏ⁾‖₁, mean over samples and sites of the kind; +inf where there is no step
    k − i.
    """
    kinds = [block_and_kind(site)[1] for site in denoiser.sites]
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
    of_kind = {kind: torch.tensor([other == kind for other in kinds]) for kind in set(kinds)}
    return {kind: errors[..., columns].mean(-1) for kind, columns in of_kind.items()}


def _relative_l1(fresh: Feature, old: Feature) -> float:
    """Return ‖fresh − old‖₁ / ‖fresh‖₁ of two features (B, …), or trees of them, mean over B."""
    new, past = ([f.double().flatten(1) for f in tree_leaves(feature)] for feature in (fresh, old))
    distances = [(a - b).abs().sum(1) for a, b in zip(new, past, strict=True)]
    size = torch.stack([a.abs().sum(1) for a in new]).sum(0)  # (B,)
    relative = torch.stack(distances).sum(0) / size.clamp_min(1e-300)  # 0 where both are 0
    return float(relative.mean())


def _reuse_below(drift: Tensor, alpha: float) -> list[bool]:
    """Return the column (T,) of a kind with this drift (T, gap)."""
    column, last = [True], 0
    for k in range(1, len(drift)):
        column.append(k - last > drift.shape[1] or not drift[k, k - last - 1] < alpha)
        last = k if column[k] else last
    return column


def block_and_kind(site: str) -> tuple[str, str]:
    """Return the block and the kind of a site, ("blocks.3", "attn") of "blocks.3.attn"."""
    block, _, kind = site.rpartition(".")
    return block or site, kind


def fewest_reused(
    denoiser: Denoiser, table: Callable[[int], Tensor], most: int, speedup: float
) -> int:
    """Return the least n ≤ most whose table(n) has the speedup; the more n, the more it reuses."""
    cost = macs(denoiser)

    def speed(n: int) -> float:
        return Schedule(table(n)).speedup(cost)

    require(speedup >= 1, f"speedup is {speedup}; it must be 1 (compute all) or more")
    n = bisect_left(range(most + 1), speedup, key=speed)
    maximum = "" if n <= most else f"{speed(most):.4g}"
    require(n <= most, f"speedup is {speedup:g}; the maximum of this method here is {maximum}")
    return n
