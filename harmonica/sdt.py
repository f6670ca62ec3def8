"""SDT, step-wise denoising training (paper, Algorithm 1).

The student starts from pure noise and takes every sampler step itself, so row k of the router is
trained on the errors that reuse at earlier steps has made. No image is needed.

    teacher    the frozen model without a cache, at the student's x: its output is the target
    student    the same model under `blend`; its output takes the sampler step
    update     one step of AdamW on row k of the router; there are T − 1 in a walk

Users call `harmonica.train_sdt`, which adds checkpoints, a progress bar and target speedups.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from harmonica.cache import Cache, blend, gated
from harmonica.denoise import Denoiser, denoise
from harmonica.iepo import Proxy, blends, image_error, mse, objective
from harmonica.processes import mean_over_ranks
from harmonica.router import Router

BETA = 7e-8  # the authors', for DiT-XL/2 at T = 10
LOGIT_LIMIT = 5.0  # of all logits after each update (released code), so that no score gets stuck


@dataclass(frozen=True)
class Update:
    """What one update did, in numbers; loss and mse are means over all processes."""

    trajectory: int  # the paper's word for a walk; from 0
    k: int  # executed step, 1 … T−1: the row that moved
    loss: float  # λ·MSE + β·Σ r, before the update
    mse: float  # of student against teacher, before the update
    lam: float  # λ of step k
    cur: float  # share of the table that is reused at τ, after the update


def sdt(  # noqa: D417 (some arguments share a line)
    denoiser: Denoiser,
    router: Router,
    noise: Iterable[tuple[Tensor, Any]],
    *,
    tau: float = 0.1,
    beta: float | Tensor = BETA,
    lr: float = 0.01,
    refresh_every: int = 25,
    proxy: Proxy | None = "leave-one-out",
    optimizer: Optimizer | None = None,
    lam: Tensor | None = None,
    trajectory: int = 0,
) -> Generator[Update, None, None]:
    """Train `router` in place, and yield what each update did (paper, Algorithm 1).

    Args:
        denoiser, router: frozen model; the table, on the device of the noise.
        noise: (x_T, cond) of one walk each, as many as the caller likes.
        tau: τ; a blended feature replaces the cached one where its score exceeds τ.
        beta: β, the price of computing a site, or of each, (N,); may be changed in place meanwhile.
        lr: learning rate of AdamW, without weight decay.
        refresh_every: walks between two measurements of λ; at T = 20, 25 walks are 475 updates (the
            paper: C = 500).
        proxy: which λ (`image_error`); None is λ = 1, SDT without IEPO.
        optimizer, lam, trajectory: to continue an earlier call; a proxy overwrites λ (T,) in place.

    Raises ValueError if a setting does not fit, FloatingPointError if a loss is not finite.
    """
    _check(denoiser, router, tau, refresh_every)
    optimizer = optimizer or AdamW(router.parameters(), lr=lr, weight_decay=0.0)
    lam = torch.ones(router.steps) if lam is None else lam
    for n, (x, cond) in enumerate(noise, start=trajectory):
        if proxy is not None and n % refresh_every == 0:
            error = image_error(denoiser, router(), x, cond, tau=tau, mode=proxy)
            lam.copy_(mean_over_ranks(error))
        cache: Cache = {}
        memory: dict[str, Any] = {}
        walk = denoise(denoiser, x, cond, blends(router(), cache, tau), memory=memory)
        x = next(walk)  # only step 0, which computes everything and fills the cache
        for k, lam_k in enumerate(lam.tolist()[1:], start=1):
            with torch.no_grad():
                target = denoiser.predict(x, k, cond)  # the teacher
            r = router.row(k)  # (N,)
            with gated(denoiser.sites, blend(r, cache, tau)):
                out = denoiser.predict(x, k, cond)  # the student
                loss = objective(out, target, r, lam_k, beta)
                losses = _means(loss, mse(out.detach(), target), k)
                _update_row(router, k, optimizer, loss, out.numel() / lam_k if lam_k > 0 else 1)
            yield Update(n, k, *losses, lam_k, float((router() <= tau).float().mean()))
            x = denoiser.step(x, out.detach(), k, memory)


def _check(denoiser: Denoiser, router: Router, tau: float, refresh_every: int) -> None:
    ours = f"{router.steps} × {len(router.sites)}"
    theirs = f"{denoiser.steps} × {len(denoiser.sites)}"
    if ours != theirs:
        raise ValueError(f"the router is {ours} (steps × sites) and the denoiser is {theirs}")
    if not 0.0 <= tau < 1.0 or refresh_every < 1:
        message = f"tau is {tau} and refresh_every {refresh_every}"
        raise ValueError(f"{message}; expected 0 ≤ tau < 1 and refresh_every ≥ 1")


def _means(loss: Tensor, error: Tensor, k: int) -> tuple[float, float]:
    """Return both as means over all processes, which all stop where the loss is not finite."""
    mean, mean_error = mean_over_ranks(torch.stack([loss.detach(), error])).tolist()
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss of step {k} is {mean}; look for NaN in the weights")
    return mean, mean_error


def _update_row(router: Router, k: int, optimizer: Optimizer, loss: Tensor, size: float) -> None:
    """Move row k; the others have no gradient and keep still, momentum included. Clamp all rows.

    The model must still be gated: under activation checkpointing, backward runs its blocks again.
    In half precision the gradient λ·2Δ / elements could round to zero. So the loss is multiplied by
    a power of two near `size`, elements / λ, and the gradient is divided by it.
    """
    scale, row = 2.0 ** round(math.log2(size)), router.rows[k - 1]
    gradient = torch.autograd.grad(loss * scale, row)[0] / scale
    optimizer.zero_grad(set_to_none=True)
    row.grad = mean_over_ranks(gradient)
    optimizer.step()
    for each in router.rows:
        each.data.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)
