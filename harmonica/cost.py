"""Cost: multiply-accumulates (MACs) of each site, counted while the model runs, and the clock beside the theory.

The gate is asked at every site, so a gate that reads a counter before and after `compute` knows what the site costs.
The model runs on fake tensors: every operation has its shape and no arithmetic is done, so DiT-XL counts in a second.

`Schedule.speedup(macs)` turns a count into a theoretical speedup. This file does not know routers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmonica.cache import gated
from harmonica.denoise import Denoiser, sample

if TYPE_CHECKING:
    from harmonica.router import Schedule


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one guided prediction for one image.

    Attributes:
        sites: (N,) float64, MACs of each site.
        rest: MACs that no site covers: embeddings, modulation, the final layer.
    """

    sites: Tensor
    rest: float

    @property
    def total(self) -> float:
        """MACs of a prediction in which everything computes."""
        return float(self.sites.sum()) + self.rest

    @property
    def covered(self) -> float:
        """Share of the total, 0 … 1, that a schedule can reuse."""
        return float(self.sites.sum()) / self.total


def macs(denoiser: Denoiser) -> Macs:
    """Count the MACs of one guided prediction for one image, site by site.

    Matrix products, convolutions and attention count; norms, activations and other element-wise work do not, as in the
    field's tables. With guidance a prediction runs the model on two samples, so it counts twice the published figures.

    Args:
        denoiser: `draw` gives it one noise to predict.
    """
    x, cond = denoiser.draw(1, torch.Generator().manual_seed(0))
    counts = [0.0] * len(denoiser.sites)
    # The fused attention kernels of the CPU are invisible to the counter; the plain one is two counted products.
    fake, counter = FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False)

    def gate(site: int, compute: Callable[[], Any]) -> Any:
        before = counter.get_total_flops()
        feature = compute()
        counts[site] += counter.get_total_flops() - before
        return feature

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fake, counter, gated(denoiser.sites, gate):
        denoiser.predict(x, 0, cond)
    total = counter.get_total_flops()
    sites = torch.tensor(counts, dtype=torch.float64) / 2  # two floating-point operations are one MAC
    return Macs(sites, total / 2 - float(sites.sum()))


@dataclass(frozen=True)
class Timing:
    """Seconds of one walk, medians of interleaved repeats."""

    plain: float
    cached: float

    @property
    def speedup(self) -> float:
        """Measured speedup."""
        return self.plain / self.cached


def measure(denoiser: Denoiser, schedule: Schedule, x: Tensor, cond: Any, *, repeats: int = 7) -> Timing:
    """Time the walk from noise x (B, C, H, W) with and without a schedule, by turns, after one walk of each.

    Turns, because a machine's speed drifts: both medians then saw the same weather.
    """

    def seconds(table: Schedule | None) -> float:
        _finish_pending(x)
        start = time.perf_counter()
        sample(denoiser, x, cond, table)
        _finish_pending(x)
        return time.perf_counter() - start

    turns = [(seconds(None), seconds(schedule)) for _ in range(repeats + 1)][1:]
    plain, cached = zip(*turns, strict=True)
    return Timing(median(plain), median(cached))


def _finish_pending(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
