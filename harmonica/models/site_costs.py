"""Site costs: the multiply-accumulates of a transformer's sites, counted in a forward.

Counting runs a twin of the transformer that shares its weights, on fake tensors where the model
allows that. This file does not know how sites are found.
"""

from __future__ import annotations

import copy
import inspect
import logging
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from harmonica.cost import Count, Macs, count
from harmonica.models.sites import Modules


def count_calls(transformer: nn.Module, modules: Modules, inputs: Any) -> Count | None:
    """Count a forward, `inputs` being its keyword arguments, for modules of one's own choice; None
    if torch cannot count it: fake tensors have no values, flex attention has no counter.
    """
    paths = {id(module): path for path, module in transformer.named_modules()}
    if any(id(module) not in paths for module in modules.values()):
        return None
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled, before = True, log.disabled  # it would print the stack of what is caught here
    try:
        for fake in (True, False):
            twin = _twin(transformer)
            mine = {name: twin.get_submodule(paths[id(part)]) for name, part in modules.items()}
            own = tree_map(lambda leaf: leaf, dict(inputs))  # some models take parts out of it
            with suppress(RuntimeError, TypeError):
                return count(partial(twin, **own), mine, fake=fake)
    finally:
        log.disabled = before
    _twin(transformer)(**inputs)  # raises what is wrong with the inputs, if that was it
    return None


def _twin(transformer: nn.Module) -> nn.Module:
    """Return a copy that shares the weights, and whose modules run the forward of their class."""
    tensors = chain(transformer.parameters(), transformer.buffers())
    twin = copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # a wrapper that was copied still calls the original
    return twin


def cost_of_call(model: nn.Module, modules: Modules, inputs: Any) -> Macs | None:
    """Count a call (args, kwargs) with zeros for its tensors; None if torch cannot."""
    zeros = partial(torch.zeros_like, device=next(model.parameters()).device)
    args, kwargs = tree_map_only(Tensor, zeros, inputs)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    with torch.no_grad():
        count = count_calls(model, modules, {**dict(zip(names, args, strict=False)), **kwargs})
    return count and count.macs
