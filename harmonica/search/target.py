"""Target: a speedup that the user asks for, and what its computing sites may cost.

    cost       of each site and of what no site covers, in MACs or another unit
    spent      what the computing sites of a table cost in one walk, Σ compute · cost
    allowed    what they may cost at the target speedup, T·total / speedup − T·rest

This file does not know how a table is trained or searched for.
"""

import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from harmonica.check import require_denoiser
from harmonica.cost import Macs, macs
from harmonica.denoise import Denoiser
from harmonica.search.references import Toward
from harmonica.values import LARGEST, number, of_type, require, whole


@dataclass(frozen=True)
class Target:
    """A theoretical speedup, and the cost that it is counted in.

    Raises ValueError, naming the maximum, if no table is that fast.
    """

    speedup: float  # at least 1
    cost: Macs  # `macs(denoiser)`, or another measure of the sites and of the rest
    steps: int  # T

    def __post_init__(self) -> None:
        speedup = number("the target speedup", self.speedup, 1)
        steps = whole("steps", self.steps, 1, LARGEST)
        vars(self).update(speedup=speedup, steps=steps)
        cost = of_type("cost", self.cost, Macs, "harmonica.macs(denoiser)")
        most = steps * cost.total / (cost.total + (steps - 1) * cost.rest)
        why = f"the first of {steps} steps computes, and sites are {cost.covered:.1%}"
        given = f"the target speedup is {speedup:g} and the maximum here is {most:.4g}"
        todo = "ask for less or take more steps"
        require(speedup <= most * (1 + 1e-9), f"{given}: {why} of the cost; {todo}")

    @property
    def allowed(self) -> float:
        """What the sites that compute may cost in one walk."""
        return self.steps * (self.cost.total / self.speedup - self.cost.rest) * (1 + 1e-12)

    @property
    def steps_that_compute(self) -> int:
        """How many steps may compute all of their sites."""
        return int(self.allowed / float(self.cost.sites.sum()))

    def spent(self, compute: Tensor) -> float:
        """Return what the sites that compute cost in one walk under a table (T, N)."""
        return float((compute * self.cost.sites).sum())

    def fit_budget(self, scores: Tensor, compute: Tensor) -> Tensor:
        """Return the table (T, N) that `compute` becomes when entries flip until it is on target.

        Where it is too slow, computing entries with the lowest scores are reused. Then reusing
        entries with the highest scores compute, as long as the target is still met.
        """
        table, costs, spent = compute.clone(), self.cost.sites.tolist(), self.spent(compute)
        order = scores.flatten().argsort(stable=True).tolist()
        entries = [divmod(entry, len(costs)) for entry in order]  # (k, i), lowest score first
        for k, i in entries:
            if spent > self.allowed and k > 0 and table[k, i]:
                table[k, i], spent = False, spent - costs[i]
        for k, i in reversed(entries):
            if not table[k, i] and spent + costs[i] <= self.allowed:
                table[k, i], spent = True, spent + costs[i]
        return table


def check_target(
    speedup: float | None, beta: float | None = None, order: int = 0, toward: str = "uncached",
    budget: int | None = None,
) -> None:  # fmt: skip
    """Raise ValueError for a target that no model could meet, or that comes with a β, or for what
    needs a target and has none; what needs the model is checked by `Target`.
    """
    given = f"the target speedup is {speedup}"
    whole("order", order, 0, 10)
    whole("budget", budget or 0, 0)
    known = toward in get_args(Toward)
    require(known, f"toward is {toward!r}; it must be 'reference' or 'uncached'")
    number("the target speedup", 1 if speedup is None else speedup, 1)
    aimed = speedup is not None or (order == 0 and toward == "uncached" and not budget)
    settings = f"order is {order}, toward {toward!r} and budget {budget}, but {given}"
    require(aimed, f"{settings}; these are for a search, so give target_speedup as well")
    todo = f"beta is {beta} and {given}; a target chooses beta by itself, leave it out"
    require(speedup is None or beta is None, todo)


def target_of(
    denoiser: Denoiser, speedup: float | None, cur: float | None, cost: Macs | None
) -> Target | None:
    """Return what `train_sdt` is to reach, None without a target; ValueError on contradictions.

    A CUR is a speedup of 1 / (1 − CUR) where all sites cost the same and nothing else has a cost.
    """
    require_denoiser(denoiser)
    if cur is not None:
        given = f"target_cur is {cur}, target_speedup {speedup} and cost {cost}"
        todo = "expected a target CUR from 0 to below 1 and neither of the others"
        require(speedup is None and cost is None, f"{given}; {todo}")
        speedup = 1 / (1 - number("target_cur", cur, 0, 1))
        cost = Macs(torch.ones(len(denoiser.sites)), 0.0)
    if speedup is None:
        require(cost is None, "cost is given without a target; give target_speedup as well")
        return None
    target = Target(speedup, macs(denoiser) if cost is None else cost, denoiser.steps)
    require_target(target, denoiser)
    return target


def require_target(target: Any, denoiser: Denoiser) -> None:
    """Raise TypeError or ValueError unless this is a target for such a denoiser."""
    require_denoiser(denoiser)
    how = "Target(speedup, macs(denoiser), denoiser.steps)"
    of_type("target", target, Target, how)
    (T, N), theirs = (target.steps, len(target.cost.sites)), (denoiser.steps, len(denoiser.sites))
    given = f"the target counts {T} steps and {N} sites, and the denoiser has {theirs[0]} and"
    require(theirs == (T, N), f"{given} {theirs[1]}; make it as {how}")


def logit(tau: float) -> float:
    """Return the logit of a score τ; −∞ at 0."""
    return math.log(tau / (1 - tau)) if tau > 0 else -math.inf
