"""Inputs: what a denoiser is asked with fits it, or the error says what does not.

Only shapes and places are looked at, never values: a value on a GPU would have to be waited for.
"""

from __future__ import annotations

from torch import Tensor


def check_inputs(x: Tensor, cond: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless x is (B, C, H, W) with this (C, H, W), and cond (B,) whole numbers
    beside it.
    """
    fits = x.ndim == 4 and tuple(x.shape[1:]) == shape and tuple(cond.shape) == (len(x),) != (0,)
    if not fits or x.device != cond.device or cond.is_floating_point():
        found = f"noise {tuple(x.shape)} on {x.device}, conditions {tuple(cond.shape)} {cond.dtype} on {cond.device}"
        wanted = (
            f"(B, {', '.join(map(str, shape))}) and (B,) whole numbers on one device, B at least 1"
        )
        raise ValueError(f"found {found}; expected {wanted}, as `draw` returns")
