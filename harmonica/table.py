"""Table: what the entries of a table of decisions cost, and what a site has computed before them.

What every table must be is held in harmonica.schedule_fields.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmonica.values import LARGEST, items, number, require, whole


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one guided prediction for one image."""

    sites: Tensor  # (N,) float64, of each site
    rest: float  # that no site covers: embeddings, modulation, the final layer

    def __post_init__(self) -> None:
        sites, rest = numbers("sites", self.sites), number("rest", self.rest, 0)
        real = sites.dim() == 1 and not sites.is_complex()
        fit = real and bool((sites.isfinite() & (sites >= 0)).all() and sites.any())
        rule = "expected one for each site, 0 or more and finite, not all of them 0"
        require(fit, f"sites is {sites!r:.60}; {rule}")
        sites = sites.double()
        vars(self).update(sites=sites, rest=rest)

    @property
    def total(self) -> float:
        """MACs of a prediction in which everything computes."""
        return float(self.sites.sum()) + self.rest

    @property
    def covered(self) -> float:
        """Share of the total, 0 … 1, that a schedule can reuse."""
        return float(self.sites.sum()) / self.total


def default_names(n_sites: int) -> tuple[str, ...]:
    """Return names for sites that have none: site0, site1 and so on."""
    return tuple(f"site{i}" for i in range(n_sites))


def names_of(sites: Any) -> tuple[str, ...]:
    """Return the names of sites, or names for a number of them."""
    named = isinstance(sites, Iterable) and not isinstance(sites, Tensor)
    return items("sites", sites) if named else default_names(whole("sites", sites, 1, LARGEST))


def numbers(name: str, values: Any) -> Tensor:
    """Return a copy, on the CPU, of what a tensor can be made of; raise ValueError otherwise."""
    try:
        tensor = torch.as_tensor(values).detach()
        require(not (tensor.is_quantized or tensor.is_nested), "it is quantized or nested")
        return tensor.to("cpu", copy=True).to_dense()
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{name} is a {type(values).__name__} that no tensor can be made of"
        raise ValueError(f"{what}: {error!s:.120}") from None


def outputs_before(compute: Tensor) -> Tensor:
    """Return how many outputs each site has computed before each step, (T, N)."""
    return compute.cumsum(0) - compute.long()
