"""Layers that DiT and U-ViT share, in the parameter names of the original checkpoints.

B batch   L tokens   D hidden size   C channels   P patch size
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonica.values import require


class Attention(nn.Module):
    """Multi-head self-attention: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        heads = self.qkv(h).unflatten(2, (3, self.num_heads, -1))  # (B, L, 3, heads, D/heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, heads, L, D/heads) each
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Feed-forward network with GELU, exact ("none") or by "tanh": (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, hidden: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(h), approximate=self.approximate))
        return out


class PatchEmbedder(nn.Module):
    """Cut into P×P patches and project each to a token: (B, C, H, W) -> (B, L, D)."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # contiguous, else transposed strides slow every norm and sum down
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # type: ignore[no-any-return]


def unpatchify(tokens: Tensor, patch_size: int, channels: int) -> Tensor:
    """Lay a square grid of patches (B, L, P·P·C) out as images: (B, C, H, W)."""
    grid, p = math.isqrt(tokens.shape[1]), patch_size
    patches = tokens.view(len(tokens), grid, grid, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(-1, channels, grid * p, grid * p)


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """Return cosines, then sines, of timesteps t (B,) at dim/2 rates from 1 down to almost 1e-4:
    (B, dim) float32.

    >>> sinusoids(torch.zeros(1), 4)
    tensor([[1., 1., 0., 0.]])
    """
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t[:, None].float() * torch.exp(-math.log(10000.0) * exponents)  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sites_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention and feed-forward of every block by name, in the order they run."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Attention | Mlp)}


def check_sizes(input_size: int, patch_size: int, hidden_size: int, num_heads: int) -> None:
    """Raise ValueError if patches do not fill the input, or heads do not divide the hidden size."""
    by = f"it must be divisible by patch_size {patch_size}"
    require(input_size % patch_size == 0, f"input_size is {input_size}; {by}")
    by = f"it must be divisible by num_heads {num_heads}, and by 4"
    require(hidden_size % num_heads == hidden_size % 4 == 0, f"hidden_size is {hidden_size}; {by}")
