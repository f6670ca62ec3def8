"""Guided: what the denoisers of DiT, PixArt and U-ViT share; a model's own adds `predict`.

    guidance   ε = ε_null + g·(ε_cond − ε_null), with g = 1 switched off; the null condition is a
               class or a prompt of its own

This file does not know what a gate does with a feature: it knows no cache, schedule or router.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self  # torch brings it along

from harmonica.cache import Gate
from harmonica.models.blocks import gated_blocks
from harmonica.models.precompute import precomputed
from harmonica.samplers import Memory, Sampler
from harmonica.values import number, of_type, require, whole


class Guided(ABC):
    """A frozen model, its sampler and its guidance: a `harmonica.denoise.Denoiser`.

    Args:
        model: frozen here, in place: evaluation mode, no weight asks for a gradient.
        sampler: its T timesteps are the steps of the walk.
        guidance: g; 1 switches guidance off, and below it is a ValueError.
        name: of the model, which schedules store.
        sites: cacheable modules by name, in the order in which they run.
        shape: (C, H, W) of the noise that `draw` returns.
        conditions: number of classes or prompts to draw from.
    """

    def __init__(
        self, model: Any, sampler: Sampler, guidance: float, name: str,
        sites: Mapping[str, nn.Module], shape: tuple[int, ...], conditions: int,
    ) -> None:  # fmt: skip
        guidance = number("guidance", guidance, 1)
        self.model = model.eval().requires_grad_(False)
        self.sampler, self.guidance, self.name = sampler, guidance, name
        self.sites, self.shape, self.conditions = sites, shape, conditions
        self.steps = len(sampler.timesteps)

    @property
    def about(self) -> dict[str, Any]:
        """What a table trained here belongs to, in the words of `Schedule`'s fields."""
        facts = {"model": self.name, "sampler": self.sampler.name, "guidance": self.guidance}
        return {**facts, "timesteps": self.sampler.timesteps}

    @property
    def draws_noise(self) -> bool:
        return self.sampler.draws_noise

    def with_steps(self, steps: int) -> Self:
        """Return the same model, sampler and guidance with another number of steps."""
        other = copy.copy(self)
        other.sampler, other.steps = self.sampler.with_steps(steps), steps
        return other

    @contextmanager
    def accelerated(self, gate: Gate, *, exact: bool) -> Iterator[Callable[[int], None]]:
        """Do what `harmonica.inference.walk.Accelerated` describes."""
        ahead = precomputed(self.model, self.sampler.timesteps, exact=exact)
        blocks = gated_blocks(self.model, self.sites, gate, exact=exact)
        with ahead as begin_step, blocks:
            yield begin_step

    @abstractmethod
    def predict(self, x: Tensor, k: int, cond: Tensor) -> Tensor:
        """Return the guided output at step k for x (B, C, H, W) and conditions (B,)."""

    def step(self, x: Tensor, out: Tensor, k: int, memory: Memory) -> Tensor:
        """Take x (B, C, H, W) to step k + 1 with the first B rows of the prediction `out`."""
        return self.sampler.step(x, out[: len(x)], k, memory)

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw pure noise (B, C, H, W) and numbers of classes or prompts (B,) to start walks from.

        One seed gives one noise on every machine: it is drawn on the generator's device, then
        moved. x is float32 where the weights are half as wide: a walk adds up small steps.
        """
        like: Tensor = next(self.model.parameters())
        batch_size, like_this = whole("batch_size", batch_size), "torch.Generator().manual_seed(0)"
        of_type("generator", generator, torch.Generator, like_this)
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        x = torch.randn((batch_size, *self.shape), **options)
        cond = torch.randint(self.conditions, (batch_size,), **options)
        wide = torch.promote_types(like.dtype, torch.float32)
        return x.to(like.device, wide), cond.to(like.device)

    def clock(self, x: Tensor, k: int, first: float = 0) -> Tensor:
        """Return the timestep of step k for each row of x, counted from `first`: (B,)."""
        return torch.full((len(x),), self.sampler.timesteps[k] + first, device=x.device)

    def mix(self, conditional: Tensor, null: Tensor) -> Tensor:
        """Return the guided output of two outputs of one shape."""
        return null + self.guidance * (conditional - null)


def check_inputs(x: Tensor, cond: Tensor, shape: tuple[int, ...], count: int) -> None:
    """Raise ValueError unless x is (B, C, H, W) and cond (B,) numbers of conditions, or `count`."""
    kinds = ", ".join(type(each).__name__ for each in (x, cond) if not isinstance(each, Tensor))
    require(not kinds, f"found noise or conditions of type {kinds}; both must be tensors")
    fits = x.ndim == 4 and tuple(x.shape[1:]) == shape and tuple(cond.shape) == (len(x),) != (0,)
    fits = fits and x.device == cond.device and x.is_floating_point()
    fits = fits and cond.dtype in (torch.int64, torch.int32)
    noise = f"found noise {tuple(x.shape)} {x.dtype} on {x.device}"
    conditions = f"conditions {tuple(cond.shape)} {cond.dtype} on {cond.device}"
    expected = f"(B, {', '.join(map(str, shape))}) and (B,) whole numbers on one device"
    require(fits, f"{noise}, {conditions}; expected {expected}, B at least 1, as `draw` returns")
    if cond.device.type == "cpu":  # another device would have to be waited for
        wrong = [label for label in cond.tolist() if not 0 <= label <= count]
        todo = f"pass classes or prompts from 0 to {count - 1}, or {count} for none"
        require(not wrong, f"found labels out of range, {wrong[:4]}; {todo}")
