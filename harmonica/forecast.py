"""Forecasts, beyond the paper: a skipped site returns a weighted sum of its past outputs.

    output = w₀·fresh + w₁·h₁ + … + w_m·h_m        hⱼ is the j-th last output that the site computed

    weights    (T, N, 1 + m) of each entry of a table; w₀ = 0 where it skips     `Schedule.weights`
    Taylor     weights that continue the past by finite differences               `Schedule.order`

Reuse is w₁ = 1. This file does not know how weights are learned (harmonica.search.learn).
"""

from collections.abc import Sequence
from math import factorial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from harmonica.cache import Cache, Compute, Feature, Gate, never_computed
from harmonica.fused_sum import one_pass

Weights = Sequence[float | Tensor]  # of the outputs of one site
History = tuple[Feature, ...]  # what the cache holds under `weighted`: last outputs, newest first


def weighted(row: Sequence[bool], weights: Sequence[Weights], cache: Cache) -> Gate:
    """Return the gate of a weighted schedule: w₀·fresh + w₁·h₁ + … + w_m·h_m.

    A skipped site never calls `compute`. Where the weights are (1, 0, …) the fresh feature itself
    is returned. `row` (N,) and `weights` (N, 1 + m), w₀ … w_m, are of one step; the walk's cache
    holds the `History` of each site.

    >>> cache = {0: (torch.tensor(8.0), torch.tensor(6.0))}
    >>> weighted([False], [[0.0, 1.5, -0.5]], cache)(0, lambda: "never called")
    tensor(9.)
    """

    def gate(site: int, compute: Compute) -> Feature:
        w, history = weights[site], cache.get(site, ())
        if not row[site]:
            if not history:
                raise never_computed(site, len(row))
            return weighted_sum(w[1:], history)
        outputs = (compute(), *history)
        cache[site] = outputs[: len(w) - 1]
        return weighted_sum(w, outputs)

    return gate


def weighted_sum(weights: Weights, features: History, *, fused: bool = False) -> Feature:
    """Return Σⱼ wⱼ·fⱼ; surplus weights are ignored, what is no tensor comes from the first feature.

    A feature whose weight is the number 0 is left out. If one is left and its weight is 1, it is
    returned itself, without a pass over memory. `fused` is for weights that are numbers: fewer
    passes over memory, which round elsewhere.
    """
    pairs: Any = zip(weights, features, strict=False)
    terms = [(w, f) for w, f in pairs if isinstance(w, Tensor) or w != 0] or [(0.0, features[0])]
    scale, feature = terms[0]
    if len(terms) == 1 and not isinstance(scale, Tensor) and scale == 1:
        return feature

    def add(first: Any, *others: Any) -> Any:
        if not isinstance(first, Tensor):
            return first  # attention may return (output, None)
        scales: Any = [w for w, _ in terms]
        if fused and (total := one_pass(scales, [first, *others])) is not None:
            return total
        total = scale * first
        for (w, _), other in zip(terms[1:], others, strict=True):
            total = total.add_(other, alpha=w) if fused else total + w * other
        return total

    return tree_map(add, *(f for _, f in terms))


def taylor_weights(compute: Tensor, order: int) -> Tensor:
    """Return the weights (T, N, 2 + order) of a table (T, N) bool: (1, 0, …) where it computes, and
    TaylorSeer's forecast where it skips (arXiv 2503.06923).

    The forecast is Σᵢ Dⁱ·(k − k₀)ⁱ / i!. D⁰ is the output at k₀, where the site was last computed,
    and Dⁱ = (Dⁱ⁻¹ now − Dⁱ⁻¹ before) / (steps between the two). Fewer differences are used while
    fewer outputs were computed. Order 0 is reuse.

    >>> taylor_weights(torch.tensor([[True], [True], [False], [False]]), 1)[:, 0].tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, -1.0], [0.0, 3.0, -2.0]]
    """
    N = compute.shape[1]
    known = torch.zeros(N, 1)  # outputs computed so far
    since = torch.zeros(N, 1, dtype=torch.float64)  # k₀
    newest = F.one_hot(torch.zeros(N, dtype=torch.long), 1 + order).double()
    differences = [torch.zeros_like(newest) for _ in range(1 + order)]  # Dⁱ in past outputs, (N, m)
    rows = []
    for k, row in enumerate(compute[:, :, None]):
        powers = [(k - since) ** i / factorial(i) for i in range(1 + order)]
        products = [d * p for d, p in zip(differences, powers, strict=True)]
        rows.append(torch.cat([row.double(), torch.stack(products).sum(0) * ~row], dim=1))
        fresh = [newest]
        for i, before in enumerate(differences[:order]):
            older = F.pad(before[:, :-1], (1, 0))  # the last output becomes the last but one
            slope = (fresh[-1] - older) / (k - since).clamp_min(1.0)
            fresh.append(torch.where(known > i, slope, 0.0))
        differences = [torch.where(row, *pair) for pair in zip(fresh, differences, strict=True)]
        since, known = torch.where(row, float(k), since), known + row
    return torch.stack(rows)
