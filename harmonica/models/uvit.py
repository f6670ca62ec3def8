"""U-ViT (Bao et al. 2023) in the original checkpoints' parameter names, and its denoiser.

A U-ViT is a ViT in which everything is a token, label and timestep too, and whose blocks are joined
in pairs by long skips, the first with the last, as in a U-Net:

    h = [embed(y), embed(t), patches(x)] + positions                              (B, 2 + L, D)
    h = h + attn(norm1(h));  h = h + mlp(norm2(h))       each block               (B, 2 + L, D)
    h = skip_linear([h, skip])                           before it, in out_blocks (B, 2 + L, D)

`attn` and `mlp` of each block are the cacheable sites. Nothing scales their output afterwards: it
is added as it is. `skip_linear` always computes, 7 % of U-ViT-H/2.

    B batch   C latent channels   H, W latent size   P patch size   L patches   D hidden size

A checkpoint of the original (`imagenet256_uvit_huge.pth`) loads strictly. This file knows no
cache, schedule or router.
"""

import torch
from torch import Tensor, nn

from harmonica.models import layers
from harmonica.models.guided import Guided, check_inputs
from harmonica.models.layers import Attention, Mlp
from harmonica.override import in_call
from harmonica.run_again import run_again
from harmonica.samplers import Sampler
from harmonica.values import require

UVIT_H = {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28}
UVIT_H |= {"num_heads": 16, "num_classes": 1000}
"""Arguments of `UViT` for U-ViT-H/2 on ImageNet 256×256: 58 sites, 501 million parameters."""

EXTRAS = 2
"""Tokens before the patches: the label's, then the timestep's."""


class Block(nn.Module):
    """One pre-norm block (the middle line above), joined to a long skip first if `skip` is true."""

    def __init__(self, dim: int, num_heads: int, *, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, approximate="none")
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, h: Tensor, skip: Tensor | None = None) -> Tensor:
        """Update tokens h (B, 2 + L, D) with those of the long skip, if the block has one."""
        if self.skip_linear is not None and skip is not None:
            h = self.skip_linear(torch.cat([h, skip], dim=-1))
        h = h + self.attn(self.norm1(h))
        return h + self.mlp(self.norm2(h))  # type: ignore[no-any-return]


class UViT(nn.Module):
    """A U-ViT conditioned on a class. It predicts noise alone, no variance.

    Args as of `DiT`, but `depth` counts the blocks on both sides of the middle one and is even.
    (The original's `num_classes` counts the null class too.)
    """

    def __init__(
        self, *, input_size: int = 32, patch_size: int = 2, in_channels: int = 4,
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, num_classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__()
        layers.check_sizes(input_size, patch_size, hidden_size, num_heads)
        sides = "it must be even: half of the blocks on each side of the middle one"
        require(depth % 2 == 0, f"depth is {depth}; {sides}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.activation_checkpointing = num_classes, False
        self.patch_embed = layers.PatchEmbedder(in_channels, patch_size, hidden_size)
        self.label_emb = nn.Embedding(num_classes + 1, hidden_size)
        tokens = EXTRAS + (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, hidden_size))  # (1, 2 + L, D)
        sizes = hidden_size, num_heads
        self.in_blocks = nn.ModuleList(Block(*sizes) for _ in range(depth // 2))
        self.mid_block = Block(*sizes)
        self.out_blocks = nn.ModuleList(Block(*sizes, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_pred = nn.Linear(hidden_size, patch_size * patch_size * in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise in x (B, C, H, W) at times t (B,), 0 < t ≤ 1000, for labels y (B,)."""
        patches = self.patch_embed(x)  # (B, L, D)
        time = layers.sinusoids(t, patches.shape[2]).to(patches.dtype)[:, None]  # (B, 1, D)
        h = torch.cat([self.label_emb(y)[:, None], time, patches], dim=1) + self.pos_embed
        skips: list[Tensor] = []
        run = run_again if self.activation_checkpointing else lambda block, *inputs: block(*inputs)
        for block in self.in_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.mid_block, h)
        for block in self.out_blocks:
            h = run(block, h, skips.pop())
        flat = self.decoder_pred(self.norm(h))[:, EXTRAS:]  # (B, L, P·P·C)
        return layers.unpatchify(flat, self.patch_size, self.in_channels)


class UViTDenoiser(Guided):
    """A frozen U-ViT. Guidance calls it for the labels and for the null class, as the original
    does, and mixes all channels; a site has a feature for each call (`harmonica.calls`).

    The original writes it as ε_cond + s·(ε_cond − ε_null), so g = 1 + s; its s is 0.4. The model
    counts the sampler's timesteps 0 … 999 from 1.
    """

    def __init__(
        self, model: UViT, sampler: Sampler, *, guidance: float = 1.4, name: str = "uvit-h"
    ) -> None:
        shape, sites = (model.in_channels, *2 * [model.input_size]), layers.sites_of(model)
        super().__init__(model, sampler, guidance, name, sites, shape, model.num_classes)

    def predict(self, x: Tensor, k: int, cond: Tensor) -> Tensor:
        """Return the guided noise (B, C, H, W) at step k for class labels (B,)."""
        check_inputs(x, cond, self.shape, self.conditions)
        t, narrow, outs = self.clock(x, k, first=1.0), x.to(self.model.pos_embed.dtype), []
        for call, y in enumerate((cond, torch.full_like(cond, self.conditions))):
            with in_call(call):
                outs.append(self.model(narrow, t, y).to(x.dtype))  # (B, C, H, W)
            if self.guidance == 1.0:
                return outs[0]  # type: ignore[no-any-return]
        return self.mix(*outs)
