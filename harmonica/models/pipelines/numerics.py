"""Numerics: diffusers' DiT as the original DiT computes it.

This file does not know pipelines, caches or schedules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def original_numerics(transformer: nn.Module) -> Iterator[None]:
    """Make diffusers' DiT compute what the original DiT computes, for as long as the `with` is
    open.

    diffusers shifts the timestep embedding's frequencies by one and has an epsilon of 1e-5 in the
    norm before the feed-forward; the weights were trained with no shift and 1e-6.

    Raises ValueError for any other model.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    if not isinstance(transformer, DiTTransformer2DModel):
        raise ValueError(
            f"parity is for diffusers' DiT; {type(transformer).__name__} needs none that we know of"
        )
    blocks: Any = transformer.transformer_blocks
    before = [(block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps) for block in blocks]
    try:
        for block in blocks:
            block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = 0, 1e-6
        yield
    finally:
        for block, (shift, eps) in zip(blocks, before, strict=True):
            block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = shift, eps
