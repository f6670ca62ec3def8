"""Arithmetic: the element-wise work of a block around its sites, exact or in fewer passes.

    EXACT      as the models write it                                          same bits
    FUSED      a product and a sum in one pass over memory                     to rounding

This file does not know blocks, gates or schedules.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Arithmetic:
    """The element-wise work of a block, as the models write it: exact.

    h tokens (B, N, D)   scale, shift, gate (B, 1, D)   out, what a site returned (B, N, D)
    """

    def modulate(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return h·(1 + scale) + shift, h being normed."""
        return h * (1 + scale) + shift

    def add(self, h: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        """Return gate·out + h, in this order: a sum lies in memory as its first part does."""
        return gate * out + h


class Fused(Arithmetic):
    """The same in fewer passes over memory: a product and a sum are rounded once, not twice."""

    def modulate(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return h·(1 + scale) + shift, h being normed."""
        return torch.addcmul(shift, h, 1 + scale)

    def add(self, h: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        """Return gate·out + h."""
        return torch.addcmul(h.contiguous(), gate, out)


EXACT, FUSED = Arithmetic(), Fused()
