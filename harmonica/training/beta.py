"""BetaController: the price β of computing, chosen while training so that the table ends on target.

    minimise the error  subject to  spent ≤ allowed           (harmonica.search.target)

β is the multiplier of that constraint: it is raised while the table spends too much, and lowered
while it spends too little. The loss of a step is λ·MSE + β·Σᵢ wᵢ·rᵢ, where wᵢ is the cost of site i
over the mean site's. The paper has wᵢ = 1 and a fixed β. β differs by five decades from one setting
to another (λ, model, T), so it is log β that is changed. This file does not know models or losses.
"""

import math

import torch
from torch import Tensor

from harmonica.router import Router
from harmonica.sdt import Update
from harmonica.search.target import Target, logit

GAIN, DAMPING = 0.15, 3.0
"""Change of log β after a walk: per unit of log (spent / allowed), per unit of its change."""

FASTEST = 1.0  # log β changes at most this much after one walk


class BetaController:
    """Chooses β after each walk.

    `target` is the speedup to end on, `tau` τ at which the router on `device` will be frozen.

    Attributes:
        beta: (N,) float32 on the device, the price of each site; changed in place, so that `sdt`
            sees it. Zero until a walk has shown how large the errors are.
        state: (3,) float64 on the CPU: log β, the last log (spent / allowed), and 1 once both are
            known.
    """

    def __init__(self, target: Target, tau: float, device: torch.device) -> None:
        self.target, self.tau = target, tau
        self.weights = (target.cost.sites / target.cost.sites.mean()).float()  # (N,) wᵢ
        self.beta = torch.zeros_like(self.weights, device=device)
        self.state = torch.zeros(3, dtype=torch.float64)
        self._errors: list[float] = []

    def restore(self, state: Tensor) -> None:
        """Continue from a state (3,) of another controller."""
        self.state = state.clone()
        log_beta, _, known = state.tolist()
        self.beta.copy_(self.weights * (math.exp(log_beta) if known else 0.0))

    def after(self, router: Router, update: Update) -> None:
        """Change β if this update of `router` was the last of its walk."""
        self._errors.append(update.lam * update.mse)
        if update.k < router.steps - 1:
            return
        # Row 0 always computes: cost.sum(). Other entries count σ(logit r − logit τ), a smooth
        # version of r > τ, so that β reacts before an entry crosses τ.
        cost, near = self.target.cost.sites, router.logits.cpu().double() - logit(self.tau)
        spent = float(cost.sum() + (torch.sigmoid(near) * cost).sum())
        excess = math.log(spent / max(self.target.allowed, 1e-30))
        log_beta, last, known = self.state.tolist()
        if known:
            log_beta += min(max(GAIN * excess + DAMPING * (excess - last), -FASTEST), FASTEST)
        else:  # where the penalty is about as large as the error
            typical = sorted(self._errors)[len(self._errors) // 2]
            log_beta = math.log(max(typical, 1e-30) / len(router.sites))
        self.restore(torch.tensor([log_beta, excess, 1.0], dtype=torch.float64))
        self._errors.clear()
