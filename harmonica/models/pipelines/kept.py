"""Kept: outputs of sites during a walk of a pipeline.

A walk of a pipeline may start late, or compute where the table reuses. So an output remembers the
step that it comes from, and whether anybody has written to it since. This file does not know
pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from harmonica.cache import Feature


@dataclass
class Output:
    """An output of a site.

    Attributes:
        step: that it comes from.
        feature: the output; a copy that nobody else holds where `apart`, because it lies in host
            memory, or because torch does not count what is written to it (inference mode).
        tensors, versions: those in it, and how often each was written to when it was kept.
    """

    step: int
    feature: Feature
    apart: bool = False
    tensors: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()

    @classmethod
    def of(cls, step: int, feature: Feature, offload: bool) -> Output:
        """Keep a feature, in host memory if it is `offload`ed."""
        tensors = tuple(leaf for leaf in tree_leaves(feature) if isinstance(leaf, Tensor))
        if offload or any(tensor.is_inference() for tensor in tensors):
            return cls(step, tree_map(_to_host if offload else _copied, feature), True)
        return cls(step, feature, False, tensors, tuple(each._version for each in tensors))

    def intact(self) -> bool:
        """Tell whether nobody has written to the feature since."""
        return tuple(tensor._version for tensor in self.tensors) == self.versions

    def value(self) -> Feature:
        """Return the feature, or a copy of one that is kept apart, on its own device."""
        return tree_map(_copied, self.feature) if self.apart else self.feature


@dataclass(frozen=True)
class _Hosted:
    tensor: Tensor
    device: torch.device


def _to_host(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    host = torch.empty_like(leaf, device="cpu", pin_memory=leaf.is_cuda)
    return _Hosted(host.copy_(leaf, non_blocking=True), leaf.device)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, _Hosted):
        there = torch.empty_like(leaf.tensor, device=leaf.device)
        return there.copy_(leaf.tensor, non_blocking=True)
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
