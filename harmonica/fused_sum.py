"""Fused sum: Σⱼ wⱼ·fⱼ in one pass over memory, a kernel in Triton for CUDA devices.

PyTorch adds one term after another: each reads the sum so far and writes it back. The kernel reads
each term once, adds in float32, rounds once and writes once. At DiT-XL/2 with a sum of four terms
at every entry that is half of what the sums cost (docs/log.md, 2026-11-27). Triton comes with torch
for CUDA.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

TERMS, BLOCK = 4, 2048  # terms of one launch, and elements of one program

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202
        out, a, b, c, d, wa, wb, wc, wd, n, terms: tl.constexpr, block: tl.constexpr  # noqa: ANN001
    ):  # fmt: skip
        i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = i < n
        total = wa * tl.load(a + i, mask=inside).to(tl.float32)
        if terms > 1:
            total += wb * tl.load(b + i, mask=inside).to(tl.float32)
        if terms > 2:
            total += wc * tl.load(c + i, mask=inside).to(tl.float32)
        if terms > 3:
            total += wd * tl.load(d + i, mask=inside).to(tl.float32)
        tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


def one_pass(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor | None:
    """Return Σⱼ wⱼ·fⱼ, or None where the kernel cannot give it: not on CUDA, without Triton, while
    gradients are recorded, or of terms that are not plain, contiguous and of one shape and dtype.
    """
    first = terms[0]
    if triton is None or not first.is_cuda or not _alike(terms):
        return None
    return fused_sum(weights, terms) if _works(first.device, first.dtype) else None


def fused_sum(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Return Σⱼ wⱼ·fⱼ of terms that are alike; four in one pass."""
    out, count = torch.empty_like(terms[0]), min(len(terms), TERMS)
    fill = TERMS - count  # arguments that the kernel does not read
    tensors, scales = [*terms[:count], *[terms[0]] * fill], [*weights[:count], *[0.0] * fill]
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        grid = (triton.cdiv(out.numel(), BLOCK),)
        _kernel[grid](out, *tensors, *scales, out.numel(), terms=count, block=BLOCK)
    rest = terms[count:]
    return fused_sum([1.0, *weights[count:]], [out, *rest]) if rest else out


def _alike(terms: Sequence[Tensor]) -> bool:
    kinds = {(type(t), t.shape, t.dtype, t.device, t.is_contiguous()) for t in terms}
    first = terms[0]
    known = first.dtype in (torch.float32, torch.bfloat16, torch.float16)
    plain = type(first) is Tensor and first.is_contiguous() and not torch.is_grad_enabled()
    return len(kinds) == 1 and known and plain


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Try the kernel once; warn if there is no C compiler, or the card does not know the dtype."""
    try:
        fused_sum([1.0] * TERMS, [torch.zeros(16, device=device, dtype=dtype)] * TERMS)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        warnings.warn(f"weighted sums go term by term: Triton fails with {error!r}", stacklevel=2)
        return False
    return True
