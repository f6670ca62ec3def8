"""tune: a table for a pipeline that is in memory, to use tonight.

    whole steps     those whose runs of reuse change x least (dynamic programming)
    refinement      single entries flip while the final image's error falls
    weights         what fills a skipped site is learned towards a walk of ten times the steps

Each stage starts from the one before, and is left out where the budget is too small for it. This
file does not know how a stage works.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from harmonica.cost import macs
from harmonica.inference.timing import milliseconds
from harmonica.models.pipelines.caching import cached
from harmonica.models.pipelines.checks import sites_of
from harmonica.models.pipelines.denoiser import PipelineDenoiser
from harmonica.models.pipelines.facts import NotFollowedError
from harmonica.models.pipelines.follow import from_pipeline
from harmonica.models.pipelines.inputs import Inputs, inputs_of
from harmonica.models.pipelines.schedulers import step_arguments, timesteps_from
from harmonica.models.sites import macs_per_token, sites
from harmonica.override import Method, overridden
from harmonica.processes import progress_bar
from harmonica.router import Schedule
from harmonica.search.learn import learn_weights
from harmonica.search.paths import cheapest_path
from harmonica.search.references import Pool, finer_walk, references, with_images
from harmonica.search.refine import WALKS_PER_ROUND, refine
from harmonica.search.target import Target
from harmonica.training.train import train_sdt
from harmonica.values import StrPath, number, require, whole

WALKS, NOISES, FACTOR, SEED = 1000, 4, 10, 20_000_007
"""The budget in walks if none is given; noises that tables are judged on; steps of the reference
walk over T; the seed of the noises."""

WHOLE = "Whole steps are chosen from runs of the pipeline; the speedup counts no attention scores"


def tune(  # noqa: D417 (some arguments are described together)
    pipe: Any, prompts: StrPath | Sequence[str] | None = None, *, speedup: float, order: int = 0,
    method: Literal["auto", "sdt"] = "auto", budget: int | None = None,
    cost: Literal["milliseconds"] | None = None, each: Mapping[str, Any] | None = None,
    progress: bool = True, **call: Any,
) -> Schedule:  # fmt: skip
    """Return a schedule under which a pipeline's transformer is `speedup` times as fast in theory,
    and whose images come as near as can be to those of ten times the steps, not to the uncached.

        schedule = tune(pipe, prompts, speedup=1.5, num_inference_steps=28, guidance_scale=3.5)
        with cached(pipe, schedule):
            image = pipe("…", num_inference_steps=28, guidance_scale=3.5).images[0]

    Ctrl-C returns the best schedule so far if there is one, and so does an error, with a warning;
    with "sdt" both are raised. A pipeline that cannot be followed gets whole steps and a warning:
    method, budget, cost and order have no effect then, and the speedup counts no attention scores.

    Args:
        pipe, prompts, each, **call: as in `from_pipeline`.
        speedup: theoretical, of the transformer, 1 or more.
        order: how skipped sites are filled before weights are learned, `Schedule.order`.
        method: "auto", or "sdt", the paper's training, about three predictions an update and noise.
        budget: predictions of one image that may be spent, a backward pass counts as two; those of
            1000 walks if None. Whole steps take about T·(T + 13) / 2 at least; less is refused.
        cost: None counts multiply-accumulates, "milliseconds" measures the sites on this device.
        progress: show a bar.

    Raises as `from_pipeline` does, and ValueError for a speedup that no table has.
    """
    known = "expected 'auto' or 'sdt', the paper's training"
    require(method in ("auto", "sdt"), f"method is {method!r}; {known}")
    known = "expected 'milliseconds', or None for multiply-accumulates"
    require(cost in (None, "milliseconds"), f"cost is {cost!r}; {known}")
    number("the target speedup", speedup, 1)
    whole("order", order, 0, 10)
    whole("budget", 1 if budget is None else budget)
    try:
        denoiser = from_pipeline(pipe, prompts=prompts, each=each, **call)
    except NotFollowedError as reason:
        given = {"method": method != "auto", "budget": budget, "cost": cost, "order": order}
        unused = ", ".join(name for name, value in given.items() if value)
        warnings.warn(f"{reason}. {WHOLE}{f'. Ignored: {unused}' if unused else ''}", stacklevel=2)
        return _from_runs(pipe, inputs_of(pipe, prompts, each, call), speedup, progress)
    measure = milliseconds(denoiser) if cost == "milliseconds" else macs(denoiser)
    target = Target(speedup, measure, denoiser.steps)
    batch = NOISES if denoiser.batched else 1  # asked now, since the answer takes predictions
    way = _trained if method == "sdt" else _searched
    schedule = way(denoiser, target, order, budget or WALKS * denoiser.steps, batch, progress)
    spent = {"predictions": denoiser.predictions.total()}
    return replace(schedule, provenance={**schedule.provenance, **spent})


def _check_budget(budget: int, least: int, steps: int) -> None:
    todo = f"it takes {least} predictions at least; give as many, or leave budget out"
    require(budget >= least, f"budget is {budget}; with {steps} steps {todo}")


def _trained(
    denoiser: PipelineDenoiser, target: Target, order: int, budget: int, batch: int, progress: bool
) -> Schedule:
    """Return the schedule of the paper's training, put on target."""
    _check_budget(budget, 3 * batch, denoiser.steps)
    how: dict[str, Any] = {"target_speedup": target.speedup, "cost": target.cost, "order": order}
    how |= {"iterations": budget // (3 * batch), "batch_size": batch, "progress": progress}
    return train_sdt(denoiser, budget=0, **how).schedule()


def _searched(
    denoiser: PipelineDenoiser, target: Target, order: int, budget: int, batch: int, progress: bool
) -> Schedule:
    """Return the best schedule of the stages that the budget is enough for."""
    T, spent = denoiser.steps, denoiser.predictions.total()
    a_noise = 1 + T * (T + 13) // 2  # whole steps: errors of all runs of reuse, and 6 walks
    _check_budget(budget, spent + a_noise, T)
    size = min(NOISES, (budget - spent) // a_noise)
    best: Schedule | None = None
    with progress_bar(progress, total=budget, unit="prediction", desc="tune") as bar:
        try:
            for best in _stages(denoiser, target, order, budget, size, batch):
                bar.set_postfix(error=f"{best.provenance['typical_error']:.2e}", refresh=False)
                bar.update(denoiser.predictions.total() - bar.n)
        except (Exception, KeyboardInterrupt) as error:
            if best is None:
                raise
            if isinstance(error, Exception):
                what = f"with the best schedule so far: {type(error).__name__}: {error}"
                warnings.warn(f"tune ends early, {what}", stacklevel=3)
    assert best is not None
    return best


class _HalfSpentError(Exception):
    """Ends the search where its next round would spend more than half of the budget."""


def _stages(
    denoiser: PipelineDenoiser, target: Target, order: int, budget: int, size: int, batch: int
) -> Iterator[Schedule]:
    """Yield schedules, each better than the one before, judged on `size` noises at a time."""
    T, half, generator = denoiser.steps, budget // 2, torch.Generator().manual_seed(SEED)
    alone = denoiser.draws_noise or {"timesteps", "sigmas"} & denoiser.inputs.call.keys()
    factor = 1 if alone else FACTOR  # those walks cannot be had with more steps
    finer = finer_walk(denoiser, factor if half // 4 >= size * factor * T else 1)
    a_round = size * (WALKS_PER_ROUND * T + finer.steps)

    def pools() -> Iterator[Pool]:
        while True:
            yield with_images(finer, *denoiser.draw(size, generator))
            if denoiser.predictions.total() + a_round > half:
                raise _HalfSpentError

    best, others = None, pools()
    with suppress(_HalfSpentError):
        for stage in refine(denoiser, [], next(others), others, target, budget=half, fill=order):
            about = {"method": "tune", "speedup": target.speedup, "typical_error": stage.error}
            how: dict[str, Any] = denoiser.about | {"order": order, "provenance": about}
            yield (best := Schedule(stage.table, sites=tuple(denoiser.sites), **how))
    assert best is not None
    # Half of what is left goes into reference walks, half into updates, of about four walks each.
    walks = (budget - max(half, denoiser.predictions.total())) // T
    noises, updates = min(walks // (2 * factor), 64 * batch), walks // (8 * batch)
    if noises >= 2 * NOISES and updates >= 1:
        pool = references(denoiser, noises=noises, factor=factor)
        yield learn_weights(denoiser, best, pool, iterations=updates, batch_size=batch)


def _from_runs(pipe: Any, inputs: Inputs, speedup: float, progress: bool) -> Schedule:
    """Return whole steps chosen from T runs of the pipeline, which compute T(T+1)/2 steps."""

    def run() -> tuple[list[Tensor], tuple[float, ...]]:
        return steps_of_run(pipe, inputs.of([(0, SEED)]))

    columns, name, (plain, times) = tuple(sites_of(pipe)), type(pipe).__name__, run()
    T, cost = len(plain), macs_per_token(pipe.transformer, sites(pipe.transformer))
    require(T > 0, f"{name} never steps its scheduler, so no table fits it")
    count = min(Target(speedup, cost, T).steps_that_compute, T)
    about = {"method": "tune, whole steps from runs", "runs": T, "speedup": speedup}
    fields: dict[str, Any] = {"sites": columns, "timesteps": times, "provenance": about}
    fields |= {"model": name, "sampler": type(pipe.scheduler).__name__}

    def whole_steps(computing: Collection[int]) -> Schedule:
        return Schedule(torch.tensor([[k in computing] * len(columns) for k in range(T)]), **fields)

    errors = torch.zeros(T, T, dtype=torch.float64)
    for j in progress_bar(progress, iterable=range(T - 1), unit="run", desc="tune"):
        with cached(pipe, whole_steps(range(j + 1))):
            for k, after in enumerate(run()[0]):
                errors[j, k] = float((after.double() - plain[k].double()).square().mean())
    return whole_steps(cheapest_path(errors, count))


def steps_of_run(pipe: Any, call: Mapping[str, Any]) -> tuple[list[Tensor], tuple[float, ...]]:
    """Run the pipeline; return what its scheduler returned at each step, and their timesteps."""
    after, times = list[Tensor](), list[tuple[float, ...]]()

    def noted(step: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        timestep = step_arguments(pipe.scheduler, args, kwargs).get("timestep")
        times.append(timesteps_from(pipe.scheduler, timestep))
        result = step(*args, **kwargs)
        after.append(tree_leaves(result)[0].detach().clone())
        return result

    with overridden([(pipe.scheduler, "step", noted)]):
        pipe(**call)
    return after, times[0][: len(after)] if times and len(times[0]) >= len(after) else ()
