"""Site costs: the multiply-accumulates of a transformer's sites, counted in a forward.

Counting runs a twin of the transformer that shares its weights, on fake tensors where the model
allows that. This file does not know how sites are found.
"""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from harmonica.cost import Macs, count
from harmonica.models.sites import Modules


def cost_of_call(model: nn.Module, modules: Modules, inputs: Any) -> Macs | None:
    """Count a call (args, kwargs) of a model, with zeros for its tensors; None if torch cannot:
    fake tensors have no values, flex attention has no counter.
    """
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
    """Return a copy that shares the weights, and whose modules run the forward of their class."""
    tensors = chain(transformer.parameters(), transformer.buffers())
    twin = copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # a wrapper that was copied still calls the original
    return twin
