"""Autoencoder: from the latent that a walk ends in to an image a person can look at.

    decoder(name, weights)(x)     x (B, C, H, W) latent -> images (B, 3, 8H, 8W) in [−1, 1]

The bundled model has no autoencoder, its latent is the image. With random weights there is no image
to see: the first three channels of the latent stand in for one. This file does not know samplers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.models import BUNDLED
from harmonica.models.pixart import PIXART
from harmonica.models.weights import component, from_diffusers
from harmonica.storage.hub import download
from harmonica.values import StrPath, require

ROOM = 2 * 2**30
"""Bytes that the largest layers may take while images are decoded, as many at a time as fit."""


def decoder(
    name: str, weights: StrPath | None = None, *, vae: StrPath | None = None,
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """Return what turns the latents of a model into float32 images, a few at a time (`ROOM`).

    Arguments are as in `load`: a diffusers folder has its own autoencoder, "random" has none. `vae`
    is the folder of another one, saved by diffusers. It computes in float32 where float16
    overflows, as the autoencoder itself says.

    Raises FileNotFoundError if a folder has no autoencoder, or none can be fetched, ValueError if
    one is given for a bundled model.
    """
    if name in BUNDLED:
        require(vae is None, f"vae is {vae}; leave it out, {name} makes pixels and needs none")
        return lambda x: x
    if vae is None and weights == "random":
        return lambda x: x[:, :3] / x[:, :3].abs().amax(dim=(1, 2, 3), keepdim=True)
    model = _read(name, weights, vae)
    if dtype == torch.float16 and model.config.force_upcast:
        dtype = torch.float32
    # diffusers' own `to` warns of modules that it does not have
    torch.nn.Module.to(model.eval().requires_grad_(False), device=device, dtype=dtype)

    def decode(x: Tensor) -> Tensor:
        latents = (x.float() / model.config.scaling_factor).to(dtype)  # (B, C, H, W)
        # At full size a decoder holds three features of the second of its widths.
        pixels, width = 64 * x.shape[2:].numel(), max(model.config.block_out_channels[:2])
        chunks = latents.split(max(1, ROOM // (3 * width * pixels * latents.element_size())))
        with torch.no_grad():
            return torch.cat([model.decode(some).sample.float().clamp(-1, 1) for some in chunks])

    return decode


def _read(name: str, weights: StrPath | None, vae: StrPath | None) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    ways = "pass the folder of an autoencoder saved by diffusers (--vae)"
    local = vae or (weights if weights and (Path(weights) / "vae").is_dir() else None)
    if local is None:
        repository, files = "stabilityai/sd-vae-ft-ema", ["*.json", "*.safetensors"]
        if name in PIXART:
            repository, files = PIXART[name].rest, ["vae/*"]
        local = download(repository, files, otherwise=ways)
    return from_diffusers(AutoencoderKL, component(local, "vae"))
