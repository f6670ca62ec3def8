"""Target: training towards a speedup that the user asks for, instead of towards a β that nobody can
guess.

    minimise the error  subject to  spent ≤ allowed

    spent      what the sites that compute cost, in MACs or what else is counted  Σ compute · cost
    allowed    what they may cost at the target speedup                           T·total / speedup − T·rest
    β          the multiplier of that constraint: raised while too much is spent, lowered while too little is

The loss of a step is λ·MSE + β·Σᵢ wᵢ·rᵢ with wᵢ the cost of site i over the mean site's, so a site
is kept for what it is worth per MAC. The paper has wᵢ = 1 and a fixed β. β spans five decades from
one setting to another (λ, model, T), so the steps of this dual ascent are steps of log β. This file
does not know models, losses or λ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harmonica.cost import Macs, macs
from harmonica.denoise import Denoiser
from harmonica.router import Router, Schedule

if TYPE_CHECKING:
    from harmonica.sdt import Update

GAIN, DAMPING = 0.15, 3.0
"""Of log β, for each trajectory: per unit of log (spent / allowed), and per unit of its change."""

FASTEST = 1.0
"""log β moves at most this far in one trajectory."""


@dataclass(frozen=True)
class Target:
    """A theoretical speedup, and what it is counted in.

    Attributes:
        speedup: at least 1.
        cost: of each site and of what no site covers: `macs(denoiser)`, or whatever else is counted
            in that form.
        steps: T.

    Raises ValueError, naming the maximum, if even a table that computes at its first step only is
    slower.
    """

    speedup: float
    cost: Macs
    steps: int

    def __post_init__(self) -> None:
        most = self.steps * self.cost.total / (self.cost.total + (self.steps - 1) * self.cost.rest)
        if not self.speedup >= 1:
            raise ValueError(
                f"the target speedup is {self.speedup}; it must be 1 (compute all) or more"
            )
        if self.speedup > most * (1 + 1e-9):
            share = f"{self.cost.covered:.1%} of the cost is covered by sites"
            raise ValueError(
                f"the target speedup is {self.speedup:g} and the maximum here is {most:.4g}: the first of "
                f"{self.steps} steps computes, and {share}; ask for less or take more steps"
            )

    @property
    def settings(self) -> dict[str, float]:
        """What a checkpoint must agree with."""
        return {"target_speedup": self.speedup, "target_cost": self.cost.total}

    @property
    def allowed(self) -> float:
        """What the sites that compute may cost in one walk."""
        return self.steps * (self.cost.total / self.speedup - self.cost.rest) * (1 + 1e-12)

    @property
    def weights(self) -> Tensor:
        """(N,) wᵢ, the cost of each site over the mean site's."""
        return (self.cost.sites / self.cost.sites.mean()).float()

    def spent(self, compute: Tensor) -> float:
        """Return what the sites that compute cost in one walk under a table (T, N)."""
        return float((compute * self.cost.sites).sum())

    def speed(self, compute: Tensor) -> float:
        """Return the theoretical speedup of a table (T, N)."""
        return Schedule(compute).speedup(self.cost)

    def land(self, scores: Tensor, compute: Tensor) -> Tensor:
        """Return the table (T, N) that `compute` becomes when entries turn over, by score, until it
        is on target.

        Where it is too slow, computing entries with the lowest scores are reused; where it is
        faster than it need be, reusing entries with the highest scores compute, as long as the
        target is still met.
        """
        table, costs = compute.clone(), self.cost.sites.expand(self.steps, -1)  # (T, N) each
        spent = self.spent(table)
        order = scores.flatten().argsort(stable=True).tolist()
        width = len(self.cost.sites)
        for entry in order:  # lowest first
            k, i = divmod(entry, width)
            if spent > self.allowed and k > 0 and table[k, i]:
                table[k, i], spent = False, spent - float(costs[k, i])
        for entry in reversed(order):
            k, i = divmod(entry, width)
            if not table[k, i] and spent + float(costs[k, i]) <= self.allowed:
                table[k, i], spent = True, spent + float(costs[k, i])
        return table


def level(tau: float) -> float:
    """Return the logit at which a score is τ; −∞ at 0.

    >>> level(0.5), level(0.0)
    (0.0, -inf)
    """
    return math.log(tau / (1 - tau)) if tau > 0 else -math.inf


def target_of(
    denoiser: Denoiser,
    speedup: float | None,
    cur: float | None,
    cost: Macs | None,
    beta: float | None,
) -> Target | None:
    """Return what `train_sdt` was asked to reach, None without a target; raises ValueError where
    requests contradict.

    A CUR is a speedup of 1 / (1 − CUR) where every site costs the same and nothing else costs
    anything.
    """
    if speedup is None and cur is None:
        if cost is not None:
            raise ValueError("cost is given without a target; say target_speedup=… as well")
        return None
    if speedup is not None and cur is not None:
        raise ValueError(
            f"found target_speedup {speedup} and target_cur {cur}; give one of the two"
        )
    if beta is not None:
        raise ValueError(
            f"beta is {beta} and a target is given; with a target β is steered, leave it out"
        )
    if speedup is not None:
        return Target(speedup, macs(denoiser) if cost is None else cost, denoiser.steps)
    if cur is None or not 0.0 <= cur < 1.0 or cost is not None:
        raise ValueError(
            f"found target_cur {cur}, cost {cost}; expected a share from 0 to below 1, and no cost"
        )
    return Target(
        1 / (1 - cur),
        Macs(torch.ones(len(denoiser.sites), dtype=torch.float64), 0.0),
        denoiser.steps,
    )


class Steering:
    """β of a training run that is to end on target. `steering()` is what `sdt` multiplies a step's
    scores with, (N,).

    Args:
        target: where to.
        tau: τ, at which the router will be frozen.
        state: (3,) float64: log β, the last log (spent / allowed), and 1 once both are known;
            changed in place, so that a checkpoint which holds it continues the run.
    """

    def __init__(self, target: Target, tau: float, state: Tensor) -> None:
        self.target, self.state = target, state
        self._level = level(tau)
        self._errors: list[float] = []

    def __call__(self) -> Tensor:
        """Return the price of computing each site, (N,); zero until a trajectory has shown how
        large the errors are.
        """
        log_beta, _, begun = self.state.tolist()
        return self.target.weights * (math.exp(log_beta) if begun else 0.0)

    def after(self, router: Router, update: Update) -> None:
        """Steer, if this update of `router` was the last of its trajectory."""
        self._errors.append(update.lam * update.mse)
        if update.k < router.steps - 1:
            return
        gap, begun = self._gap(router), bool(self.state[2])
        if not begun:  # where the table would save about what it errs
            typical = sorted(self._errors)[len(self._errors) // 2]
            self.state.copy_(
                torch.tensor([math.log(max(typical, 1e-30) / len(router.sites)), gap, 1.0])
            )
        else:
            step = GAIN * gap + DAMPING * (gap - float(self.state[1]))
            self.state[0] += min(max(step, -FASTEST), FASTEST)
            self.state[1] = gap
        self._errors.clear()

    def _gap(self, router: Router) -> float:
        """Return log (spent / allowed), counting an entry near τ in part, so that it changes before
        the table does.
        """
        near = torch.sigmoid(router.logits.cpu().double() - self._level)  # (T−1, N)
        spent = float(self.target.cost.sites.sum() + (near * self.target.cost.sites).sum())
        return math.log(spent / max(self.target.allowed, 1e-30))
