"""Memory: what a device has free, and work in portions that fit. This file does not know models."""

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

R = TypeVar("R")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that memory ran out; torch has no class for the CPU's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return "DefaultCPUAllocator" in said or "bad_alloc" in said


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def check_device(device: Any, name: str = "device") -> None:
    """Raise ValueError, saying why, if torch cannot put a tensor on a device."""
    try:
        torch.empty(1, device=device)
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:  # it is not there
        raise ValueError(f"{name} {device}: {first_line(error)}") from None


def free_bytes(device: torch.device) -> int:
    """Return how much of a device's memory is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


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
