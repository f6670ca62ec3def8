"""U-ViT (Bao et al. 2023) in the original checkpoints' parameter names, and its denoiser.

A U-ViT is a ViT in which everything is a token, label and timestep too, and whose blocks are joined
in pairs by long skips, the first with the last, as in a U-Net:

    h = [embed(y), embed(t), patches(x)] + positions                              (B, 2 + N, D)
    h = h + attn(norm1(h));  h = h + mlp(norm2(h))       each block               (B, 2 + N, D)
    h = skip_linear([h, skip])                           before it, in out_blocks (B, 2 + N, D)

`attn` and `mlp` of each block are the cacheable sites. Nothing scales their output afterwards: it
is added as it is. `skip_linear` always computes, 7 % of U-ViT-H/2.

The original guides with two calls of the model, one for each label, and a cache for each call. Here
both calls run side by side, block by block, as *streams*. A site is asked once and answers for all
streams, so its feature is a tuple and one cache holds what two would; each stream is computed as in
a call of its own, bit for bit.

    B batch   C latent channels   H, W latent size   P patch size   N patches   D hidden size
    S streams, one for each label that the model is asked about: 2 with guidance, 1 without

A checkpoint of the original (`imagenet256_uvit_huge.pth`) loads strictly. This file does not know
caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from harmonica.models import layers
from harmonica.models.guided import Guided, check_inputs
from harmonica.run_again import run_again
from harmonica.samplers import Sampler

UVIT_H = {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28}
UVIT_H |= {"num_heads": 16, "num_classes": 1000}
"""Arguments of `UViT` for U-ViT-H/2 on ImageNet 256×256: 58 sites, 501 million parameters."""

Streams = tuple[Tensor, ...]
"""S tensors of one shape that go through the model side by side and never meet."""

EXTRAS = 2
"""Tokens before the patches: the label's, then the timestep's."""


def each(function: Callable[..., Tensor], *streams: Streams) -> Streams:
    """Apply `function` to every stream by itself, with the matching parts of further ones, if any.

    >>> each(torch.sub, (torch.tensor(5), torch.tensor(7)), (torch.tensor(1), torch.tensor(2)))
    (tensor(4), tensor(5))
    """
    return tuple(function(*parts) for parts in zip(*streams, strict=True))


class Attention(layers.Attention):
    """Multi-head self-attention within each stream: S × (B, L, D) -> S × (B, L, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, bias=False)

    def forward(self, h: Streams) -> Streams:  # type: ignore[override]
        """Attend over the L tokens."""
        return each(super().forward, h)


class Mlp(layers.Mlp):
    """Feed-forward network with exact GELU: S × (B, L, D) -> S × (B, L, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden, approximate="none")

    def forward(self, h: Streams) -> Streams:  # type: ignore[override]
        """Transform each token by itself."""
        return each(super().forward, h)


class Block(nn.Module):
    """One pre-norm block (the middle line above), joined to a long skip first if `skip` is true."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, *, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, h: Streams, skip: Streams = ()) -> Streams:
        """Update tokens h, S × (B, L, D), with those of the long skip, if the block has one."""
        if self.skip_linear is not None:
            h = each(self.skip_linear, each(lambda *pair: torch.cat(pair, dim=-1), h, skip))
        h = each(torch.add, h, self.attn(each(self.norm1, h)))
        return each(torch.add, h, self.mlp(each(self.norm2, h)))


