"""Router and Schedule: the table of HarmoniCa, while it is learned and once it is frozen.

    r          scores in (0, 1), 1 = compute, 0 = reuse                                (T, N)
    logits     what is trained, r = σ(logits), rows 1 … T−1                            (T−1, N)
    compute    r > τ, the table that a run follows                                     (T, N) bool
    CUR        cache utilisation ratio, the share of the T×N entries that are reused

Row k is the k-th *executed* step. Row 0 is not trained: a trajectory has nothing to reuse at its
first step. This file does not know models, caches or losses. What a table looks like in a file is in
harmonica/storage/formats.py, in a folder and on the Hub in harmonica/storage/hub.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmonica.site_names import columns_for

if TYPE_CHECKING:
    from harmonica.cost import Macs
    from harmonica.storage.files import StrPath


def _names(sites: int) -> tuple[str, ...]:
    return tuple(f"site{i}" for i in range(sites))


@dataclass(frozen=True, eq=False)
class Schedule:
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
            counts = f"macs counts {len(macs.sites)} sites"
            raise ValueError(f"{counts} and the schedule has {len(self.sites)}")
        cached = float((self.compute * macs.sites).sum()) + self.steps * macs.rest
        return self.steps * macs.total / cached

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
        rows = [round(k * (self.steps - 1) / max(steps - 1, 1)) for k in range(steps)]
        note = {
            "resampled_from": self.steps,
            **self.provenance,
        }  # a second one keeps the first origin
        return replace(self, compute=self.compute[rows], timesteps=(), provenance=note)

    def fit(self, sites: Sequence[str]) -> Schedule:
        """Return the schedule in the names and the order of a model's sites, as
        `harmonica.site_names.columns_for` matches them, or unchanged if it is for other sites.
        """
        columns = columns_for(self.sites, sites)
        if columns is None or self.sites == tuple(sites):
            return self
        always = torch.ones(self.steps, 1, dtype=torch.bool)  # column −1
        compute = torch.cat([self.compute, always], dim=1)[:, columns]
        return replace(self, compute=compute, sites=tuple(sites))

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

    def save(self, path: StrPath) -> None:
        """Write readable JSON: for each site one string of T digits, 1 = compute."""
        from harmonica.storage.formats import write_schedule

        write_schedule(path, vars(self))

    @classmethod
    def load(cls, path: StrPath, tau: float = 0.1) -> Schedule:
        """Read a schedule, a router, or another library's table; a router is frozen at `tau`.

        The file's content tells its format, see `harmonica.storage.formats.read_schedule`. Raises
        FileNotFoundError, or ValueError if the file is no table or damaged. Code is never run.
        """
        from harmonica.storage.formats import build, is_router, read_schedule

        if is_router(path):
            return Router.load(path).schedule(tau)
        return build(cls, path, read_schedule(path, tau))

    def export_smoothcache(self, path: StrPath) -> None:
        """Write SmoothCache's JSON, see `harmonica.storage.foreign.write_smoothcache`."""
        from harmonica.storage.foreign import write_smoothcache

        if self.order:
            order = f"the schedule's order is {self.order}"
            raise ValueError(f"{order}; SmoothCache's format knows reuse only, order 0")
        write_smoothcache(path, self.sites, self.compute)

    def save_pretrained(self, folder: StrPath) -> None:
        """Write a folder for the Hub, see `harmonica.storage.hub.write_folder`."""
        from harmonica.storage.hub import Card, write_folder

        write_folder(folder, self.save, Card("Schedule", self.model, str(self)))

    @classmethod
    def from_pretrained(
        cls, source: StrPath, *, revision: str | None = None, token: str | None = None
    ) -> Schedule:
        """Read a folder here or on the Hub, see `harmonica.storage.hub.table_file`."""
        from harmonica.storage.hub import table_file

        return cls.load(table_file(source, "Schedule", revision, token))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Publish the folder and return its address, see `harmonica.storage.hub.push`."""
        from harmonica.storage.hub import Card, push

        return push(repo_id, self.save, Card("Schedule", self.model, str(self)), private, token)


class Router(nn.Module):
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
            device = generator.device if generator else None
            logits = torch.randn(shape, generator=generator, device=device)
        if logits.shape != shape or not bool(logits.isfinite().all()):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} must be (steps − 1, sites) {shape}, and finite"
            )
        rows = (nn.Parameter(row.clone()) for row in logits.detach())
        self.rows = nn.ParameterList(rows)  # (T−1) × (N,)
        self.schedule()  # raises if `about` does not describe a schedule

    @property
    def logits(self) -> Tensor:
        """(T−1, N) copy of what is trained, rows in execution order from k = 1."""
        rows = [row.detach() for row in self.rows]
        return torch.stack(rows) if rows else torch.empty(0, len(self.sites))

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

    def save(self, path: StrPath) -> None:
        """Write logits, site names and `about` as safetensors."""
        from harmonica.storage.formats import write_router

        write_router(path, self.logits, self.sites, self.about)

    @classmethod
    def load(cls, path: StrPath) -> Router:
        """Read a router, or the one in a checkpoint; raise FileNotFoundError, or ValueError if the
        file is not one.
        """
        from harmonica.storage.formats import build, read_router

        return build(cls, path, read_router(path)[0])

    def save_pretrained(self, folder: StrPath) -> None:
        """Write a folder for the Hub, see `harmonica.storage.hub.write_folder`."""
        from harmonica.storage.hub import Card, write_folder

        model = str(self.about.get("model", ""))
        write_folder(folder, self.save, Card("Router", model, str(self.schedule())))

    @classmethod
    def from_pretrained(
        cls, source: StrPath, *, revision: str | None = None, token: str | None = None
    ) -> Router:
        """Read a folder here or on the Hub, see `harmonica.storage.hub.table_file`."""
        from harmonica.storage.hub import table_file

        return cls.load(table_file(source, "Router", revision, token))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Publish the folder and return its address, see `harmonica.storage.hub.push`."""
        from harmonica.storage.hub import Card, push

        model = str(self.about.get("model", ""))
        return push(repo_id, self.save, Card("Router", model, str(self.schedule())), private, token)
