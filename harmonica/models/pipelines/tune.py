"""tune: a table for a pipeline that is in memory, to use tonight.

    whole steps     those whose runs of reuse change x least (dynamic programming)
    refinement      single entries flip while the final image's error falls
    weights         what fills a skipped site is learned towards a walk of ten times the steps

Each stage starts from the one before, and is left out where the budget is too small for it. This
file does not know how a stage works.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from harmonica.cost import macs
from harmonica.inference.timing import milliseconds
from harmonica.models.pipelines.caching import cached
from harmonica.models.pipelines.denoiser import from_pipeline
from harmonica.models.pipelines.general import PipelineDenoiser
from harmonica.models.pipelines.inputs import Inputs, inputs_of
from harmonica.models.pipelines.recorded import NotFollowedError
from harmonica.models.sites import sites
from harmonica.override import Method, overridden
from harmonica.router import Schedule
from harmonica.search.learn import learn_weights
from harmonica.search.paths import cheapest_path
from harmonica.search.references import finer_walk, references, with_images
from harmonica.search.refine import refine
from harmonica.search.target import Target
from harmonica.storage.files import StrPath
from harmonica.table import require
from harmonica.training.train import train_sdt

WALKS, NOISES, FACTOR, SEED = 1000, 4, 10, 20_000_007
"""The budget in walks if none is given; noises that tables are judged on, and how many times T
steps the walk has whose image they should become; what the noises are drawn with."""


def tune(  # noqa: D417 (some arguments are described together)
    pipe: Any, prompts: StrPath | Sequence[str] | None = None, *, speedup: float, order: int = 0,
    method: Literal["auto", "sdt"] = "auto", budget: int | None = None,
    cost: Literal["milliseconds"] | None = None, each: Mapping[str, Any] | None = None,
    progress: bool = True, **call: Any,
) -> Schedule:  # fmt: skip
    """Return a schedule that makes this pipeline `speedup` times as fast, in theory.

        schedule = tune(pipe, prompts, speedup=1.5, num_inference_steps=28, guidance_scale=3.5)
        with cached(pipe, schedule):
            image = pipe("…", num_inference_steps=28, guidance_scale=3.5).images[0]

    The bar says at its start how many predictions it will take at most; Ctrl-C returns the best
    schedule so far. A pipeline that cannot be followed gets whole steps and a warning.

    Args:
        pipe, prompts, each, **call: as in `from_pipeline`, `num_inference_steps` in place of steps.
        speedup: theoretical, of the transformer, 1 or more.
        order: how skipped sites are filled before weights are learned, `Schedule.order`.
        method: "auto", or "sdt", the paper's training, about three predictions an update and noise.
        budget: predictions of one image that may be spent; those of 1000 walks if None.
        cost: None counts multiply-accumulates, "milliseconds" measures the sites on this device.
        progress: show a bar.

    Raises as `from_pipeline` does, and ValueError for a speedup that no table has.
    """
    choices = f"method is {method!r}; expected 'auto' or 'sdt', the paper's training"
    require(method in ("auto", "sdt"), choices)
    steps = call.pop("num_inference_steps", None)
    try:
        denoiser = from_pipeline(pipe, steps=steps, prompts=prompts, each=each, **call)
    except NotFollowedError as reason:
        warnings.warn(f"{reason}. Whole steps are chosen from runs of the pipeline", stacklevel=2)
        return _from_runs(pipe, inputs_of(pipe, steps, prompts, each, call), speedup, progress)
    measure = milliseconds(denoiser) if cost == "milliseconds" else macs(denoiser)
    target = Target(speedup, measure, denoiser.steps)
    budget = WALKS * denoiser.steps if budget is None else budget
    size = NOISES if denoiser.batched else 1
    if method == "sdt":
        how: dict[str, Any] = {"target_speedup": speedup, "cost": measure, "order": order}
        how |= {"iterations": budget // (3 * size), "batch_size": size, "progress": progress}
        return train_sdt(denoiser, **how).schedule()
    return _searched(denoiser, target, order, budget, size, progress)


def _searched(
    denoiser: PipelineDenoiser, target: Target, order: int, budget: int, size: int, progress: bool
) -> Schedule:
    """Return the best schedule of the stages that the budget is enough for."""
    from tqdm.auto import tqdm

    generator, half = torch.Generator().manual_seed(SEED), budget // 2
    finer = finer_walk(denoiser, FACTOR if NOISES * FACTOR * denoiser.steps <= half // 4 else 1)
    pools = (with_images(finer, *denoiser.draw(NOISES, generator)) for _ in repeat(None))
    names, best = tuple(denoiser.sites), None
    with tqdm(total=budget, unit="prediction", desc="tune", disable=not progress) as bar:
        try:
            for stage in refine(denoiser, [], next(pools), pools, target, budget=half, gate=order):
                about = {"method": "tune", "speedup": target.speedup, "predictions": stage.spent}
                how: dict[str, Any] = denoiser.about | {"order": order, "provenance": about}
                best = Schedule(stage.table, sites=names, **how)
                bar.set_postfix(error=f"{stage.error:.2e}", refresh=False)
                bar.update(stage.spent - bar.n)
            assert best is not None
            best = _weighted(denoiser, best, budget - half, size)
            bar.update(budget - bar.n)
        except KeyboardInterrupt:
            if best is None:
                raise
    return best


def _weighted(denoiser: PipelineDenoiser, schedule: Schedule, budget: int, size: int) -> Schedule:
    """Return the schedule with learned weights, or as it is if the budget is too small for them.

    Half of the budget goes into reference walks, half into updates, of about four walks each.
    """
    walks, factor = budget // denoiser.steps, 1 if denoiser.draws_noise else FACTOR
    noises, updates = min(walks // (2 * factor), 64 * size), walks // (8 * size)
    if noises < 2 * NOISES or updates < 1:
        return schedule
    pool = references(denoiser, noises=noises, factor=factor)
    return learn_weights(denoiser, schedule, pool, iterations=updates, batch_size=size)


def _from_runs(pipe: Any, inputs: Inputs, speedup: float, progress: bool) -> Schedule:
    """Return whole steps chosen from T runs of the pipeline, which compute T(T+1)/2 steps."""
    from tqdm.auto import tqdm

    columns = sites(pipe.transformer)
    plain = steps_of_run(pipe, inputs.of([(0, SEED)]))
    steps, width, cost = len(plain), len(columns), columns.macs
    require(steps > 0, f"{type(pipe).__name__} never steps its scheduler, so no table fits it")
    count = min(int(Target(speedup, cost, steps).allowed / float(cost.sites.sum())), steps)
    errors = torch.zeros(steps, steps, dtype=torch.float64)
    for j in tqdm(range(steps - 1), unit="run", desc="tune", disable=not progress):
        rows = torch.arange(steps)[:, None].expand(-1, width) <= j
        with cached(pipe, Schedule(rows, sites=tuple(columns))):
            for k, after in enumerate(steps_of_run(pipe, inputs.of([(0, SEED)]))):
                errors[j, k] = float((after.double() - plain[k].double()).square().mean())
    path = cheapest_path(errors, count)
    about: dict[str, str | float] = {"method": "tune, whole steps from runs", "runs": steps}
    names: dict[str, Any] = {"model": type(pipe).__name__, "sampler": type(pipe.scheduler).__name__}
    rows = torch.tensor([[k in path] * width for k in range(steps)])
    return Schedule(rows, sites=tuple(columns), provenance=about | {"speedup": speedup}, **names)


def steps_of_run(pipe: Any, call: Mapping[str, Any]) -> list[Tensor]:
    """Run the pipeline, and return what its scheduler returned at each step."""
    after: list[Tensor] = []

    def noted(step: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = step(*args, **kwargs)
        after.append(tree_leaves(result)[0].detach().clone())
        return result

    with overridden([(pipe.scheduler, "step", noted)]):
        pipe(**call)
    return after
