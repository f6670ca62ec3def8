"""SDT, step-wise denoising training (paper, Algorithm 1).

The student starts from pure noise and takes every sampler step itself, so row k of the router is
trained on the errors that reuse at earlier steps has made. No image is needed.

    teacher    the frozen model without a cache, at the student's x: its output is the target
    student    the same model under `blend`; its output takes the sampler step
    update     one step of AdamW on row k of the router; there are T − 1 in a walk

Users call `harmonica.train_sdt`, which adds checkpoints, a progress bar and targets.
"""

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from harmonica.cache import Cache, blend, gated
from harmonica.denoise import Denoiser, denoise
from harmonica.iepo import Proxy, blends, image_error, mse, objective
from harmonica.router import Router
from harmonica.values import number, of_type, require, whole

BETA = 7e-8  # the authors', for DiT-XL/2 at T = 10
LOGIT_LIMIT = 5.0  # of all logits after each update (released code), so that no score gets stuck
Mean = Callable[[Tensor], Tensor]  # over the processes that train together


@dataclass(frozen=True)
class Update:
    """What one update did, in numbers; loss and mse are means over all processes."""

    walk: int  # its number, from 0
    k: int  # executed step, 1 … T−1: the row that moved
    loss: float  # λ·MSE + β·Σ r, before the update
    mse: float  # of student against teacher, before the update
    lam: float  # λ of step k
    cur: float  # share of the table that is reused at τ, after the update


def sdt(  # noqa: D417 (some arguments share a line)
    denoiser: Denoiser, router: Router, noise: Iterable[tuple[Tensor, Any]], *,
    tau: float = 0.1, beta: float | Tensor = BETA, lr: float = 0.01, refresh_every: int = 25,
    proxy: Proxy | None = "leave-one-out", optimizer: Optimizer | None = None,
    lam: Tensor | None = None, walk: int = 0, mean: Mean = torch.clone,
) -> Generator[Update, None, None]:  # fmt: skip
    """Train `router` in place, and yield what each update did (paper, Algorithm 1).

    Args:
        denoiser, router: frozen model; the scores, on the device of the noise.
        noise: (x_T, cond) of one walk each, as many as the caller likes.
        tau: τ; a blended feature replaces the cached one where its score exceeds τ.
        beta: β, the price of a site, or of each, (N,); may be changed in place meanwhile.
        lr: learning rate of AdamW, without weight decay.
        refresh_every: walks between two λ; the authors' 500 updates are 26 at T = 20, 55 at T = 10.
        proxy: which λ (`image_error`); None measures none: it stays `lam`, or 1 (no IEPO).
        optimizer, lam, walk: to continue an earlier call; λ (T,) is refreshed in place.
        mean: averages a tensor over the processes that train together; one process only copies.

    Raises ValueError if a setting does not fit, FloatingPointError if a loss is not finite.
    """
    lam = torch.ones(denoiser.steps) if lam is None else lam
    _check(denoiser, router, lam, beta)
    tau, lr = number("tau", tau, 0, 1), number("lr", lr, 0)
    whole("refresh_every", refresh_every)
    optimizer = optimizer or AdamW(router.parameters(), lr=lr, weight_decay=0.0)
    for n, (x, cond) in enumerate(noise, start=walk):
        if proxy is not None and n % refresh_every == 0:
            lam.copy_(mean(image_error(denoiser, router(), x, cond, tau=tau, mode=proxy)))
        cache, memory = Cache(), dict[str, Any]()  # filled by step 0, which computes everything
        x = next(denoise(denoiser, x, cond, blends(router(), cache, tau), memory=memory))
        for k, lam_k in enumerate(lam.tolist()[1:], start=1):
            with torch.no_grad():
                target = denoiser.predict(x, k, cond)  # the teacher
            r = router.row(k)  # (N,)
            with gated(denoiser.sites, blend(r, cache, tau)):
                out = denoiser.predict(x, k, cond)  # the student
                losses = objective(out, target, r, lam_k, beta), mse(out.detach(), target)
                means = _update(router, k, optimizer, losses, mean, out.numel() / (lam_k or 1.0))
            yield Update(n, k, *means, lam_k, float((router() <= tau).float().mean()))
            x = denoiser.step(x, out.detach(), k, memory)


def _check(denoiser: Denoiser, router: Router, lam: Tensor, beta: float | Tensor) -> None:
    of_type("router", router, Router, "Router(denoiser.steps, denoiser.sites)")
    ours = f"{router.steps} × {len(router.sites)}"
    theirs = f"{denoiser.steps} × {len(denoiser.sites)}"
    require(ours == theirs, f"the router is {ours} (steps × sites) and the denoiser is {theirs}")
    shape = of_type("lam", lam, Tensor, "torch.ones(router.steps)").shape
    require(shape == (router.steps,), f"lam is {(*shape,)}; expected one λ of {router.steps} steps")
    if isinstance(beta, Tensor):
        fit = beta.shape in ((), (len(router.sites),))
        require(fit, f"beta has shape {(*beta.shape,)}; expected one price, or one for each site")
    else:
        number("beta", beta, 0)


def _update(
    router: Router, k: int, by: Optimizer, losses: tuple[Tensor, Tensor], mean: Mean, scale: float
) -> tuple[float, float]:
    """Move row k down the first of two losses, and return the means of both.

    Other rows have no gradient and keep still, momentum included; all are clamped. The model must
    still be gated: under activation checkpointing, backward runs its blocks again. In half
    precision the gradient λ·2(out − target) / elements could round to zero. So the loss is
    multiplied by a power of two near elements / λ, and the gradient is divided by it.
    """
    loss, error = mean(torch.stack(losses).detach()).tolist()
    if not math.isfinite(loss):  # on all processes
        raise FloatingPointError(f"the loss of step {k} is {loss}; look for NaN in the weights")
    scale, row = 2.0 ** round(math.log2(scale)), router.rows[k - 1]
    gradient = torch.autograd.grad(losses[0] * scale, row)[0] / scale
    by.zero_grad(set_to_none=True)
    row.grad = mean(gradient)
    by.step()
    for each in router.rows:
        each.data.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)
    return loss, error
