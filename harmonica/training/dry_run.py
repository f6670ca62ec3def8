"""Dry run: what a training run will take, counted before anything is computed.

    prediction    one guided prediction of the whole batch
    update        teacher, student and backward pass of one step
    λ             T(T+1)/2 predictions, every `refresh_every` walks
    search        what follows training to a target (harmonica.search.refine)

The model lies on torch's meta device, `load(name, weights="random", device="meta")`, where nothing
is computed. The real code of training runs on it, and a `Meter` counts.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from harmonica.denoise import Denoiser
from harmonica.iepo import Proxy, image_error
from harmonica.override import overridden
from harmonica.router import Router, Schedule
from harmonica.sdt import sdt
from harmonica.search.flip_effects import flip_effects_at
from harmonica.search.references import with_images
from harmonica.search.refine_router import default_budget
from harmonica.training.checkpoint import trainable_steps
from harmonica.values import require

aten = torch.ops.aten
GIB = 2**30
H100 = 400e12  # floating-point operations a second that a large model reaches there in bf16


@dataclass(frozen=True)
class DryRun:
    """What a training run will take."""

    predictions: int  # of the whole batch, λ and the search included
    macs: float  # multiply-accumulates, backward passes included
    weights: int  # bytes of the model
    memory: dict[str, int]  # bytes at most of an "update", "lambda" and the "search" of one noise
    batch_size: int  # noises of this process

    def hours(self) -> float:
        """Return the hours on one H100."""
        return 2 * self.macs / H100 / 3600

    def check(self, available: int, *, checkpointing: bool) -> None:
        """Raise ValueError, saying what to change, if the run does not fit into so many bytes."""
        most = max(self.memory.values())
        together = max(size for name, size in self.memory.items() if name != "search")
        batch = (available - self.weights) * self.batch_size // (together - self.weights)
        ways = [f"--batch-size {batch}"] if batch > 0 else []
        ways += [] if checkpointing else ["--activation-checkpointing"]
        need = f"training needs {most / GIB:.1f} GiB at batch size {self.batch_size}"
        has, todo = f"the device has {available / GIB:.1f}", " or ".join(ways) or "a larger device"
        require(most <= available, f"{need} and {has}; take {todo}")

    def __str__(self) -> str:
        rows = {
            "predictions": f"{self.predictions:,} of {self.batch_size} noises",
            "multiply-accumulates": f"{self.macs:.2e}, backward passes included",
            "hours at 400 TFLOP/s": f"{self.hours():.2f}",
            "weights": f"{self.weights / GIB:.1f} GiB",
        }
        for name, size in self.memory.items():
            alone = ", one noise at a time" * (name == "search")
            rows[f"peak memory, {name}"] = f"{size / GIB:.1f} GiB{alone}"
        return "\n".join(f"  {name:24}{value}" for name, value in rows.items())


def dry_run(
    denoiser: Denoiser, *, iterations: int = 20_000, batch_size: int = 32, refresh_every: int = 25,
    proxy: Proxy | None = "leave-one-out", target: bool = False, budget: int | None = None,
) -> DryRun:  # fmt: skip
    """Count what `train_sdt` with these settings takes; only shapes matter.

    With a `target` it ends with a search, unless the budget is 0. Raises ValueError if the denoiser
    is not on the meta device.
    """
    start = denoiser.draw(batch_size, torch.Generator().manual_seed(0))
    place, how = start[0].device, 'load(name, weights="random", device="meta")'
    wrong = f"the denoiser is on {place}; a dry run takes one on the meta device, {how}"
    require(place.type == "meta", wrong)
    T = trainable_steps(denoiser)
    memory: dict[str, int] = {}
    memory["update"], weights, plain, update = _update(denoiser, start)
    walks = -(-iterations // (T - 1))
    predictions = 2 * iterations + walks
    macs = iterations * update + walks * plain
    if proxy is not None:
        memory["lambda"] = _lambda(denoiser, start)
        proxies = -(-walks // refresh_every) * T * (T + 1) // 2
        predictions, macs = predictions + proxies, macs + proxies * plain
    if target and budget != 0:
        memory["search"] = _search(denoiser)
        batches = (default_budget(T) if budget is None else budget) // batch_size
        predictions, macs = predictions + batches, macs + batches * plain
    return DryRun(predictions, macs, weights, memory, batch_size)


def _update(denoiser: Denoiser, start: tuple[Any, Any]) -> tuple[int, int, float, float]:
    """Return training's peak, the weights' bytes, MACs of a plain prediction and of an update."""
    router = Router(denoiser.steps, denoiser.sites).to("meta")
    with metered() as plain, torch.no_grad():
        denoiser.predict(start[0], 0, start[1])
    with metered() as meter:
        updates = len(list(islice(sdt(denoiser, router, [start], proxy=None), 2)))
    update = (meter.macs - plain.macs) / updates  # step 0 is a plain prediction
    return meter.peak, plain.alive, plain.macs, update


def _lambda(denoiser: Denoiser, start: tuple[Any, Any]) -> int:
    """Return the peak of λ on the first three steps; a longer walk keeps nothing more."""
    short = _first_steps(denoiser, 3)
    with metered() as meter:
        image_error(short, torch.ones(short.steps, len(denoiser.sites), device="meta"), *start)
    return meter.peak


def _search(denoiser: Denoiser) -> int:
    """Return the peak of the search's largest piece, the effects of all flips, on one noise.

    It is counted on walks of four and five steps; each further step keeps as much again.
    """
    x, cond = denoiser.draw(1, torch.Generator().manual_seed(0))
    peaks = []
    for short in (_first_steps(denoiser, 4), _first_steps(denoiser, 5)):
        table = Schedule(torch.ones(short.steps, len(denoiser.sites)), tuple(denoiser.sites))
        with metered() as meter:
            flip_effects_at(short, table, with_images(short, x, cond), torch.ones_like(x))
        peaks.append(meter.peak)
    return peaks[0] + (denoiser.steps - 4) * (peaks[1] - peaks[0])


def _first_steps(denoiser: Denoiser, steps: int) -> Denoiser:
    short = copy.copy(denoiser)
    short.steps = min(steps, denoiser.steps)
    return short


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations take or give, as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0  # bytes now, and at most
        self.macs = 0.0  # multiply-accumulates so far, those of backward passes included
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._follow((args, kwargs))
        out = _without_numbers(func, args, kwargs or {})
        self._follow(out)
        if func._overloadpacket in flop_registry:  # two operations are one MAC
            flops = flop_registry[func._overloadpacket]
            self.macs += flops(*args, **(kwargs or {}), out_val=out) / 2
        return out

    def _follow(self, values: Any) -> None:
        for tensor in (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                weakref.finalize(storage, self._free, key, size)
                self.alive += size
                self.peak = max(self.peak, self.alive)

    def _free(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.alive -= size


@contextmanager
def metered() -> Iterator[Meter]:
    """Count what runs inside, on meta tensors.

    A number that is asked of a meta tensor is 1: a score of 1 computes and renews the cache, which
    is the most that a step can take. Attention is the kernel that does not keep the scores of all
    pairs of tokens.
    """
    with overridden([(F, "scaled_dot_product_attention", _fused)]), Meter() as meter:
        yield meter


def _fused(original: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
    if not args[0].is_meta:
        return original(*args, **kwargs)
    attention = aten._scaled_dot_product_efficient_attention
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    result: Tensor = attention(*args[:3], mask, args[0].requires_grad)[0]
    return result


def _without_numbers(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation; where it would need numbers of a meta tensor, they are 1."""
    source = args[1] if func is aten.copy_.default else args[0] if args else None
    if not isinstance(source, Tensor) or not source.is_meta:
        return func(*args, **kwargs)
    if func is aten._local_scalar_dense.default:
        return torch.ones((), dtype=source.dtype).item()
    if func is aten.equal.default:
        return True
    if func is aten.copy_.default and not args[0].is_meta:
        return args[0].fill_(1)
    place = torch.device(kwargs.get("device") or "meta")
    if func is aten._to_copy.default and place.type != "meta":
        return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=place)
    return func(*args, **kwargs)
