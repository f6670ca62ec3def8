"""train_sdt: what a user calls to train a router."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch

from harmonica.cost import Macs
from harmonica.denoise import Denoiser
from harmonica.iepo import Proxy
from harmonica.router import Router
from harmonica.sdt import BETA, sdt
from harmonica.search.budget import Steering, target_of
from harmonica.search.refine import reach
from harmonica.storage.files import StrPath
from harmonica.training.checkpoint import Run


def train_sdt(  # noqa: D417 (some arguments are described together)
    denoiser: Denoiser,
    *,
    iterations: int = 20_000,
    batch_size: int = 32,
    tau: float = 0.1,
    beta: float = BETA,
    lr: float = 0.01,
    refresh_every: int = 25,
    proxy: Proxy | None = "leave-one-out",
    target_speedup: float | None = None,
    target_cur: float | None = None,
    cost: Macs | None = None,
    refine: int | None = None,
    order: int = 0,
    generator: torch.Generator | None = None,
    checkpoint: StrPath | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    progress: bool = True,
) -> Router:
    """Train a router for `denoiser` from noise alone, with the authors' settings for DiT-XL/2
    unless told otherwise.

    Without a target this is the paper. With one, β is steered and the table refined, to land on it
    or just above.

    Args:
        denoiser: what `harmonica.models.load` returns, or any `Denoiser`.
        iterations: updates; training stops there, in the middle of a trajectory if need be.
        batch_size: noises in a trajectory, of all processes (the authors' 64 count guidance's
            halves).
        tau, beta, lr, refresh_every, proxy: as in `sdt`; a target steers β, and takes none but the
            default.
        target_speedup, target_cur: theoretical speedup, or share of the table that is reused, to
            land on.
        cost: what the speedup is counted in, `macs(denoiser)` if None.
        refine: predictions of batch_size noises to spend on the hard table
            (`harmonica.search.refine`); None is 12 rounds.
        order: how the refined table fills skipped sites, `Schedule.order`; above 0 it needs a
            target.
        generator: draws the router, the noise and the conditions; seed 0 if None.
        checkpoint: a file to resume from; written every `checkpoint_every` updates, at the end, and
            on Ctrl-C.
        resume: continue from `checkpoint`, to the same router, bit for bit, as one run without
            interruption.
        progress: show a bar.

    Raises TypeError if denoiser is none, ValueError if a setting is out of range or the
    checkpoint's is another, FileExistsError or FileNotFoundError if `resume` and the checkpoint
    disagree, KeyboardInterrupt after Ctrl-C.
    """
    target = target_of(denoiser, target_speedup, target_cur, cost, None if beta == BETA else beta)
    if order and target is None:
        raise ValueError(
            f"order is {order} without a target; the paper's table is trained for reuse, order 0"
        )
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "tau": tau,
        "lr": lr,
        "refresh_every": refresh_every,
    }
    settings |= {"proxy": proxy or "none"} | ({"beta": beta} if target is None else target.settings)
    run = Run(denoiser, settings, iterations, generator, checkpoint, checkpoint_every, resume)
    price = settings["beta"] if target is None else Steering(target, tau, run.steering)
    carried: dict[str, Any] = {
        "optimizer": run.optimizer,
        "lam": run.lam,
        "trajectory": run.trajectory,
    }
    how: dict[str, Any] = {
        "tau": tau,
        "beta": price,
        "refresh_every": refresh_every,
        "proxy": proxy,
        **carried,
    }
    updates = sdt(denoiser, run.router, run.noise(), **how)
    with run, closing(updates):
        for update in run.follow(updates, progress):
            if isinstance(price, Steering):
                price.after(run.router, update)
        if target is not None:
            how = {"batch_size": batch_size, "budget": refine, "order": order, "progress": progress}
            reach(denoiser, run.router, target, tau=tau, **how)
    return run.router
