"""Router and Schedule: the table of HarmoniCa, while it is learned and once it is frozen.

    r          scores in (0, 1), 1 = compute, 0 = reuse                                (T, N)
    logits     what is trained, r = σ(logits), rows 1 … T−1                            (T−1, N)
    compute    r > τ, the table that a run follows                                     (T, N) bool
    CUR        cache utilisation ratio, the share of the T×N entries that are reused

Row k is the k-th *executed* step. Row 0 is not trained: a trajectory has nothing to reuse at its
first step. This file does not know models, caches or losses; what the table looks like on disk and
on the Hub is in storage/hub.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmonica.storage.hub import RouterFiles, ScheduleFiles

if TYPE_CHECKING:
    from harmonica.cost import Macs


def _names(sites: int) -> tuple[str, ...]:
    return tuple(f"site{i}" for i in range(sites))


@dataclass(frozen=True, eq=False)
class Schedule(ScheduleFiles):
    """A frozen table of decisions, and what it was made for.

    Attributes:
        compute: (T, N) bool, true = compute; made from anything a bool tensor can be made from.
        sites: N site names, in the order of the columns.
        timesteps: T timesteps of the sampler in execution order, empty if unknown.
        model, sampler, guidance: what the table was made for.
        threshold: τ, if a router was frozen.
        order: how a skipped site is filled: 0 is reuse (the paper), above it `harmonica.forecast`.
        provenance: how the table was made, for people; strings and numbers.

    Raises ValueError if the first row reuses, or names or timesteps do not fit the table.

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
    provenance: Mapping[str, str | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        compute = torch.as_tensor(self.compute, device="cpu")
        if compute.dim() != 2 or 0 in compute.shape:
            raise ValueError(
                f"compute has shape {tuple(compute.shape)}; it must be (steps, sites), neither of them 0"
            )
        if bool(((compute != 0) & (compute != 1)).any()):
            raise ValueError(
                "compute has entries other than 0 and 1; scores become decisions in router.schedule(tau)"
            )
        steps, width = compute.shape
        sites, times = tuple(self.sites) or _names(width), tuple(self.timesteps)
        if not len(sites) == len(set(sites)) == width or len(times) not in (0, steps):
            found = f"{len(set(sites))} distinct site names and {len(times)} timesteps"
            raise ValueError(
                f"the table is {steps} × {width} (steps × sites) and comes with {found}"
            )
        if not bool(compute[0].all()):
            first = sites[compute[0].tolist().index(0)]
            raise ValueError(
                f"step 0 reuses {first}, but nothing is cached yet; the first row must be all true"
            )
        if type(self.order) is not int or not 0 <= self.order < 10:
            raise ValueError(
                f"order is {self.order!r}; a skipped site is filled by 0 (reuse) to 9 differences"
            )
        made = {"compute": compute.to(torch.bool, copy=True), "sites": sites, "timesteps": times}
        for name, value in {**made, "provenance": dict(self.provenance)}.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        same = (
            getattr(self, f.name) == getattr(other, f.name)
            for f in fields(self)
            if f.name != "compute"
        )
        return all(same) and torch.equal(self.compute, other.compute)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.compute)

    @property
    def cur(self) -> float:
        """Cache utilisation ratio, 0 … 1: the share of the table that is reused (paper, "CUR")."""
        return int((~self.compute).sum()) / self.compute.numel()

    def speedup(self, macs: Macs) -> float:
        """Return the theoretical speedup: MACs of the full walk over MACs of what still runs,
        `rest` included.
        """
        if len(macs.sites) != len(self.sites):
            raise ValueError(
                f"macs counts {len(macs.sites)} sites and the schedule has {len(self.sites)}"
            )
        return (
            self.steps
            * macs.total
            / (float((self.compute * macs.sites).sum()) + self.steps * macs.rest)
        )

    def resample(self, steps: int) -> Schedule:
        """Return a guess for another number of steps, each row from the same relative place of the
        walk; warns.
        """
        if steps == self.steps:
            return self
        if steps < 1:
            raise ValueError(f"steps is {steps}; a walk has at least 1")
        warnings.warn(
            f"a schedule for {self.steps} steps was stretched to {steps}, not trained there",
            stacklevel=2,
        )
        rows = [
            round(k * (self.steps - 1) / max(steps - 1, 1)) for k in range(steps)
        ]  # row 0 stays row 0
        note = {
            "resampled_from": self.steps,
            **self.provenance,
        }  # of a second resampling, the first origin stays
        return replace(self, compute=self.compute[rows], timesteps=(), provenance=note)

    def check(self, steps: int, sites: tuple[str, ...], timesteps: tuple[float, ...] = ()) -> None:
        """Raise ValueError unless the schedule fits a run of `steps` steps over `sites` at
        `timesteps`.
        """
        if steps != self.steps:
            mine = f"this schedule has {self.steps} steps ({self.sampler or 'unknown sampler'})"
            todo = f"run {self.steps} or train a schedule for {steps}, or call schedule.resample({steps})"
            raise ValueError(f"{mine}, the run has {steps}; {todo}")
        if self.sites not in (
            sites,
            _names(len(sites)),
        ):  # a table without names fits by their number
            mine = f"{len(self.sites)} sites, {self.sites[0]} … {self.sites[-1]}"
            raise ValueError(
                f"this schedule has {mine}, the model has {len(sites)}, {sites[0]} … {sites[-1]}"
            )
        if timesteps and self.timesteps and tuple(timesteps) != self.timesteps:
            mine = f"this schedule was made at timesteps {self.timesteps[0]} … {self.timesteps[-1]} ({self.sampler})"
            raise ValueError(
                f"{mine}, the run has {timesteps[0]} … {timesteps[-1]}, not all the same; use its sampler"
            )

    def __str__(self) -> str:
        head = f"{self.steps} steps × {len(self.sites)} sites, CUR {100 * self.cur:.1f} %"
        table = zip(self.sites, self.compute.T.tolist(), strict=True)
        width = max(map(len, self.sites))
        lines = [
            f"{site:{width}}  {''.join('.#'[entry] for entry in column)}" for site, column in table
        ]
        return "\n".join([f"{head} (# computes, . reuses; steps run left to right)", *lines])


