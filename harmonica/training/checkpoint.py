"""Checkpoint: what a training run carries from one trajectory to the next, and its file.

    TrainingState    router, optimizer, λ, β, random generator and two counters; nothing else is
                     alive between two trajectories
    Checkpoint       the file: the router, the state at the start of a trajectory, and what the run
                     was (settings, model), which must be the same on resuming

A run that is stopped in the middle of a trajectory repeats it on resuming, with the same noise, and
so ends in the same router, bit for bit. Of several processes rank 0 alone touches the file. All
start from its state, so a run may be resumed with another number of processes, to rounding.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from harmonica.denoise import Denoiser
from harmonica.memory import is_out_of_memory
from harmonica.processes import from_rank_0, rank
from harmonica.router import Router
from harmonica.sdt import Update
from harmonica.storage.files import StrPath, refused
from harmonica.storage.formats import build, read_router, write_router
from harmonica.training.beta import BetaController

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a row."""

Captured = tuple[dict[str, Tensor], dict[str, int]]


@dataclass
class TrainingState:
    """What is alive between two trajectories."""

    router: Router
    optimizer: AdamW
    lam: Tensor  # λ, (T,)
    controller: BetaController | None  # None where β is fixed
    generator: torch.Generator  # of the noises and conditions
    updates: int = 0
    trajectory: int = 0  # that the next update belongs to

    def count(self, update: Update) -> None:
        """Count one update."""
        self.updates += 1
        self.trajectory = update.trajectory + (update.k == self.router.steps - 1)
        self.router.about["provenance"]["iterations"] = self.updates

    def capture(self) -> Captured:
        """Return copies of everything, as tensors by name and two numbers."""
        tensors = {"state.logits": self.router.logits, "state.lam": self.lam.clone()}
        tensors["state.generator"] = self.generator.get_state()
        if self.controller is not None:
            tensors["state.beta"] = self.controller.state.clone()
        for k, row in enumerate(self.router.rows):
            for name, value in self.optimizer.state.get(row, {}).items():
                tensors[f"state.optimizer.{k}.{name}"] = value.clone()
        return tensors, {"updates": self.updates, "trajectory": self.trajectory}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Set everything to what was captured; raise ValueError or KeyError if it does not fit."""
        for name in ("updates", "trajectory"):
            if not isinstance(facts[name], int) or not 0 <= facts[name] <= 10**12:
                raise ValueError(f"{name} is {facts[name]!r:.40}")
        self.updates, self.trajectory = facts["updates"], facts["trajectory"]
        self.router.about["provenance"]["iterations"] = self.updates
        logits = _tensor(tensors, "state.logits", self.router.logits)
        for k, row in enumerate(self.router.rows):
            row.copy_(logits[k])
            names = {name: f"state.optimizer.{k}.{name}" for name in MOMENTS}
            if any(name in tensors for name in names.values()):
                like = {
                    "step": torch.zeros(())
                }  # AdamW keeps it on the CPU, the others on the device
                self.optimizer.state[row] = {
                    name: _tensor(tensors, key, like.get(name, row)) for name, key in names.items()
                }
        self.lam.copy_(_tensor(tensors, "state.lam", self.lam))
        if self.controller is not None:
            self.controller.restore(_tensor(tensors, "state.beta", self.controller.state))
        self.generator.set_state(tensors["state.generator"].cpu())


def _tensor(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    value = tensors[name]
    if (value.shape, value.dtype) != (like.shape, like.dtype) or not bool(value.isfinite().all()):
        raise ValueError(
            f"{name} is {tuple(value.shape)} {value.dtype}; expected {tuple(like.shape)} "
            f"{like.dtype}, and finite"
        )
    return value.to(like.device, copy=True)


class Checkpoint:
    """The file of a training run; as a context it saves the run on Ctrl-C and on lack of memory.

    Args:
        path: of the file; None for a run that leaves none.
        every: updates from one write to the next.
        facts: what must be the same on resuming, `settings` and `weights`.
    """

    def __init__(self, path: StrPath | None, every: int, facts: dict[str, Any]) -> None:
        self.path, self.every, self.facts = path, every, facts

    def begin(self, state: TrainingState, iterations: int, *, resume: bool) -> None:
        """Set the state that the run starts from, on all processes.

        Raises FileExistsError, FileNotFoundError or ValueError if file and request disagree.
        """

        def first() -> Captured:
            if resume:
                self._restore(state, iterations)
            elif self.path is not None and Path(self.path).exists():
                raise FileExistsError(
                    f"{self.path} exists; resume=True continues it, or choose another name"
                )
            elif self.path is not None and not Path(self.path).absolute().parent.is_dir():
                raise FileNotFoundError(
                    f"{Path(self.path).parent}: no such folder; make it before training"
                )
            tensors, facts = state.capture()
            return {name: value.cpu() for name, value in tensors.items()}, facts

        state.restore(*from_rank_0(first))
        self.router, self.captured, self.written = state.router, state.capture(), state.updates

    def note(self, state: TrainingState) -> None:
        """Note the state between two trajectories, and write it if a write is due."""
        self.captured = state.capture()
        if state.updates - self.written >= self.every:
            self.write()

    def write(self, *, router: Router | None = None) -> None:
        """Write the state noted last, and the router, which may be further."""
        self.written = self.captured[1]["updates"]
        if self.path is not None and rank() == 0:
            tensors, counts = self.captured
            table, facts = router or self.router, {**counts, **self.facts}
            write_router(self.path, table.logits, table.sites, table.about, tensors, facts)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt) and not is_out_of_memory(error):
            return
        tensors, counts = self.captured
        about = dict(self.router.about)
        about["provenance"] = {**about["provenance"], "iterations": counts["updates"]}
        self.write(
            router=Router(
                self.router.steps, self.router.sites, logits=tensors["state.logits"], about=about
            )
        )
        kept = f"{self.path} continues it with resume=True" if self.path else "nothing was saved"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"stopped after {counts['updates']} updates; {kept}") from None

    def _restore(self, state: TrainingState, iterations: int) -> None:
        path = "the checkpoint to resume" if self.path is None else self.path
        fields, tensors, facts = read_router(path)
        router = build(Router, path, fields)
        if not isinstance(facts.get("settings"), dict) or "state.logits" not in tensors:
            raise ValueError(
                f"{path} is a router without the state of its training; it cannot be resumed"
            )
        now = {**_identity(state.router), **_flat(self.facts)}
        then = {**_identity(router), **_flat(facts)}
        changed = [
            f"{key} {then.get(key)!s:.80} -> {value!s:.80}"
            for key, value in now.items()
            if then.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{path} was trained with other settings ({'; '.join(changed):.400}); resume with "
                "the same"
            )
        try:
            done = int(router.about.get("provenance", {}).get("iterations", 0))
            state.restore(tensors, facts)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise refused(
                path, "is a damaged checkpoint", f"{type(error).__name__}: {error}"
            ) from None
        if iterations < done:
            raise ValueError(
                f"{path} has {done} updates already and {iterations} were asked for; ask for more"
            )


def fingerprint(denoiser: Denoiser) -> str:
    """Return a checksum of a few weights: with other weights, training would end elsewhere."""
    sites = list(denoiser.sites.values())
    few = [
        parameter.detach().flatten()[:64].float().cpu()
        for site in (sites[0], sites[-1])
        for parameter in site.parameters()
    ]
    return f"{zlib.crc32(torch.cat(few).numpy().tobytes()) if few else 0:08x}"


def _identity(router: Router) -> dict[str, Any]:
    """Return what a router is for, in a form that survives JSON."""
    about = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in router.about.items()
        if key != "provenance"
    }
    return {"steps": router.steps, "sites": list(router.sites), **about}


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts["settings"], "weights": facts.get("weights")}
