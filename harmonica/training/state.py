"""What a training run is: its settings, and the state that it carries between two trajectories."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from harmonica.denoise import Denoiser
from harmonica.iepo import Proxy
from harmonica.processes import batch_per_rank
from harmonica.router import Router
from harmonica.sdt import Update
from harmonica.search.target import Target
from harmonica.storage.files import decoding
from harmonica.table import require
from harmonica.training.beta import BetaController

Captured = tuple[dict[str, Tensor], dict[str, Any]]
"""A state as tensors and numbers by name."""


@dataclass(frozen=True)
class Settings:
    """What must be the same on resuming a run; each as in `train_sdt`."""

    batch_size: int
    tau: float
    beta: float
    lr: float
    refresh_every: int
    proxy: Proxy | None
    target: Target | None

    def facts(self) -> dict[str, float | str]:
        """Return the settings as strings and numbers, for a file."""
        facts = {**vars(self), "proxy": self.proxy or "none"}
        target = facts.pop("target")
        if target is not None:  # which chooses β
            del facts["beta"]
            facts |= {"target_speedup": target.speedup, "target_cost": target.cost.total}
        return facts


@dataclass
class TrainingState:
    """What is alive between two trajectories; nothing else is."""

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
        """Return copies of everything."""
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
            counted = isinstance(facts[name], int) and 0 <= facts[name] <= 10**12
            require(counted, f"{name} is {facts[name]!r:.40}")
        self.updates, self.trajectory = facts["updates"], facts["trajectory"]
        self.router.about["provenance"]["iterations"] = self.updates
        logits = _tensor(tensors, "state.logits", self.router.logits)
        for k, row in enumerate(self.router.rows):
            row.copy_(logits[k])
            start = f"state.optimizer.{k}."
            if any(name.startswith(start) for name in tensors):
                likes = {"step": torch.zeros(()), "exp_avg": row, "exp_avg_sq": row}  # step: CPU
                moments = {key: _tensor(tensors, start + key, like) for key, like in likes.items()}
                self.optimizer.state[row] = moments
        self.lam.copy_(_tensor(tensors, "state.lam", self.lam))
        if self.controller is not None:
            self.controller.restore(_tensor(tensors, "state.beta", self.controller.state))
        self.generator.set_state(tensors["state.generator"].cpu())


def _tensor(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    value = tensors[name]
    kinds = [f"{tuple(each.shape)} {each.dtype}" for each in (value, like)]
    fit = kinds[0] == kinds[1] and bool(value.isfinite().all())
    require(fit, f"{name} is {kinds[0]}; expected {kinds[1]}, and finite")
    return value.to(like.device, copy=True)


def start(
    denoiser: Denoiser, settings: Settings, generator: torch.Generator | None = None
) -> TrainingState:
    """Return the state of a run that has done nothing yet; seed 0 without a generator.

    Raises TypeError or ValueError if no router can be trained for the denoiser.
    """
    if not isinstance(denoiser, Denoiser):
        name = type(denoiser).__name__
        raise TypeError(f"{name} lacks a member of harmonica.Denoiser; see its docstring")
    batch, target, T = settings.batch_size, settings.target, denoiser.steps
    require(T >= 2, "the denoiser has 1 step, which always computes; nothing can be trained")
    require(batch >= 1, f"found batch_size {batch}; it must be 1 or more")
    batch_per_rank(batch)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    provenance = {"method": "HarmoniCa", "iterations": 0, **settings.facts()}
    with decoding("denoiser.about", "does not describe a schedule"):  # before hours, not after
        about = {**denoiser.about, "provenance": provenance}
        router = Router(T, denoiser.sites, generator=generator, about=about)
    device = denoiser.draw(1, torch.Generator())[0].device
    optimizer = AdamW(router.to(device).parameters(), lr=settings.lr, weight_decay=0.0)
    controller = None if target is None else BetaController(target, settings.tau, device)
    return TrainingState(router, optimizer, torch.ones(T), controller, generator)


def fingerprint(denoiser: Denoiser) -> str:
    """Return a checksum of a few weights: with other weights, training would end elsewhere."""
    sites = list(denoiser.sites.values())
    weights = [p for site in (sites[0], sites[-1]) for p in site.parameters()]
    few = [p.detach().flatten()[:64].float().cpu() for p in weights]
    return f"{zlib.crc32(torch.cat(few).numpy().tobytes()) if few else 0:08x}"