class UViT(nn.Module):
    """A U-ViT conditioned on a class. It predicts noise alone, no variance.

    Args as of `DiT`, except
        depth: blocks on both sides of the middle one, which is not counted; even.
        num_classes: real classes; label `num_classes` is the null one. (The original counts both.)

    Raises ValueError if a size does not divide another.

    >>> model = UViT(input_size=4, in_channels=1, hidden_size=8, depth=2, num_heads=2,
    ...     num_classes=3)
    >>> x, t, y = torch.zeros(5, 1, 4, 4), torch.ones(5), torch.zeros(5, dtype=torch.long)
    >>> [noise.shape for noise in model(x, t, (y, y + 3))]
    [torch.Size([5, 1, 4, 4]), torch.Size([5, 1, 4, 4])]
    """

    def __init__(
        self, *, input_size: int = 32, patch_size: int = 2, in_channels: int = 4,
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, num_classes: int = 1000,
        mlp_ratio: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        layers.check_divisible(
            ("input_size", input_size, "patch_size", patch_size),
            ("hidden_size", hidden_size, "num_heads", num_heads),
            ("hidden_size", hidden_size, "the two halves of the sinusoids,", 2),
            ("depth", depth, "the two sides of the middle block, which is not counted,", 2),
        )
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.activation_checkpointing = num_classes, False
        self.patch_embed = layers.PatchEmbedder(in_channels, patch_size, hidden_size)
        self.label_emb = nn.Embedding(num_classes + 1, hidden_size)
        tokens = EXTRAS + (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size))  # (1, 2 + N, D)
        sizes = (hidden_size, num_heads, mlp_ratio)
        self.in_blocks = nn.ModuleList(Block(*sizes) for _ in range(depth // 2))
        self.mid_block = Block(*sizes)
        self.out_blocks = nn.ModuleList(Block(*sizes, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_pred = nn.Linear(hidden_size, patch_size * patch_size * in_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Start linear layers and positions small, as the original does, whose normal distribution
        is cut at ±2, a hundred standard deviations away.
        """
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Sequence[Tensor]) -> Streams:
        """Predict the noise in x (B, C, H, W) at times t (B,), above 0 up to 1000, once for each of
        S labels (B,): S × (B, C, H, W).
        """
        patches = self.patch_embed(x)  # (B, N, D)
        time = layers.sinusoids(t, patches.shape[2]).to(patches.dtype)[:, None]  # (B, 1, D)
        named = (self.label_emb(y)[:, None] for y in labels)  # S × (B, 1, D)
        h: Streams = tuple(torch.cat([y, time, patches], dim=1) + self.pos_embed for y in named)
        skips: list[Streams] = []
        run = run_again if self.activation_checkpointing else lambda block, *inputs: block(*inputs)
        for block in self.in_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.mid_block, h)
        for block in self.out_blocks:
            h = run(block, h, skips.pop())
        return each(self._decode, h)

    def _decode(self, h: Tensor) -> Tensor:
        """Project each patch token to its patch, (B, 2 + N, D) -> (B, C, H, W)."""
        flat = self.decoder_pred(self.norm(h))[:, EXTRAS:]  # (B, N, P·P·C)
        return layers.unpatchify(flat, self.patch_size, self.in_channels)


class UViTDenoiser(Guided):
    """A frozen U-ViT. Guidance asks for two streams and mixes all channels.

    The original writes it as ε_cond + s·(ε_cond − ε_null), so g = 1 + s; its s is 0.4. The model
    counts the sampler's timesteps 0 … 999 from 1.
    """

    def __init__(
        self, model: UViT, sampler: Sampler, *, guidance: float = 1.4, name: str = "uvit-h"
    ) -> None:
        kinds = (Attention, Mlp)
        sites = {name: part for name, part in model.named_modules() if isinstance(part, kinds)}
        shape = (model.in_channels, model.input_size, model.input_size)
        super().__init__(model, sampler, guidance, name, sites, shape, model.num_classes)

    def predict(self, x: Tensor, k: int, cond: Tensor) -> Tensor:
        """Return the guided noise (B, C, H, W) at step k for class labels (B,)."""
        check_inputs(x, cond, self.shape)
        labels = (cond, torch.full_like(cond, self.conditions))[: 1 if self.guidance == 1.0 else 2]
        streams = self.model(x.to(self.model.pos_embed.dtype), self.clock(x, k, first=1.0), labels)
        outs = [noise.to(x.dtype) for noise in streams]  # (B, C, H, W) each
        return outs[0] if len(outs) == 1 else self.mix(*outs)