class Router(RouterFiles, nn.Module):
    """The table while it is learned: `router()` is r, (T, N) in (0, 1), row 0 the constant one
    (paper, "Router").

    Each row is a parameter with an optimizer state of its own, so it moves only when its step is
    trained.

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
        self,
        steps: int,
        sites: int | Iterable[str],
        *,
        generator: torch.Generator | None = None,
        logits: Tensor | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.steps, self.about = steps, dict(about or {})
        self.sites = _names(sites) if isinstance(sites, int) else tuple(sites)
        if steps < 1 or not self.sites:
            raise ValueError(
                f"a router needs a step and a site; found {steps} steps and {len(self.sites)} sites"
            )
        shape = (steps - 1, len(self.sites))
        if logits is None:
            logits = torch.randn(
                shape, generator=generator, device=generator.device if generator else None
            )
        if logits.shape != shape or not bool(logits.isfinite().all()):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} must be (steps − 1, sites) {shape}, and finite"
            )
        self.rows = nn.ParameterList(
            nn.Parameter(row.clone()) for row in logits.detach()
        )  # (T−1) × (N,)

    @property
    def logits(self) -> Tensor:
        """(T−1, N) copy of what is trained, rows in execution order from k = 1."""
        return (
            torch.stack([row.detach() for row in self.rows])
            if self.rows
            else torch.empty(0, len(self.sites))
        )

    def row(self, k: int) -> Tensor:
        """Return r at step k, (N,): σ(logits of step k), or the constant one at k = 0."""
        if k > 0:
            return torch.sigmoid(self.rows[k - 1])
        return torch.ones_like(self.rows[0]) if self.rows else torch.ones(len(self.sites))

    def forward(self) -> Tensor:
        """Return r, (T, N)."""
        return torch.stack([self.row(k) for k in range(self.steps)])

    def schedule(self, tau: float = 0.1) -> Schedule:
        """Freeze the table: compute where r > τ, 0 ≤ τ < 1 (paper, "Router")."""
        if not 0.0 <= tau < 1.0:
            raise ValueError(
                f"tau is {tau}; it must be at least 0 (compute all) and below 1 (where nothing computes)"
            )
        r = self().detach().cpu()
        if bool(r.isnan().any()):
            raise ValueError("the router has scores that are not numbers; its training diverged")
        return Schedule(r > tau, sites=self.sites, threshold=tau, **self.about)
