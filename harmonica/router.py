"""Router and Schedule: scores while they are learned, and the table of decisions that they become.

    r          scores in (0, 1), 1 = compute, 0 = reuse                                (T, N)
    logits     what is trained, r = σ(logits), rows 1 … T−1                            (T−1, N)
    compute    r > τ, the table that a run follows                                     (T, N) bool
    CUR        cache utilisation ratio, the share of the T×N entries that are reused

Row k is the k-th *executed* step. Row 0 is not trained: a walk begins with nothing to reuse.
This file does not know models, caches or losses; files are in harmonica/storage/.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.table import Macs, default_names, names_of
from harmonica.values import LARGEST, StrPath, number, of_type, require, seeded, whole


@dataclass(frozen=True, eq=False)
class Schedule:
    """A frozen table of decisions, and what it was made for.

    Attributes:
        compute: (T, N) bool, or what such a tensor can be made from; row 0 is all true.
        sites: N site names, in the order of the columns.
        timesteps: T timesteps of the sampler in execution order, empty if unknown.
        model, sampler, guidance: what the table was made for.
        threshold: τ, if a router was frozen.
        order: without weights, how a skipped site is filled: 0 is reuse (the paper), 1 and above
            are TaylorSeer's forecasts (`harmonica.forecast.taylor_weights`).
        weights: (T, N, 1 + m), w₀·fresh + Σⱼ wⱼ·(j-th last computed output), or None; w₀ is 0 where
            the table skips.
        provenance: how the table was made, for people; strings and numbers.

    Raises ValueError if these do not fit each other.

    >>> print(Schedule([[True, True], [False, True]], sites=("attn", "mlp")))
    2 steps × 2 sites, CUR 25.0 % (# computes, . reuses; steps run left to right)
    attn  #.
    mlp   ##
    """

    compute: Tensor
    sites: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()
    model: str = ""
    sampler: str = ""
    guidance: float | None = None
    threshold: float | None = None
    order: int = 0
    weights: Tensor | None = None
    provenance: Mapping[str, str | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from harmonica.schedule_fields import checked_fields

        for name, value in checked_fields(vars(self)).items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._plain() == other._plain()

    def _plain(self) -> list[Any]:
        values = (getattr(self, field.name) for field in fields(self))
        return [value.tolist() if isinstance(value, Tensor) else value for value in values]

    @property
    def steps(self) -> int:
        """T."""
        return len(self.compute)

    @property
    def cur(self) -> float:
        """Cache utilisation ratio, 0 … 1: the share of the table that is reused (paper, "CUR")."""
        return int((~self.compute).sum()) / self.compute.numel()

    @cached_property
    def gate_weights(self) -> Tensor | None:
        """(T, N, 1 + m) weights of the gates: learned, or Taylor's of `order`; None is reuse."""
        if self.weights is not None or self.order == 0:
            return self.weights
        from harmonica.forecast import taylor_weights

        return taylor_weights(self.compute, self.order)

    def speedup(self, macs: Macs) -> float:
        """Return the theoretical speedup: MACs of a full walk over those that still run."""
        priced, width = len(macs.sites), len(self.sites)
        require(priced == width, f"macs counts {priced} sites and the schedule has {width}")
        run = float((self.compute * macs.sites).sum()) + self.steps * macs.rest
        return self.steps * macs.total / run

    def resample(self, steps: int) -> Schedule:
        """Stretch the table to other steps, without learned weights; warns: it is untrained."""
        steps = whole("steps", steps, 1, LARGEST)
        if steps == self.steps:
            return self
        what = f"a schedule for {self.steps} steps was stretched to {steps}, not trained there"
        warnings.warn(what + "; weights are left out" * (self.weights is not None), stacklevel=2)
        # each row comes from the same relative place of the walk
        rows = [round(k * (self.steps - 1) / max(steps - 1, 1)) for k in range(steps)]
        compute, origin = self.compute[rows], {"resampled_from": self.steps, **self.provenance}
        return replace(self, compute=compute, weights=None, timesteps=(), provenance=origin)

    def check(self, steps: int, site_names: Sequence[str], timesteps: Sequence[float] = ()) -> None:
        """Raise ValueError unless the schedule fits such a run; unknown timesteps fit any."""
        T, ours, times = self.steps, tuple(site_names), tuple(timesteps)
        sampler = self.sampler or "unknown sampler"
        todo = f"run {T} or train a schedule for {steps}, or call schedule.resample({steps})"
        require(steps == T, f"this schedule has {T} steps ({sampler}), the run has {steps}; {todo}")
        mine, theirs = (f"{len(each)} sites, {each[0]} … {each[-1]}" for each in (self.sites, ours))
        fit = self.sites in (ours, default_names(len(ours)))
        require(fit, f"this schedule has {mine}, the model has {theirs}")
        if self.timesteps and times:
            made, here = (f"{each[0]} … {each[-1]}" for each in (self.timesteps, times))
            when = f"this schedule was made at timesteps {made} ({sampler}), the run has {here}"
            require(self.timesteps == times, f"{when}, not all the same; use its sampler")

    def __str__(self) -> str:
        width = max(map(len, self.sites))
        head = f"{self.steps} steps × {len(self.sites)} sites, CUR {100 * self.cur:.1f} %"
        lines = [f"{head} (# computes, . reuses; steps run left to right)"]
        for site, column in zip(self.sites, self.compute.T.tolist(), strict=True):
            lines.append(f"{site:{width}}  {''.join('.#'[entry] for entry in column)}")
        return "\n".join(lines)

    def save(self, path: StrPath) -> None:
        """Write readable JSON: for each site one string of T digits, 1 = compute."""
        from harmonica.storage.formats import write_schedule

        write_schedule(path, vars(self))

    @classmethod
    def load(cls, path: StrPath, tau: float = 0.1) -> Schedule:
        """Read a schedule, a router, which is frozen at `tau`, or another library's table; raises
        as `harmonica.storage.formats.read_schedule` does.
        """
        from harmonica.storage.formats import build, is_router, read_schedule

        if is_router(path):
            return Router.load(path).schedule(tau)
        return build(cls, path, read_schedule(path, tau))


class Router(nn.Module):
    """Scores while they are learned: `router()` is r, (T, N), in (0, 1); row 0 is fixed at 1
    (paper, "Router").

    Each row is a parameter of its own, so it moves only when its step is trained.

    Args:
        steps: T ≥ 1.
        sites: N, or the N site names (a denoiser's `sites` will do).
        generator: draws the logits from N(0, 1), as the released code does; torch's own if None.
        logits: (T−1, N) in execution order from k = 1, instead of drawn ones.
        about: fields of `Schedule` to hand on: model, sampler, timesteps, guidance, provenance.

    >>> router = Router(3, ["attn", "mlp"])
    >>> router().shape, router()[0].tolist(), sum(p.numel() for p in router.parameters())
    (torch.Size([3, 2]), [1.0, 1.0], 4)
    """

    def __init__(
        self, steps: int, sites: int | Iterable[str], *, generator: torch.Generator | None = None,
        logits: Tensor | None = None, about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.steps, self.about = whole("steps", steps, 1, LARGEST), dict(about or {})
        self.sites = names_of(sites)
        shape = (self.steps - 1, len(self.sites))
        if logits is None:
            logits = torch.randn(shape, generator=generator, device=seeded(generator).device)
        of_type("logits", logits, Tensor, "torch.tensor makes one")
        fit = logits.shape == shape and logits.is_floating_point() and logits.isfinite().all()
        what = f"logits are {tuple(logits.shape)} {logits.dtype}"
        require(bool(fit), f"{what}; expected finite floating-point (steps − 1, sites) {shape}")
        self.rows = nn.ParameterList(nn.Parameter(row.clone()) for row in logits.detach())
        checked = vars(self.schedule())  # raises if `about` does not describe a schedule
        self.about = {name: checked[name] for name in self.about}

    @property
    def logits(self) -> Tensor:
        """(T−1, N) copy of what is trained, rows in execution order from k = 1."""
        rows = [row.detach() for row in self.rows]
        return torch.stack(rows) if rows else torch.empty(0, len(self.sites))

    def row(self, k: int) -> Tensor:
        """Return r at step k, (N,): σ(logits of step k), or the constant one at k = 0."""
        if whole("k", k, 0, self.steps) > 0:
            return torch.sigmoid(self.rows[k - 1])
        return torch.ones_like(self.rows[0]) if self.rows else torch.ones(len(self.sites))

    def forward(self) -> Tensor:
        """Return r, (T, N)."""
        return torch.stack([self.row(k) for k in range(self.steps)])

    def schedule(self, tau: float = 0.1) -> Schedule:
        """Freeze the scores into a table: compute where r > τ, 0 ≤ τ < 1 (paper, "Router")."""
        tau = number("tau", tau, 0, 1)
        r = self().detach().cpu()
        require(not r.isnan().any(), "the router's scores are not numbers; its training diverged")
        return Schedule(r > tau, sites=self.sites, **{**self.about, "threshold": tau})

    def save(self, path: StrPath) -> None:
        """Write logits, site names and `about` as safetensors."""
        from harmonica.storage.formats import write_router

        write_router(path, {"logits": self.logits, "sites": self.sites, "about": self.about})

    @classmethod
    def load(cls, path: StrPath) -> Router:
        """Read a router, or the one in a checkpoint; raises as `Schedule.load` does."""
        from harmonica.storage.formats import build, read_router

        return build(cls, path, read_router(path)[0])
