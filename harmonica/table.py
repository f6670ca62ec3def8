"""Table: what every table of decisions must be, and what its entries cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one guided prediction for one image."""

    sites: Tensor  # (N,) float64, of each site
    rest: float  # that no site covers: embeddings, modulation, the final layer

    @property
    def total(self) -> float:
        """MACs of a prediction in which everything computes."""
        return float(self.sites.sum()) + self.rest

    @property
    def covered(self) -> float:
        """Share of the total, 0 … 1, that a schedule can reuse."""
        return float(self.sites.sum()) / self.total


def require(holds: bool, otherwise: str) -> None:
    """Raise ValueError with a message unless a condition holds."""
    if not holds:
        raise ValueError(otherwise)


def default_names(n_sites: int) -> tuple[str, ...]:
    """Return names for sites that have none: site0, site1 and so on."""
    return tuple(f"site{i}" for i in range(n_sites))


def checked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return those fields of a `Schedule` that are tensors or containers, checked and copied."""
    order = fields["order"]
    whole = type(order) is int and 0 <= order < 10
    require(whole, f"order is {order!r}; a forecast has 0 (reuse) to 9 differences")
    compute = torch.as_tensor(fields["compute"], device="cpu")
    shape = tuple(compute.shape)
    flat = len(shape) == 2 and 0 not in shape
    require(flat, f"compute has shape {shape}; it must be (steps, sites), neither of them 0")
    binary = bool(((compute == 0) | (compute == 1)).all())
    require(binary, "compute has entries other than 0 and 1; scores go to router.schedule(tau)")
    compute = compute.to(torch.bool, copy=True)
    names, times = tuple(fields["sites"]) or default_names(shape[1]), tuple(fields["timesteps"])
    distinct, what = len(set(names)), f"the table is {shape[0]} × {shape[1]} (steps × sites)"
    fit = len(names) == distinct == shape[1] and len(times) in (0, shape[0])
    has = f"comes with {distinct} distinct site names and {len(times)} timesteps"
    require(fit, f"{what} and {has}")
    reused = [name for name, computes in zip(names, compute[0], strict=True) if not computes]
    first = ", ".join(reused[:1])
    require(not reused, f"step 0 reuses {first}, but nothing is cached yet; its row must be true")
    checked = {"compute": compute, "sites": names, "timesteps": times}
    if fields["weights"] is not None:
        checked["weights"] = checked_weights(fields["weights"], compute)
    return {**checked, "provenance": dict(fields["provenance"])}


def checked_weights(numbers: Any, compute: Tensor) -> Tensor:
    """Return weights as (T, N, 1 + m) float32, or raise ValueError where the table forbids them."""
    weights: Tensor = torch.as_tensor(numbers).detach().to("cpu", torch.float32, copy=True)
    (T, N), shape = compute.shape, tuple(weights.shape)
    fit = shape[:2] == (T, N) and len(shape) == 3 and shape[2] >= 2
    todo = f"the table is {T} × {N}, so they must be ({T}, {N}, 1 + m) for m ≥ 1 past outputs"
    require(fit, f"weights has shape {shape}; {todo}")
    past = outputs_before(compute)
    forbidden = torch.arange(shape[2]) > past[:, :, None]
    forbidden[:, :, 0] = ~compute
    for k, i, j in (~weights.isfinite() | (weights != 0) & forbidden).nonzero().tolist():
        output = f"last output {j}" if j else "the fresh output"
        why = f"only {past[k, i]} outputs were computed" if j else "that entry is skipped"
        value, must = f"{float(weights[k, i, j]):g}", forbidden[k, i, j]
        rule = f", but {why}; it must be 0" if must else "; every weight must be finite"
        raise ValueError(f"the weight of {output} at step {k}, site {i} is {value}{rule}")
    return weights


def outputs_before(compute: Tensor) -> Tensor:
    """Return how many outputs each site has computed before each step, (T, N)."""
    return compute.cumsum(0) - compute.long()
