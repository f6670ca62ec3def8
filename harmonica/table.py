"""Table: what every table of decisions must be, and TaylorSeer's weights for one.

    compute    true = compute, false = reuse                                         (T, N) bool
    weights    w₀ … w_m of each entry: w₀·fresh + Σⱼ wⱼ·(j-th last computed output)  (T, N, 1 + m)

What does not fit raises a ValueError that names both sides. This file does not know models or how
a table is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Cost(Protocol):
    """Prices of one prediction, such as `harmonica.cost.Macs`, in any unit."""

    @property
    def sites(self) -> Tensor: ...  # noqa: D102 ((N,), of each site)
    @property
    def rest(self) -> float: ...  # noqa: D102 (what no site covers)


class Table(Protocol):
    """What a run reads of a `Schedule`, which describes it."""

    @property
    def compute(self) -> Tensor: ...  # noqa: D102
    @property
    def gate_weights(self) -> Tensor | None: ...  # noqa: D102
    @property
    def sites(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def timesteps(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def sampler(self) -> str: ...  # noqa: D102


def require(holds: bool, otherwise: str) -> None:
    """Raise ValueError with a message unless a condition holds."""
    if not holds:
        raise ValueError(otherwise)


def default_names(sites: int) -> tuple[str, ...]:
    """Return names for sites that have none: site0, site1 and so on."""
    return tuple(f"site{i}" for i in range(sites))


def checked_table(
    table: Any, names: Sequence[str], timesteps: Sequence[float]
) -> tuple[Tensor, tuple[str, ...], tuple[float, ...]]:
    """Return a table as (T, N) bool, its N site names and its T timesteps, which may be empty."""
    compute = torch.as_tensor(table, device="cpu")
    shape = tuple(compute.shape)
    require(
        len(shape) == 2 and 0 not in shape,
        f"compute has shape {shape}; it must be (steps, sites), neither of them 0",
    )
    require(
        bool(((compute == 0) | (compute == 1)).all()),
        "compute has entries other than 0 and 1; router.schedule(tau) makes decisions of scores",
    )
    compute = compute.to(torch.bool, copy=True)
    sites, times = tuple(names) or default_names(shape[1]), tuple(timesteps)
    require(
        len(sites) == len(set(sites)) == shape[1] and len(times) in (0, shape[0]),
        f"the table is {shape[0]} × {shape[1]} (steps × sites) and comes with "
        f"{len(set(sites))} distinct site names and {len(times)} timesteps",
    )
    reused = [site for site, computed in zip(sites, compute[0], strict=True) if not computed]
    require(
        not reused,
        f"step 0 reuses {', '.join(reused[:1])}, but nothing is cached yet; its row must be true",
    )
    return compute, sites, times


def check_fit(
    made: Table, steps: int, sites: tuple[str, ...], timesteps: tuple[float, ...]
) -> None:
    """Raise ValueError unless a table fits a run of `steps` steps over `sites` at `timesteps`."""
    mine, length, times = made.sites, len(made.compute), made.timesteps
    require(
        steps == length,
        f"this schedule has {length} steps ({made.sampler or 'unknown sampler'}), the run has "
        f"{steps}; run {length} or train a schedule for {steps}, or call "
        f"schedule.resample({steps})",
    )
    require(
        mine in (sites, default_names(len(sites))),
        f"this schedule has {len(mine)} sites, {mine[0]} … {mine[-1]}, the model has "
        f"{len(sites)}, {sites[0]} … {sites[-1]}",
    )
    if timesteps and times:
        require(
            tuple(timesteps) == times,
            f"this schedule was made at timesteps {times[0]} … {times[-1]} ({made.sampler}), the "
            f"run has {timesteps[0]} … {timesteps[-1]}, not all the same; use its sampler",
        )


def checked_weights(numbers: Any, compute: Tensor) -> Tensor:
    """Return weights as (T, N, 1 + m) float32, or raise ValueError where the table forbids them."""
    weights: Tensor = torch.as_tensor(numbers).detach().to("cpu", torch.float32, copy=True)
    if weights.dim() != 3 or weights.shape[:2] != compute.shape or weights.shape[2] < 2:
        table = f"{len(compute)} × {compute.shape[1]}"
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; the table is {table}, so they must be "
            f"({table.replace(' ×', ',')}, 1 + m) for m ≥ 1 past outputs"
        )
    past = compute.cumsum(0) - compute.long()  # outputs computed before each entry, (T, N)
    unreadable = torch.arange(weights.shape[2]) > past[:, :, None]
    unreadable[:, :, 0] = ~compute
    for wrong in (~weights.isfinite()).nonzero().tolist():
        raise ValueError(f"{_entry(weights, *wrong)}; every weight must be finite")
    for k, site, j in ((weights != 0) & unreadable).nonzero().tolist():
        what = f"only {past[k, site]} outputs were computed" if j else "that entry is skipped"
        raise ValueError(f"{_entry(weights, k, site, j)}, but {what}; it must be 0")
    return weights


def _entry(weights: Tensor, k: int, site: int, j: int) -> str:
    output = f"last output {j}" if j else "the fresh output"
    return f"the weight of {output} at step {k}, site {site} is {float(weights[k, site, j]):g}"


def taylor_weights(compute: Tensor, order: int) -> Tensor:
    """Return the weights (T, N, 2 + order) of a table (T, N): (1, 0, …) where it computes, and
    TaylorSeer's forecast (`taylor_forecasts`) where it skips.

    >>> taylor_weights(torch.tensor([[True], [True], [False], [False]]), 1)[:, 0].tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, -1.0], [0.0, 3.0, -2.0]]
    """
    fresh, compute = compute[:, :, None].double(), compute[:, :, None]
    return torch.cat([fresh, taylor_forecasts(compute[:, :, 0], order) * ~compute], dim=2)


def taylor_forecasts(compute: Tensor, order: int) -> Tensor:
    """Return for each entry the weights of a forecast from what was computed before it, (T, N, m)
    with m = 1 + order (TaylorSeer, arXiv 2503.06923).

    The forecast is Σᵢ Dⁱ·(k − k₀)ⁱ / i!, where D⁰ is the output at k₀, where the site was last
    computed, and Dⁱ = (Dⁱ⁻¹ now − Dⁱ⁻¹ before) / (steps between the two). Fewer differences are used
    while fewer outputs were computed. Order 0 is reuse.

    Args:
        compute: (T, N) bool.
        order: of the highest difference.
    """
    sites = compute.shape[1]
    known = torch.zeros(sites, 1)  # outputs computed so far
    since = torch.zeros(sites, 1, dtype=torch.float64)  # k₀
    newest = F.one_hot(torch.zeros(sites, dtype=torch.long), 1 + order).double()
    differences = [torch.zeros_like(newest) for _ in range(1 + order)]  # Dⁱ in past outputs, (N, m)
    forecasts = []
    for k, row in enumerate(compute[:, :, None]):
        powers = [(k - since) ** i / factorial(i) for i in range(1 + order)]
        forecasts.append(sum(d * p for d, p in zip(differences, powers, strict=True)))
        fresh = [newest]
        for i, before in enumerate(differences[:order]):
            older = F.pad(before[:, :-1], (1, 0))  # the last output becomes the last but one
            slope = (fresh[-1] - older) / (k - since).clamp_min(1.0)
            fresh.append(torch.where(known > i, slope, 0.0))
        differences = [torch.where(row, *pair) for pair in zip(fresh, differences, strict=True)]
        since, known = torch.where(row, float(k), since), known + row
    return torch.stack([torch.as_tensor(each) for each in forecasts])
