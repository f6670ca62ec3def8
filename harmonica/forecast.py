"""Forecasts, beyond the paper: a skipped site returns a weighted sum of its past outputs.

    output = w₀·fresh + w₁·h₁ + … + w_m·h_m        hⱼ is the j-th last output that the site computed

    weights    (T, N, 1 + m) of each entry of a table; w₀ = 0 where it skips     `Schedule.weights`
    Taylor     weights that continue the past by finite differences               `Schedule.order`

Reuse is w₁ = 1. This file does not know how weights are learned (harmonica.search.learn).
"""

import warnings
from collections.abc import Sequence
from functools import cache
from math import factorial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from harmonica.cache import Cache, Compute, Feature, Gate, never_computed

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
        one_pass = fused and first.is_cuda and _alike(first, *others)
        if one_pass and (fused_sum := _fused_sum(first.device, first.dtype)):
            return fused_sum([w for w, _ in terms], [first, *others])
        total = scale * first
        for (w, _), other in zip(terms[1:], others, strict=True):
            total = total.add_(other, alpha=w) if fused else total + w * other
        return total

    return tree_map(add, *(f for _, f in terms))


@cache
def _fused_sum(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the sum in one pass, or None where Triton is missing or, with a warning, fails."""
    try:
        from harmonica.fused_sum import fused_sum

        fused_sum([1.0] * 4, [torch.zeros(16, device=device, dtype=dtype)] * 4)
    except ImportError:
        return None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, or a card that does not know the dtype
        warnings.warn(f"weighted sums go term by term: Triton fails with {error!r}", stacklevel=2)
        return None
    return fused_sum


def _alike(*tensors: Tensor) -> bool:
    """Tell whether these are what the kernel takes: plain, contiguous, of one shape and dtype."""
    kinds = {(type(t), t.shape, t.dtype, t.device, t.is_contiguous()) for t in tensors}
    first = tensors[0]
    known = first.dtype in (torch.float32, torch.bfloat16, torch.float16)
    plain = type(first) is Tensor and first.is_contiguous() and not torch.is_grad_enabled()
    return len(kinds) == 1 and known and plain


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
