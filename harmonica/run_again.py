"""Run a step or a block once more in backward, instead of keeping what it computed.

Inside a step that is run again, its blocks are not: one level saves the memory, and backward would
run the blocks of the inner level when the step's gates are no longer in force.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from harmonica.calls import current_call
from harmonica.override import in_call

_inside: ContextVar[bool] = ContextVar("inside", default=False)


def run_again(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    """Return function(*args); where gradients are on, keep only args and run it again in backward.

    Less memory, more time, the same gradients. The function must not draw random numbers.
    """
    if _inside.get() or not torch.is_grad_enabled():
        return function(*args)
    run = in_call(current_call.get())(run_once)  # backward is in no call, and sites ask for theirs
    return checkpoint(run, function, *args, use_reentrant=False, preserve_rng_state=False)


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args), keeping for backward all that it computes, in its blocks as well."""
    token = _inside.set(True)
    try:
        return function(*args)
    finally:
        _inside.reset(token)
