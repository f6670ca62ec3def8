"""Arithmetic: the element-wise work of a block around its sites, exact or in fewer passes.

    EXACT      as the models write it                                          same bits
    FUSED      a product and a sum in one pass over memory                     to rounding

This file does not know blocks, gates or schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Arithmetic:
    """The element-wise work of a block, as the models write it: exact.

    h tokens (B, N, D)   scale, shift, gate (B, 1, D)   out, what a site returned (B, N, D)
    """

    def branch(
        self,
        site: Callable[[Tensor], Tensor],
        norm: nn.Module,
        h: Tensor,
        scale: Tensor,
        shift: Tensor,
    ) -> Any:
        """Return site(norm(h)·(1 + scale) + shift)."""
        return site(norm(h) * (1 + scale) + shift)

    def add(self, h: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        """Return gate·out + h, in this order: a sum lies in memory as its first part does."""
        return gate * out + h


class Fused(Arithmetic):
    """The same in fewer passes over memory: a product and a sum are rounded once, not twice."""

    def branch(
        self,
        site: Callable[[Tensor], Tensor],
        norm: nn.Module,
        h: Tensor,
        scale: Tensor,
        shift: Tensor,
    ) -> Any:
        """Return site(norm(h)·(1 + scale) + shift)."""
        return site(torch.addcmul(shift, norm(h), 1 + scale))

    def add(self, h: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        """Return gate·out + h."""
        return torch.addcmul(h.contiguous(), gate, out)


EXACT, FUSED = Arithmetic(), Fused()
