"""SDT, step-wise denoising training (paper, Algorithm 1).

The table is trained on the trajectory that it will be used on: from pure noise, the student takes
every sampler step, so row k is trained on the errors that reuse at earlier steps has made. No image
is needed.

    teacher    the frozen model, no cache, at the student's x: the target of step k
    student    the same model under `blend`; its output takes the step
    update     one step of AdamW on row k; T − 1 of them in a trajectory

`sdt` is the algorithm, a generator whose caller decides when to stop.
`harmonica.training.train_sdt` is what a user calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from harmonica.cache import Cache, blend, gated
from harmonica.denoise import Denoiser
from harmonica.iepo import Proxy, image_error, objective
from harmonica.processes import mean_over_ranks
from harmonica.router import Router

BETA = 7e-8
"""The authors' β, for DiT-XL/2 at T = 10; the default, and what a caller who names no β has."""

LOGIT_LIMIT = 5.0
"""Logits are clamped to ±5 after each update (released code), so that no score gets stuck at 0 or
1."""


@dataclass(frozen=True)
class Update:
    """What one update did, in numbers."""

    trajectory: int  # from 0
    k: int  # executed step, 1 … T−1: the row that moved
    loss: float  # λ·MSE + β·Σ r, before the update
    mse: float  # of student against teacher
    lam: float  # λ of step k
    cur: float  # of the table at τ, after the update, 0 … 1


def sdt(  # noqa: D417 (some arguments are described together)
    denoiser: Denoiser,
    router: Router,
    noise: Iterable[tuple[Tensor, Any]],
    *,
    tau: float = 0.1,
    beta: float | Callable[[], Tensor] = BETA,
    lr: float = 0.01,
    refresh_every: int = 25,
    proxy: Proxy | None = "leave-one-out",
    optimizer: Optimizer | None = None,
    lam: Tensor | None = None,
    trajectory: int = 0,
) -> Generator[Update, None, None]:
    """Train `router`, one update for each step but the first of every trajectory, yielding each
    (paper, Algorithm 1).

    Args:
        denoiser: frozen model, sampler, guidance.
        router: trained in place; nothing else changes.
        noise: (x_T, cond) of one trajectory each, as many as the caller likes.
        tau: τ; a blended feature replaces the cached one where its score exceeds it.
        beta: β, the price of computing a site, the authors' for DiT-XL/2 at T = 10; or asked for
            all prices, (N,).
        lr: of AdamW, without weight decay.
        refresh_every: trajectories between two λ; at T = 20, 25 are the paper's C = 500 updates.
        proxy: which λ (`image_error`); None is λ = 1, SDT without IEPO.
        optimizer, lam, trajectory: to continue with; lam (T,) is changed in place.

    Raises ValueError if something does not fit or is out of range, FloatingPointError if a loss is
    not finite.
    """
    if (router.steps, len(router.sites)) != (denoiser.steps, len(denoiser.sites)):
        mine, theirs = (
            f"{router.steps} × {len(router.sites)}",
            f"{denoiser.steps} × {len(denoiser.sites)}",
        )
        raise ValueError(
            f"the router is {mine} (steps × sites), the denoiser {theirs}; make one for this denoiser"
        )
    if not 0.0 <= tau < 1.0 or refresh_every < 1:
        raise ValueError(
            f"found tau {tau}, refresh_every {refresh_every}; expected 0 ≤ tau < 1, refresh_every ≥ 1"
        )
    optimizer = (
        AdamW(router.parameters(), lr=lr, weight_decay=0.0) if optimizer is None else optimizer
    )
    lam = torch.ones(router.steps) if lam is None else lam
    for n, (x, cond) in enumerate(noise, start=trajectory):
        if proxy is not None and n % refresh_every == 0:
            lam.copy_(
                mean_over_ranks(image_error(denoiser, router(), x, cond, tau=tau, mode=proxy))
            )
        cache: Cache = {}
        memory: dict[str, Any] = {}
        for k, weight in enumerate(lam.tolist()):
            with torch.no_grad():  # at k = 0 the student is the teacher: everything computes, there is nothing to learn
                target = denoiser.predict(x, k, cond) if k > 0 else None
            r = router.row(k)  # (N,)
            with gated(denoiser.sites, blend(r, cache, tau)), torch.set_grad_enabled(k > 0):
                out = denoiser.predict(x, k, cond)
                if target is not None:
                    loss = objective(out, target, r, weight, beta() if callable(beta) else beta)
                    joint = mean_over_ranks(loss.detach()).item()  # all processes stop, or none
                    if not math.isfinite(joint):
                        raise FloatingPointError(
                            f"the loss of step {k} is {joint}; look for NaN in the weights"
                        )
                    optimizer.zero_grad(
                        set_to_none=True
                    )  # a row without a gradient keeps still, momentum included
                    # Still gated: under activation checkpointing, backward runs the blocks again.
                    # Scaled by a power of two, exact in float32: in half precision the gradient
                    # λ·2Δ/numel vanishes.
                    scale = 2.0 ** round(math.log2(out.numel() / weight)) if weight > 0 else 1.0
                    gradient = torch.autograd.grad(loss * scale, router.rows[k - 1])[0] / scale
                    router.rows[k - 1].grad = mean_over_ranks(gradient)
            if target is not None:
                optimizer.step()
                router.rows[k - 1].data.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)
                mse = mean_over_ranks(objective(out.detach(), target, r.detach(), 1.0, 0.0)).item()
                yield Update(n, k, joint, mse, weight, float((router() <= tau).float().mean()))
            with torch.no_grad():
                x = denoiser.step(x, out.detach(), k, memory)
