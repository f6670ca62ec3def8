"""DiT (Peebles & Xie 2023) in the original checkpoints' parameter names, and its denoiser.

A DiT is a ViT on latent patches whose every block is steered by the timestep and the class through
adaLN-zero:

    c = embed(t) + embed(y)                                              (B, D)
    shift₁, scale₁, α₁, shift₂, scale₂, α₂ = adaLN(c)                    6 × (B, D)
    h = h + α₁ · attn(norm(h)·(1 + scale₁) + shift₁)                     (B, L, D)
    h = h + α₂ · mlp (norm(h)·(1 + scale₂) + shift₂)                     (B, L, D)

`attn` and `mlp` of each block are the cacheable sites. α₁ and α₂ are the model's own adaLN gates,
(B, 1, D), and are no cache's gates. The cache keeps a site's output before α, so a reused output is
still multiplied by the α of the current step.

    B batch   C latent channels   H, W latent size   P patch size   L tokens   D hidden size

A checkpoint of the original (`DiT-XL-2-256x256.pt`) loads strictly. This file knows no cache,
schedule or router.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harmonica.models import layers
from harmonica.models.guided import Guided, check_inputs
from harmonica.models.layers import Attention, Mlp, PatchEmbedder
from harmonica.run_again import run_again
from harmonica.samplers import Sampler


class Block(nn.Module):
    """One adaLN-zero block (the two lines of the module docstring)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h: Tensor, c: Tensor) -> Any:
        """Update tokens h (B, L, D) under condition c (B, D)."""
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # 6 × (B, 1, D)
        shift1, scale1, alpha1, shift2, scale2, alpha2 = parts
        h = h + alpha1 * self.attn(self.norm1(h) * (1 + scale1) + shift1)
        return h + alpha2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)


class TimestepEmbedder(nn.Module):
    """Timestep 0 … 999 to vector, by 256 sinusoids and two layers: (B,) -> (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        waves = layers.sinusoids(t, 256)  # (B, 256)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """Modulate once more and project each token to its patch: (B, L, D) -> (B, L, P·P·C_out)."""

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)  # (B, 1, D)
        return self.linear(self.norm_final(h) * (1 + scale) + shift)  # type: ignore[no-any-return]


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Return fixed 2-D sine-cosine position embeddings (1, grid², dim), column half first."""
    rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # (D/4,)
    place = torch.arange(grid, dtype=torch.float64)
    angles = place[:, None] * rates  # (grid, D/4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D/2)
    columns, rows = waves.repeat(grid, 1), waves.repeat_interleave(grid, 0)  # (L, D/2) each
    return torch.cat([columns, rows], dim=1)[None].float()


class DiT(nn.Module):
    """A diffusion transformer conditioned on a class; the defaults are DiT-XL/2's.

    Args:
        input_size, patch_size: H = W of the latent (32 for 256×256 images, 64 for 512×512); P.
        in_channels: C, 4 for the Stable Diffusion latent.
        hidden_size, num_heads, depth: D; heads of an attention; number of blocks.
        num_classes: real classes; label `num_classes` is the null class.
        learn_sigma: predict a variance channel for each noise channel, as the original does.

    Raises ValueError unless P divides H, and 4 and num_heads divide D.
    """

    def __init__(
        self, *, input_size: int = 32, patch_size: int = 2, in_channels: int = 4,
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        layers.check_sizes(input_size, patch_size, hidden_size, num_heads)
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.patch_size, self.out_channels = patch_size, in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbedder(in_channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        labels = nn.Embedding(num_classes + 1, hidden_size)  # the last row is of the null class
        self.y_embedder = nn.Sequential(OrderedDict(embedding_table=labels))
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, L, D)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.activation_checkpointing = False  # `harmonica.run_again`

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise, and variance if learned, (B, C or 2C, H, W), for t and y (B,)."""
        h = self.x_embedder(x) + self.pos_embed  # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            h = run_again(block, h, c) if self.activation_checkpointing else block(h, c)
        return layers.unpatchify(self.final_layer(h, c), self.patch_size, self.out_channels)


class DiTDenoiser(Guided):
    """A frozen DiT. Guidance runs one batch [conditional, null] of 2B.

    Args (the others are described at `Guided`):
        guided_channels: how many channels guidance mixes, in both halves; all of them by default,
            the original mixes 3 of its 4 latent channels.
        sites: by default `attn` and `mlp` of every block.
    """

    def __init__(
        self, model: DiT, sampler: Sampler, *, guidance: float = 1.5,
        guided_channels: int | None = None, name: str = "dit",
        sites: Mapping[str, nn.Module] | None = None,
    ) -> None:  # fmt: skip
        shape, sites = (model.in_channels, *2 * [model.input_size]), sites or layers.sites_of(model)
        super().__init__(model, sampler, guidance, name, sites, shape, model.num_classes)
        self.guided_channels = model.in_channels if guided_channels is None else guided_channels

    def predict(self, x: Tensor, k: int, cond: Tensor) -> Tensor:
        """Return the guided output at step k for x (B, C, H, W) and class labels (B,).

        That is (B, C or 2C, H, W) without guidance and (2B, …) with it, since the released training
        loss is taken over both halves of the batch, [conditional, null]. Guided channels are the
        same in both; the others, such as variances, stay what each half predicted.
        """
        check_inputs(x, cond, self.shape, self.conditions)
        t, narrow = self.clock(x, k), x.to(next(self.model.parameters()).dtype)
        if self.guidance == 1.0:
            return self.model(narrow, t, cond).to(x.dtype)  # type: ignore[no-any-return]
        labels = torch.cat([cond, torch.full_like(cond, self.conditions)])  # (2B,)
        out = self.model(torch.cat([narrow, narrow]), torch.cat([t, t]), labels).to(x.dtype)
        guided = self.mix(*out[:, : self.guided_channels].chunk(2))  # (B, guided, H, W)
        return torch.cat([torch.cat([guided, guided]), out[:, self.guided_channels :]], dim=1)
