"""Cost: multiply-accumulates (MACs) of each site, counted while the model runs.

The gate is asked at every site, so a gate that reads a counter before and after `compute` knows
what the site costs. The model runs on fake tensors: every operation has its shape and no arithmetic
is done, so DiT-XL counts in a second.

`Schedule.speedup(macs)` turns a count into a theoretical speedup. This file does not know routers.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
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


def cost_of_call(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Any) -> Macs | None:
    """Count a call (args, kwargs) on zeros; None if torch cannot, as where attention is flex."""
    paths = {id(module): path for path, module in model.named_modules()}
    if any(id(module) not in paths for module in modules.values()):
        return None
    zeros = partial(torch.zeros_like, device=next(model.parameters()).device)

    def call(twin: nn.Module) -> Any:
        args, kwargs = tree_map_only(Tensor, zeros, inputs)  # some models take parts out of them
        return twin(*args, **kwargs)

    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled, before = True, log.disabled  # it would print the stack of what is caught here
    try:
        for fake in (True, False):
            twin = _twin(model)
            mine = {name: twin.get_submodule(paths[id(part)]) for name, part in modules.items()}
            with suppress(RuntimeError, TypeError):
                return count(partial(call, twin), mine, fake=fake)
    finally:
        log.disabled = before
    with torch.no_grad():
        call(_twin(model))  # raises what is wrong with the inputs, if that was it
    return None


def _twin(transformer: nn.Module) -> nn.Module:
    """Return a copy that shares the weights; what the model keeps between calls stays as it is."""
    tensors = chain(transformer.parameters(), transformer.buffers())
    twin = copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # a wrapper that was copied still calls the original
    return twin
