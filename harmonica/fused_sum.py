"""Fused sum: Σⱼ wⱼ·fⱼ in one pass over memory, a kernel in Triton for CUDA devices.

PyTorch adds one term after another: each reads the sum so far and writes it back. The kernel reads
each term once, adds in float32, rounds once and writes once. At DiT-XL/2 with a sum of four terms
at every entry that is half of what the sums cost (docs/log.md, 2026-11-27). Triton comes with torch
for CUDA; where it is missing, `weighted_sum` adds term by term.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TERMS, BLOCK = 4, 2048  # terms of one launch, and elements of one program


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


def fused_sum(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Return Σⱼ wⱼ·fⱼ of contiguous terms of one shape and dtype; four in one pass."""
    out, count = torch.empty_like(terms[0]), min(len(terms), TERMS)
    fill = TERMS - count  # arguments that the kernel does not read
    tensors, scales = [*terms[:count], *[terms[0]] * fill], [*weights[:count], *[0.0] * fill]
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        grid = (triton.cdiv(out.numel(), BLOCK),)
        _kernel[grid](out, *tensors, *scales, out.numel(), terms=count, block=BLOCK)
    rest = terms[count:]
    return fused_sum([1.0, *weights[count:]], [out, *rest]) if rest else out
