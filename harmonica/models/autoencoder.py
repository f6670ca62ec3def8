"""Autoencoder: from the latent that a walk ends in to an image a person can look at.

    decoder(name, weights)(x)     x (B, C, H, W) latent -> images (B, 3, 8H, 8W) in [−1, 1]

The bundled model has no autoencoder, its latent is the image. With random weights there is no image
to see: the first three channels of the latent stand in for one.

This file does not know samplers, caches or routers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.models.pixart import PIXART
from harmonica.models.weights import component, from_diffusers
from harmonica.storage.files import StrPath
from harmonica.storage.hub import download

Decoder = Callable[[Tensor], Tensor]


def decoder(
    name: str,
    weights: StrPath | None = None,
    *,
    vae: StrPath | None = None,
    device: str | torch.device = "cpu",
) -> Decoder:
    """Return what turns the latents of a model into images, one image at a time, in float32.

    Args:
        name: of the model, as in `load`.
        weights: as given to `load`; a diffusers folder has its own autoencoder, "random" has none.
        vae: folder of an autoencoder saved by diffusers, to use instead.
        device: where it runs.

    Raises:
        FileNotFoundError: if it is not on this machine and cannot be fetched.
        FileNotFoundError: if a folder has no autoencoder.
    """
    if name == "tiny":
        return lambda x: x
    if vae is None and weights == "random":
        return lambda x: x[:, :3] / x[:, :3].abs().amax(dim=(1, 2, 3), keepdim=True)
    model = _read(name, weights, vae).to(device).eval().requires_grad_(False)
    scale = model.config.scaling_factor

    def decode(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [model.decode(sample[None].float() / scale).sample.clamp(-1, 1) for sample in x]
            )

    return decode


def _read(name: str, weights: StrPath | None, vae: StrPath | None) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if vae is not None:
        folder = component(vae, "vae")
    elif weights is not None and (Path(weights) / "vae").is_dir():
        folder = Path(weights) / "vae"
    else:
        ways = "pass the folder of an autoencoder saved by diffusers (--vae)"
        if name in PIXART:
            folder = download(PIXART[name].rest, ["vae/*"], otherwise=ways) / "vae"
        else:
            folder = download(
                "stabilityai/sd-vae-ft-ema", ["*.json", "*.safetensors"], otherwise=ways
            )
    return from_diffusers(AutoencoderKL, folder)
