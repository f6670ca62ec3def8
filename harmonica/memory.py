"""Memory: how much a piece of work takes at most, counted without doing it, and when it ran out."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that memory ran out; torch has no class for the CPU's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        name in str(error) for name in ("DefaultCPUAllocator", "bad_alloc")
    )
