"""IEPO, the image-error-proxy-guided objective (paper, L_IEPO): λ, and the loss that it weighs.

The loss of a step sees only the output of that step. λ⁽ᵏ⁾ says what reuse there does to the image:

    x₀        image made under the router r, outputs mixed by `blend`           (B, C, H, W)
    x₀⁽ᵏ⁾     the same, except that step k computes everything                  (B, C, H, W)
    λ⁽ᵏ⁾      mean (x₀ − x₀⁽ᵏ⁾)²                                                (T,)

The paper has the squared norm, the released code the mean; the authors' β of 7e-8 is for the mean.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from harmonica.cache import Cache, Gate, blend
from harmonica.denoise import Denoiser, denoise, final_image
from harmonica.values import number, of_type, require

Proxy = Literal["leave-one-out", "telescoping"]
"""The paper's λ, and the released code's."""


def image_error(  # noqa: D417 (some arguments are described together)
    denoiser: Denoiser, r: Tensor, x: Tensor, cond: Any, *,
    tau: float = 0.1, mode: Proxy = "leave-one-out",
) -> Tensor:  # fmt: skip
    """Return λ (T,), the paper's image error proxy: what reuse at a step does to the final image,
    which is another thing than the error of an image to its target (`references.image_mse`).

    leave-one-out   mean (x₀ − x₀⁽ᵏ⁾)²: the image under r against the one without reuse at k alone.
    telescoping     mean (y⁽ᵏ⁾ − y⁽ᵏ⁻¹⁾)²: y⁽ᵏ⁾ follows r up to step k and then computes everything.

    Walks that differ only from step k on share their first k steps, so the walk under r is forked
    before each k ≥ 1. That costs T + (T−1) + … + 1 = T(T+1)/2 predictions; separate walks cost T².

    Args:
        denoiser, r: frozen model; (T, N) scores on the device of x, row 0 all ones; no gradient.
        x, cond: (B, C, H, W) pure noise, and conditions for the batch.
        tau, mode: τ of the blend, and which of the two definitions.

    λ is in squared units of x, and zero for a step that reuses nothing, hence for k = 0.
    """
    T, N, alone = denoiser.steps, len(denoiser.sites), mode == "leave-one-out"
    require(alone or mode == "telescoping", f"λ is {mode!r}; {' or '.join(get_args(Proxy))}?")
    shape, tau = of_type("r", r, Tensor, "router() gives one").shape, number("tau", tau, 0, 1)
    require(shape == (T, N), f"r is {(*shape,)}; the denoiser has {T} steps × {N} sites")
    r, cache, memory = r.detach(), Cache(), dict[str, Any]()
    images: list[Tensor] = []  # [k−1]: of the walk that leaves the main one before step k
    main = denoise(denoiser, x, cond, blends(r, cache, tau), memory=memory)
    for k, x_k in enumerate(main, start=1):
        if k < T:
            scores = r.clone()
            scores[k : k + 1 if alone else T] = 1.0
            gates, copy = blends(scores, cache.copy(), tau), memory.copy()
            images.append(final_image(denoise(denoiser, x_k, cond, gates, start=k, memory=copy)))
    others = [x_k] * len(images) if alone else [*images, x_k][1:]  # x_k: the main walk's image
    errors = [mse(other, image) for other, image in zip(others, images, strict=True)]
    return torch.stack([torch.zeros((), device=x.device), *errors])


def blends(r: Tensor, cache: Cache, tau: float) -> Callable[[int], Gate]:
    """Return k -> the gate of step k under scores r (T, N), for `denoise`."""
    return lambda k: blend(r[k], cache, tau)


def mse(out: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference, (), in float32 or wider: half would make 1e-12 zero."""
    fit, wide = out.shape == target.shape, torch.promote_types(out.dtype, torch.float32)
    require(fit, f"out is {tuple(out.shape)} and target {tuple(target.shape)}; expected one shape")
    return F.mse_loss(out.to(wide), target.to(wide))


def objective(  # noqa: D417
    out: Tensor, target: Tensor, r: Tensor, lam: Tensor | float, beta: Tensor | float
) -> Tensor:
    """Return λ·MSE(out, target) + β·Σᵢ rᵢ, the loss of a step (paper, L_IEPO; λ = 1 is SDT alone).

    Args:
        out, target: predictions with and without reuse, of one shape; target has no gradient.
        r, lam: (N,) scores, and λ⁽ᵏ⁾, of the step.
        beta: β, the price of computing one site, or of each site, (N,).

    >>> out, target, r = torch.ones(2), torch.zeros(2), torch.tensor([0.5, 0.25])
    >>> float(objective(out, target, r, lam=2.0, beta=4.0))
    5.0
    """
    return lam * mse(out, target) + (beta * r).sum()
