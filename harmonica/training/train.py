"""train_sdt: what a user calls to train a router."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch

from harmonica.cost import Macs, macs
from harmonica.denoise import Denoiser
from harmonica.iepo import Proxy
from harmonica.memory import is_out_of_memory
from harmonica.processes import local_part, mean_over_ranks, progress_bar, rank, world
from harmonica.router import Router
from harmonica.sdt import BETA, sdt
from harmonica.search.references import Toward, finer_walk
from harmonica.search.refine_router import refine_router
from harmonica.search.target import check_target, target_of
from harmonica.storage.files import exclusive_lock
from harmonica.training.checkpoint import Checkpoint, start
from harmonica.values import LARGEST, StrPath, number, require, whole


@torch.inference_mode(False)  # and gradients on, whatever the caller's are
def train_sdt(  # noqa: D417 (some arguments are described together)
    denoiser: Denoiser, *, iterations: int = 20_000, batch_size: int = 32,
    tau: float = 0.1, beta: float = BETA, lr: float = 0.01, refresh_every: int = 25,
    proxy: Proxy | None = "leave-one-out",
    target_speedup: float | None = None, target_cur: float | None = None, cost: Macs | None = None,
    budget: int | None = None, order: int = 0, toward: Toward = "uncached",
    generator: torch.Generator | None = None, progress: bool = True,
    checkpoint: StrPath | None = None, checkpoint_every: int = 500, resume: bool = False,
) -> Router:  # fmt: skip
    """Train a router from noise alone. With a target, which is beyond the paper, β is chosen, and
    the table searched afterwards. The default β is the authors' for T = 10, where refresh_every
    should be 55.

    Args:
        iterations, batch_size: updates in all; noises in a walk, of all processes together.
        tau, beta, lr, refresh_every, proxy: as in `sdt`; leave beta out with a target.
        target_speedup, target_cur: to end on or just above; a speedup counts `cost`, or MACs.
        budget, order: of the search (`refine_router`); a budget of 0 leaves it out.
        toward: its aim, the image of "uncached" or of the "reference", a walk of ten times T steps.
        generator: draws the router, the noise and the conditions; seed 0 if None.
        checkpoint, checkpoint_every, resume: a file to go on from, bit for bit (`Checkpoint`).

    Raises TypeError or ValueError if an argument does not fit, OSError if `checkpoint` does not.
    """
    target = target_of(denoiser, target_speedup, target_cur, cost)
    settings: dict[str, Any] = {"proxy": proxy, "tau": number("tau", tau, 0, 1)}
    settings |= {"lr": number("lr", lr, 0), "beta": number("beta", beta, 0)}
    settings |= {"batch_size": whole("batch_size", batch_size, 1, LARGEST)}
    settings |= {"refresh_every": whole("refresh_every", refresh_every)}
    require(settings["lr"] > 0, "lr is 0; expected a number above 0")
    price = None if beta == BETA else beta
    check_target(None if target is None else target.speedup, price, order, toward, budget)
    finer = finer_walk(denoiser) if toward == "reference" else denoiser
    state = start(denoiser, settings, target, generator)
    begin = partial(Checkpoint, checkpoint, checkpoint_every, denoiser, state)
    alone = exclusive_lock(checkpoint) if checkpoint is not None and rank() == 0 else nullcontext()
    with alone, begin(iterations, resume=resume) as saved:
        _train(denoiser, saved, iterations, progress)
        if target is not None:
            search = partial(refine_router, denoiser, state.router, target, tau=tau, order=order)
            _refine(partial(search, finer=finer, progress=progress), budget)
            saved.write()
    return state.router


def _train(denoiser: Denoiser, saved: Checkpoint, iterations: int, progress: bool) -> None:
    """Draw, update, steer, show, save, a walk at a time."""
    state = saved.state
    bar = progress_bar(progress, total=iterations, initial=state.updates, unit="update")
    control, router, settings = state.controller, state.router, state.settings
    how: dict[str, Any] = {name: settings[name] for name in ("tau", "refresh_every", "proxy")}
    how["beta"] = settings["beta"] if control is None else control.beta
    how |= {"optimizer": state.optimizer, "lam": state.lam, "mean": mean_over_ranks}
    batch_size, cost = settings["batch_size"], None if bar.disable else macs(denoiser)
    while state.updates < iterations:
        noise = [local_part(denoiser.draw(batch_size, state.generator), batch_size)]
        updates = sdt(denoiser, router, noise, walk=state.walk, **how)
        for update in islice(updates, iterations - state.updates):
            state.count(update)
            if control is not None:
                control.after(router, update)
            bar.update()
        if cost is not None:
            faster = router.schedule(settings["tau"]).speedup(cost)
            bar.set_postfix_str(f"loss {update.loss:.1e}, CUR {update.cur:.0%}, {faster:.2f}x")
        if update.k == denoiser.steps - 1:
            saved.note()
    saved.write()


def _refine(search: Callable[..., None], budget: int | None) -> None:
    """Put the router on target and refine it; without enough memory for that, only put it there."""
    try:
        search(budget=budget)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or world() > 1:
            raise
        search(budget=0)
        what = "the search ran out of memory; the router is on its target without it, and so is its"
        todo = "To search, resume it on a device with more free memory"
        warnings.warn(f"{what} file. {todo}", stacklevel=3)
