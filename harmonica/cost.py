"""Cost: multiply-accumulates (MACs) of each site, counted while the model runs.

The gate is asked at every site, so a gate that reads a counter before and after `compute` knows
what the site costs. The model runs on fake tensors: every operation has its shape and no arithmetic
is done, so DiT-XL counts in a second.

`Schedule.speedup(macs)` turns a count into a theoretical speedup. This file does not know routers.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmonica.cache import gated
from harmonica.check import require_denoiser
from harmonica.denoise import Denoiser
from harmonica.table import Macs as Macs


def macs(denoiser: Denoiser) -> Macs:
    """Count the MACs of one guided prediction for one image, which `draw` gives, site by site.

    Matrix products, convolutions and attention count; norms, activations and other element-wise
    work do not, as in the field's tables. With guidance a prediction runs the model on two samples,
    so it counts twice the published figures.
    """
    require_denoiser(denoiser)
    x, cond = denoiser.draw(1, torch.Generator().manual_seed(0))
    return count(lambda: denoiser.predict(x, 0, cond), denoiser.sites)


def count(run: Callable[[], Any], sites: Mapping[str, nn.Module], *, fake: bool = True) -> Macs:
    """Count the MACs of `run`, which calls a model once, site by site; no gradients are taken.

    `fake` computes shapes only; a model that looks at its tensors' values then raises RuntimeError.
    """
    counts = [0.0] * len(sites)
    counter = FlopCounterMode(display=False)
    shapes = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()

    def gate(site: int, compute: Callable[[], Any]) -> Any:
        before = counter.get_total_flops()
        feature = compute()
        counts[site] += counter.get_total_flops() - before
        return feature

    # The fused attention kernels of the CPU are invisible to the counter; the plain one is two
    # counted products. What was compiled runs as Python: an attempt that fails would ever after.
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), eager, sdpa_kernel(SDPBackend.MATH), shapes, counter, gated(sites, gate):
        run()
    each = torch.tensor(counts, dtype=torch.float64) / 2  # two operations are one MAC
    return Macs(each, counter.get_total_flops() / 2 - float(each.sum()))
