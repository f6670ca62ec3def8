"""Arithmetic: the element-wise work of a block around its sites, exact or in fewer passes.

    EXACT      as the models write it                                          same bits
    FUSED      a product and a sum in one pass over memory, rounded once       to rounding

    h tokens (B, N, D)   scale, shift, gate (B, 1, D)   out, what a site returned (B, N, D)

This file does not know blocks, gates or schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Arithmetic(NamedTuple):
    """Two functions: modulate(h, scale, shift) = h·(1 + scale) + shift of a normed h, and
    add(h, gate, out) = gate·out + h.
    """

    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor, Tensor], Tensor]


EXACT = Arithmetic(
    lambda h, scale, shift: h * (1 + scale) + shift,
    lambda h, gate, out: gate * out + h,  # in this order: a sum lies in memory as its first part
)
FUSED = Arithmetic(
    lambda h, scale, shift: torch.addcmul(shift, h, 1 + scale),
    lambda h, gate, out: torch.addcmul(h.contiguous(), gate, out),
)
