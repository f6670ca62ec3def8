"""Memory: what a device has free, work in portions that fit, and the most that work would take.

On torch's meta device a tensor has a shape and no numbers, so a model of any size costs nothing
there. `Meter` follows the storages that are alive while work runs. This file does not know models.
"""

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from harmonica.override import overridden

R = TypeVar("R")

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_efficient_attention


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that memory ran out; torch has no class for the CPU's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return "DefaultCPUAllocator" in said or "bad_alloc" in said


def free_bytes(device: torch.device) -> int:
    """Return how much of a device's memory is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_portions(run: Callable[[int, int], R], total: int, size: int) -> Iterator[R]:
    """Yield run(first, last) for portions of `total` noises, halving `size` where memory runs out.

    Raises the device's own error where a single noise does not fit.

    >>> list(in_portions(lambda first, last: last - first, 5, 2))
    [2, 2, 1]
    """
    first = 0
    while first < total:
        try:
            result = run(first, min(first + size, total))
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = max(size // 2, 1)
            continue
        yield result
        first += size


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations take or give, as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0  # bytes now, and at most
        self.macs = 0.0  # multiply-accumulates so far, those of backward passes included
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._follow((args, kwargs))
        out = _without_numbers(func, args, kwargs or {})
        self._follow(out)
        if func._overloadpacket in flop_registry:  # two operations are one MAC
            flops = flop_registry[func._overloadpacket]
            self.macs += flops(*args, **(kwargs or {}), out_val=out) / 2
        return out

    def _follow(self, values: Any) -> None:
        for tensor in (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                weakref.finalize(storage, self._free, key, size)
                self.alive += size
                self.peak = max(self.peak, self.alive)

    def _free(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.alive -= size


@contextmanager
def metered() -> Iterator[Meter]:
    """Count what runs inside, on meta tensors.

    A number that is asked of a meta tensor is 1: a score of 1 computes and renews the cache, which
    is the most that a step can take. Attention is the kernel that does not keep the scores of all
    pairs of tokens.
    """
    with overridden([(F, "scaled_dot_product_attention", _fused)]), Meter() as meter:
        yield meter


def _fused(original: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    if not args[0].is_meta:
        return original(*args, **kwargs)
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    result: Tensor = ATTENTION(*args[:3], mask, args[0].requires_grad)[0]
    return result


def _without_numbers(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation; where it would need numbers of a meta tensor, they are 1."""
    source = args[1] if func is aten.copy_.default else args[0] if args else None
    if not isinstance(source, Tensor) or not source.is_meta:
        return func(*args, **kwargs)
    if func is aten._local_scalar_dense.default:
        return torch.ones((), dtype=source.dtype).item()
    if func is aten.equal.default:
        return True
    if func is aten.copy_.default and not args[0].is_meta:
        return args[0].fill_(1)
    place = torch.device(kwargs.get("device") or "meta")
    if func is aten._to_copy.default and place.type != "meta":
        return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=place)
    return func(*args, **kwargs)
