"""IEPO, the image-error-proxy-guided objective (paper, L_IEPO): λ, and the loss that it weighs.

What matters is the final image, but a step's loss sees only that step's output. The proxy λ⁽ᵏ⁾ says
what reuse at step k does to the image at the end:

    x₀        image made under the router r                                      (B, C, H, W)
    x₀⁽ᵏ⁾     image made under r with row k all ones: no reuse at k alone        (B, C, H, W)
    λ⁽ᵏ⁾      ‖x₀ − x₀⁽ᵏ⁾‖² / elements                                           (T,)

The paper writes the squared Frobenius norm, the released code the mean; they differ by a constant
that β absorbs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from harmonica.cache import Cache, Gate, blend
from harmonica.denoise import Denoiser, denoise, final_image

Proxy = Literal["leave-one-out", "telescoping"]
"""The paper's λ, and the released code's."""


def image_error(
    denoiser: Denoiser,
    r: Tensor,
    x: Tensor,
    cond: Any,
    *,
    tau: float = 0.1,
    mode: Proxy = "leave-one-out",
) -> Tensor:
    """Return λ, what reuse at each step does to the final image (paper, "image error proxy").

    leave-one-out   λ⁽ᵏ⁾ = mean (x₀ − x₀⁽ᵏ⁾)²: the image under r against the one with reuse disabled at k alone.
    telescoping     λ⁽ᵏ⁾ = mean (y⁽ᵏ⁾ − y⁽ᵏ⁻¹⁾)²: y⁽ᵏ⁾ has rows 0 … k of r and computes afterwards (released code).

    Walks that differ only from step k on share their first k steps: the walk under r is forked
    before each k ≥ 1. That costs T + (T−1) + … + 1 = T(T+1)/2 predictions, where separate walks
    cost T², for the same numbers.

    Args:
        denoiser: model, sampler, guidance.
        r: (T, N) scores, row 0 all ones; no gradient is taken.
        x: (B, C, H, W) pure noise.
        cond: conditions for the batch.
        tau: τ of the blend.
        mode: which definition.

    Returns:
        (T,) non-negative, in squared units of x; zero for a step that reuses nothing, hence for k =
        0.
    """
    if mode not in ("leave-one-out", "telescoping"):
        raise ValueError(
            f"mode is {mode!r}; it must be 'leave-one-out' (the paper) or 'telescoping' (released code)"
        )
    if len(r) != denoiser.steps:
        raise ValueError(
            f"r has {len(r)} rows and the denoiser {denoiser.steps} steps; there is one row for each step"
        )
    r = r.detach()
    cache: Cache = {}
    memory: dict[str, Any] = {}

    def under(table: Tensor, cache: Cache) -> Callable[[int], Gate]:
        return lambda k: blend(table[k], cache, tau)

    forks: list[Tensor] = []  # forks[k−1]: the image of the walk that left the trunk before step k
    for k, x in enumerate(denoise(denoiser, x, cond, under(r, cache), memory=memory), start=1):  # noqa: B020
        if k < denoiser.steps:
            table = r.clone()
            table[k : k + 1 if mode == "leave-one-out" else None] = 1.0
            fork = denoise(
                denoiser, x, cond, under(table, cache.copy()), start=k, memory=memory.copy()
            )
            forks.append(final_image(fork))
    ends = [x] * len(forks) if mode == "leave-one-out" else [*forks, x][1:]
    errors = [F.mse_loss(_wide(end), _wide(fork)) for end, fork in zip(ends, forks, strict=True)]
    return torch.stack([_wide(x).new_zeros(()), *errors])


def objective(
    out: Tensor, target: Tensor, r: Tensor, lam: Tensor | float, beta: float | Tensor
) -> Tensor:
    """Return λ·MSE(out, target) + β·Σᵢ rᵢ, the loss of one step (paper, L_IEPO; λ = 1 is plain
    SDT).

    Args:
        out: prediction with reuse, any shape.
        target: prediction without, the same shape; no gradient.
        r: (N,) the step's scores.
        lam: λ⁽ᵏ⁾ of the step.
        beta: β, price of computing one site, or of each, (N,).

    >>> float(objective(torch.ones(2), torch.zeros(2), torch.tensor([0.5, 0.25]), lam=2.0,
    ...     beta=4.0))
    5.0
    """
    return lam * F.mse_loss(_wide(out), _wide(target)) + (beta * r).sum()


def _wide(x: Tensor) -> Tensor:
    return (
        x.float() if x.element_size() < 4 else x
    )  # λ·MSE reaches 1e-12, which half precision rounds to zero
