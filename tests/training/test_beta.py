"""BetaController: β is chosen while training, so that the table ends on a target."""

import pytest
import torch

from harmonica import Macs, Router
from harmonica.sdt import Update
from harmonica.search.target import Target
from harmonica.training.beta import BetaController

COST = Macs(torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64), 0.5)


@pytest.mark.parametrize(("spends_more", "sign"), [(True, 1), (False, -1)])
def test_beta_rises_while_too_much_is_spent_and_falls_while_too_little(spends_more, sign):
    control = BetaController(Target(1.5, COST, 4), 0.1, torch.device("cpu"))
    router = Router(4, 4, logits=torch.full((3, 4), 4.0 if spends_more else -5.0))
    assert bool((control.beta == 0).all())
    for trajectory in range(2):
        before = control.beta.sum()
        for k in range(1, 4):
            control.after(router, Update(trajectory, k, 1.0, 1e-3, 1.0, 0.5))
    assert sign * float(control.beta.sum() - before) > 0
    assert torch.allclose(control.beta / control.beta[0], torch.tensor([1.0, 2.0, 1.0, 2.0]))
