"""Pipelines: a stock diffusers pipeline under a schedule, with one line.

    with cached(pipe, schedule):
        images = pipe(prompt, num_inference_steps=20).images

While the `with` is open, three things are tapped, on the instances, and all are put back at its end:

    scheduler.set_timesteps   a walk begins: k = 0, empty caches; the schedule is held against the timesteps
    scheduler.step            a step ends: k + 1
    transformer               a call begins: the row of step k, and one cache for each call within a step

So the step is counted where the pipeline itself counts it: nothing is looked up on the device, a timestep may occur
twice (Heun), and a walk that was interrupted is forgotten when the next one begins. Pipelines that call the transformer
once for each half of guidance get one cache for each call.

`from_pipeline` turns a pipeline into a `Denoiser`, to train a schedule on the very walk that it will run.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from harmonica.cache import Cache, Compute, Feature, Gate, gated, reuse
from harmonica.cost import Count
from harmonica.denoise import Denoiser
from harmonica.files import StrPath
from harmonica.models.dit import DiTDenoiser
from harmonica.models.pixart import PixArtDenoiser, encoded_by
from harmonica.models.sites import count_calls, sites
from harmonica.names import fit
from harmonica.prompts import prompts_from
from harmonica.router import Schedule
from harmonica.samplers import Scheduled
from harmonica.shadows import put_back

__all__ = ["cached", "disable_cache", "enable_cache", "from_pipeline", "original_numerics", "sites", "summary"]


MOST_CALLS = 16
"""Calls of the transformer before the scheduler's first step, each with features of its own, that are believed."""


class Session:
    """What one open `cached` knows: where the walk is, and what it has saved so far. `str()` says it.

    Attributes:
        schedule: in the names of this pipeline's sites.
        walks: walks begun.
        skipped, asked: sites that were reused, and that were asked, over all walks.
    """

    def __init__(self, pipe: Any, schedule: Schedule, modules: Mapping[str, nn.Module]) -> None:
        self.pipe = weakref.ref(pipe)  # enable_cache must not keep a pipeline alive
        self.transformer, self.scheduler = pipe.transformer, pipe.scheduler
        self.modules = modules
        self.schedule = fit(schedule, tuple(modules))
        self.schedule.check(self.schedule.steps, tuple(modules))
        self.walks = self.skipped = self.asked = 0
        self._rows: list[list[bool]] = self.schedule.compute.tolist()
        self._inputs: Any = None
        self.forget()

    def forget(self) -> None:
        """Be between two walks: sites compute, and no feature is kept."""
        self._k = -1
        self._calls = 0  # of the transformer since the last step
        self._caches: list[Cache] = []  # one for each call within a step
        self._shapes: list[list[torch.Size]] = []
        self._gate: Gate | None = None
        self._times_asked: dict[int, int] = {}

    def begin(self) -> None:
        """Begin a walk, if this session is the innermost of its scheduler; others of this transformer step back."""
        sessions = _sessions.get(self.transformer, [])
        if self is not next((each for each in reversed(sessions) if each.scheduler is self.scheduler), None):
            return
        self._must_be_the_same_parts()
        for other in sessions:
            other.forget()
        times = tuple(torch.as_tensor(self.scheduler.timesteps).tolist())
        self.schedule.check(len(times), self.schedule.sites, times)
        self._k, self.walks = 0, self.walks + 1

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a call of the transformer: choose the gate of this step and this call."""
        self._must_be_the_same_parts()
        if self._k < 0:
            return
        call, self._calls = self._calls, self._calls + 1
        shapes = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._must_be_the_same_walk(call, shapes)
        if self._k == 0:
            self._caches.append({})
            self._shapes.append(shapes)
            self._times_asked = {}
            self._inputs = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        row = self._rows[self._k]
        gate = reuse(row, self._caches[call])
        self._gate = self._counting(gate) if self._k == 0 else gate
        self.asked, self.skipped = self.asked + len(row), self.skipped + row.count(False)

    def _must_be_the_same_walk(self, call: int, shapes: list[torch.Size]) -> None:
        at = f"at step {self._k} of {self.schedule.steps}"
        if self.transformer.training:
            raise RuntimeError(f"the transformer is in training mode {at}, so its features are noisy; call its eval()")
        if self._k == 0 and call == MOST_CALLS:
            raise RuntimeError(
                f"the transformer was called {call} times and the scheduler has not stepped; a walk interrupted at its "
                "first step, or calls outside of a walk? session.forget() ends it"
            )
        if self._k == 0:
            return
        if call >= len(self._caches):
            raise RuntimeError(
                f"the transformer is called {call + 1} times {at}, and was called {len(self._caches)} times at step 0: "
                "guidance, or whatever else makes calls, changed in the middle of a walk; keep it the same, or sample "
                "without the cache"
            )
        if shapes != self._shapes[call]:
            then, now = ([tuple(shape) for shape in group] for group in (self._shapes[call], shapes))
            raise RuntimeError(
                f"the transformer's inputs have shapes {now} {at}, and had {then} at step 0: batch, size or guidance "
                "changed in the middle of a walk, so cached features do not fit; keep them the same"
            )

    def _must_be_the_same_parts(self) -> None:
        pipe = self.pipe()
        for part, mine in (("scheduler", self.scheduler), ("transformer", self.transformer)):
            if pipe is not None and getattr(pipe, part) is not mine:
                raise RuntimeError(
                    f"the {part} of {type(pipe).__name__} was replaced inside the with, and the new one is not "
                    f"followed; set the {part} first, then open cached(pipe, schedule)"
                )

    def _counting(self, gate: Gate) -> Gate:
        """Count how often each site is asked, at step 0, where everything computes anyway."""
        asked = self._times_asked

        def counting(site: int, compute: Compute) -> Feature:
            asked[site] = asked.get(site, 0) + 1
            if asked[site] > 1:
                name = self.schedule.sites[site]
                raise RuntimeError(
                    f"{name} is called more than once in one call of the transformer, and has one feature; if its "
                    "feed-forward runs in chunks, call set_chunk_feed_forward(None, 0) on the blocks, else leave "
                    "the module out: cached(pipe, schedule, sites={…})"
                )
            return gate(site, compute)

        return counting

    def step(self, timestep: Any) -> None:
        """End a step, before the scheduler takes it."""
        if self._k < 0:
            return
        self._must_be_the_same_parts()
        if self._k == 0:
            first = float(torch.as_tensor(self.scheduler.timesteps)[0])
            start = first if timestep is None else float(torch.as_tensor(timestep).flatten()[0])
            if start != first:
                raise RuntimeError(
                    f"this walk starts at timestep {start:g}, not at the first one, {first:g} (image to "
                    "image?); a schedule is for whole walks: train one from there, or sample without the cache"
                )
            if self._calls and not self._times_asked:
                raise RuntimeError("the transformer ran and asked no site; something else has replaced its modules")
        elif self._calls != len(self._caches):
            raise RuntimeError(
                f"the transformer was called {self._calls} times at step {self._k} and {len(self._caches)} times at "
                "step 0; a pipeline that steps its scheduler without the transformer (a second transformer, two steps "
                "for one call) or changes its guidance in the middle of a walk cannot be followed"
            )
        self._k, self._calls, self._gate = self._k + 1, 0, None
        if self._k == self.schedule.steps:
            self.forget()  # the features are let go with the walk

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """Return a session of no pipeline: a copied module computes, and a copied scheduler tells nobody."""
        idle = copy.copy(self)
        idle.scheduler = None
        idle.forget()
        return idle

    def __str__(self) -> str:
        share = self.skipped / self.asked if self.asked else 0.0
        head = f"{type(self.transformer).__name__}, {self.schedule.steps} steps × {len(self.modules)} sites"
        lines = [f"{head}, CUR {self.schedule.cur:.1%}", f"{self.walks} walks, {share:.1%} of the sites reused so far"]
        if self._inputs is not None:
            count = self._costed()
            if count is not None:
                faster = self.schedule.speedup(count.macs)
                lines.append(f"theoretical speedup of the transformer {faster:.2f}x ({count.macs.covered:.1%} covered)")
        return "\n".join(lines)

    def _costed(self) -> Count | None:
        """Count one call like the last one, with zeros for its tensors."""
        weight = next(self.transformer.parameters())
        args, kwargs = tree_map(
            lambda leaf: torch.zeros_like(leaf, device=weight.device) if isinstance(leaf, Tensor) else leaf,
            self._inputs,
        )
        names = _argument_names(self.transformer)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        return count_calls(self.transformer, self.modules, inputs)


def _answer(session: Session, site: int, compute: Compute) -> Feature:
    """Answer a site: by the schedule inside a walk, by computing outside of one."""
    gate = session._gate
    return compute() if gate is None else gate(site, compute)


_sessions: WeakKeyDictionary[nn.Module, list[Session]] = WeakKeyDictionary()
"""Open sessions of each transformer, outermost first."""

_enabled: WeakKeyDictionary[Any, tuple[ExitStack, Session]] = WeakKeyDictionary()
"""Pipelines under `enable_cache`."""


@contextmanager
def cached(
    pipe: Any, schedule: Schedule, *, sites: Mapping[str, nn.Module] | None = None, parity: bool = False
) -> Iterator[Session]:
    """Run a stock diffusers pipeline under a schedule for as long as the `with` is open.

    A schedule that computes everything gives the pipeline's own images, bit for bit. At the end everything is as it
    was, exception or not; what accelerate or others have put on top meanwhile stays.

    Args:
        pipe: a pipeline with a `transformer` and a `scheduler`, both as they will be used: adapters loaded, QKV fused,
            offloading switched on, scheduler set.
        schedule: for this scheduler's timesteps and these sites; names of the original DiT and tables without names
            or for kinds of site are understood (`harmonica.names`).
        sites: cacheable modules by name; None finds them (`harmonica.models.sites`).
        parity: for DiTPipeline: embed timesteps and normalise as the original DiT does (`original_numerics`).

    Yields:
        Session: `print(session)` says what was reused.

    Raises:
        TypeError: if pipe has no transformer or scheduler, or has two transformers.
        ValueError: if the schedule does not fit, now or when the pipeline sets its timesteps.
        RuntimeError: from inside the pipeline, where a walk is not one that the schedule is for.

    Warns UserWarning at the end if the schedule reuses and no site was ever skipped.
    """
    for part in ("transformer", "scheduler"):
        if getattr(pipe, part, None) is None:
            raise TypeError(f"{type(pipe).__name__} has no {part}; cached takes a diffusers pipeline that has one")
    if getattr(pipe, "transformer_2", None) is not None:
        raise TypeError(
            f"{type(pipe).__name__} runs two transformers in one walk, transformer and transformer_2; "
            "cached follows pipelines that have one"
        )
    transformer = pipe.transformer
    if not isinstance(transformer, nn.Module) or hasattr(transformer, "_orig_mod"):
        raise TypeError(
            "pipe.transformer is compiled, and compiled code does not ask; use the module it was compiled from"
        )
    if transformer.training:
        raise ValueError("pipe.transformer is in training mode, where features are noisy; call its eval() first")
    session = Session(pipe, schedule, _found(transformer) if sites is None else sites)
    for other in _sessions.get(transformer, []):
        if other.scheduler is pipe.scheduler and other.pipe() is not pipe:
            raise ValueError(
                "this pipeline shares its scheduler with another that is cached; give it a copy of its own"
            )
    del pipe  # this frame must not keep it alive
    with ExitStack() as stack:
        if parity:
            stack.enter_context(original_numerics(transformer))
        # A partial: a module that is copied inside the `with` is copied with an idle session.
        stack.enter_context(gated(session.modules, functools.partial(_answer, session)))
        stack.enter_context(_tapped(session.scheduler, session))
        hook = transformer.register_forward_pre_hook(
            lambda module, args, kwargs: session.call(args, kwargs) if module is transformer else None, with_kwargs=True
        )
        stack.callback(hook.remove)
        open_sessions = _sessions.setdefault(transformer, [])
        open_sessions.append(session)
        stack.callback(open_sessions.remove, session)
        stack.callback(session.forget)
        yield session
    if session.schedule.cur > 0 and session.skipped == 0:
        warnings.warn(
            f"no site was skipped while cached was open ({session.walks} walks were begun); run this very pipeline, "
            "with its transformer and scheduler as they were, inside the with",
            stacklevel=3,
        )


def _found(transformer: nn.Module) -> Mapping[str, nn.Module]:
    return sites(transformer)


@contextmanager
def _tapped(scheduler: Any, session: Session) -> Iterator[None]:
    """Tell the session when the scheduler sets its timesteps and when it steps."""
    with ExitStack() as stack:
        for name, tap in (("set_timesteps", _set_timesteps), ("step", _step)):
            method = getattr(scheduler, name)
            # A partial, as in `gated`: a scheduler copied inside the `with` has its own state, and tells nobody.
            telling = functools.partial(tap, session, scheduler, method)
            vars(telling)["__signature__"] = inspect.signature(method)  # pipelines look at it
            stack.enter_context(_attribute(scheduler, name, telling))
        yield


def _set_timesteps(session: Session, scheduler: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    result = method(*args, **kwargs)
    if scheduler is session.scheduler:
        session.begin()
    return result


def _step(session: Session, scheduler: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if scheduler is session.scheduler:
        session.step(inspect.signature(method).bind(*args, **kwargs).arguments.get("timestep"))
    return method(*args, **kwargs)


@contextmanager
def _attribute(thing: Any, name: str, value: functools.partial[Any]) -> Iterator[None]:
    """Shadow a method on one instance and put back what was there, unless somebody has replaced it since."""
    before = vars(thing).get(name)
    vars(thing)[name] = value
    try:
        yield
    finally:
        put_back(thing, name, value, before)


def enable_cache(pipe: Any, schedule: Schedule) -> None:
    """Open `cached(pipe, schedule)` until `disable_cache(pipe)`; a second call replaces the first.

    Raises as `cached` does.
    """
    stack = ExitStack()
    opened = stack, stack.enter_context(cached(pipe, schedule))
    disable_cache(pipe)
    _enabled[pipe] = opened


def disable_cache(pipe: Any) -> None:
    """Make the pipeline the stock one again; nothing happens if no cache is enabled."""
    if pipe in _enabled:
        _enabled.pop(pipe)[0].close()


def summary(pipe: Any) -> str:
    """Say what `enable_cache` has done for this pipeline so far: walks, share of sites reused, theoretical speedup."""
    if pipe not in _enabled:
        return "no cache is enabled; enable_cache(pipe, schedule) enables one"
    return str(_enabled[pipe][1])


@contextmanager
def original_numerics(transformer: nn.Module) -> Iterator[None]:
    """Make diffusers' DiT compute what the original DiT computes, for as long as the `with` is open.

    diffusers shifts the timestep embedding's frequencies by one and has an epsilon of 1e-5 in the norm before the
    feed-forward; the weights were trained with no shift and 1e-6.

    Raises ValueError for any other model.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    if not isinstance(transformer, DiTTransformer2DModel):
        raise ValueError(f"parity is for diffusers' DiT; {type(transformer).__name__} needs none that we know of")
    blocks: Any = transformer.transformer_blocks
    before = [(block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps) for block in blocks]
    try:
        for block in blocks:
            block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = 0, 1e-6
        yield
    finally:
        for block, (shift, eps) in zip(blocks, before, strict=True):
            block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = shift, eps


class StockDiT(nn.Module):
    """diffusers' DiT with the face of ours: (x, t, y) -> (B, C or 2C, H, W)."""

    def __init__(self, transformer: Any, *, parity: bool) -> None:
        super().__init__()
        self.transformer, self.parity = transformer, parity
        self.in_channels, self.input_size = transformer.config.in_channels, transformer.config.sample_size
        self.num_classes = transformer.config.num_embeds_ada_norm

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (and variance) in x (B, C, H, W) at timesteps t (B,) for labels y (B,)."""
        with ExitStack() as stack:
            if self.parity:
                stack.enter_context(original_numerics(self.transformer))
            return self.transformer(x, timestep=t, class_labels=y, return_dict=False)[0]  # type: ignore[no-any-return]


def from_pipeline(
    pipe: Any,
    *,
    steps: int = 20,
    guidance: float | None = None,
    prompts: StrPath | Sequence[str] | None = None,
    parity: bool = False,
) -> Denoiser:
    """Return a denoiser that walks as this pipeline does: its transformer, its scheduler, its guidance.

    Train on it, then run the pipeline under the schedule:

        router = train_sdt(from_pipeline(pipe, steps=20, guidance=4.5))
        with cached(pipe, router.schedule()):
            images = pipe(prompt, num_inference_steps=20, guidance_scale=4.5).images

    The transformer is shared and frozen; nothing else of the pipeline is touched.

    Args:
        pipe: DiTPipeline, PixArtAlphaPipeline or PixArtSigmaPipeline.
        steps: T, `num_inference_steps`.
        guidance: `guidance_scale`; None for the pipeline's default, 4.0 for DiT and 4.5 for PixArt.
        prompts: for PixArt, what to train on, encoded here by the pipeline's text encoder: a file with one prompt a
            line, or the prompts; None for a bundled list.
        parity: for DiT, train with the original's numerics; run with cached(…, parity=True) then.

    Raises:
        TypeError: if it is another pipeline; write a `Denoiser` for it, and `check_denoiser` says whether it is one.
        ValueError: if a number is out of range.
    """
    name = type(pipe).__name__
    if name not in ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"):
        raise TypeError(
            f"from_pipeline knows DiTPipeline, PixArtAlphaPipeline and PixArtSigmaPipeline, not {name}. Write a "
            "harmonica.Denoiser for it (harmonica/models/pixart.py is an example) and hold it to check_denoiser"
        )
    for session in _sessions.get(pipe.transformer, []):
        session.forget()  # of a walk that was interrupted
    sampler = Scheduled(_fresh(pipe.scheduler, steps), type(pipe.scheduler).__name__)
    named = f"{name}-{8 * pipe.transformer.config.sample_size}"  # one class has several sizes
    if name == "DiTPipeline":
        model: Any = StockDiT(pipe.transformer, parity=parity)
        scale = 4.0 if guidance is None else guidance
        return DiTDenoiser(model, sampler, guidance=scale, name=named, sites=sites(pipe.transformer))
    if parity:
        raise ValueError("parity is for diffusers' DiT; PixArt needs none")
    tokens = 300 if "Sigma" in name else 120
    encoded = encoded_by(pipe, prompts_from(prompts), tokens)
    return PixArtDenoiser(
        pipe.transformer, sampler, encoded, guidance=4.5 if guidance is None else guidance, name=named
    )


def _fresh(scheduler: Any, steps: int) -> Any:
    """Return a scheduler of the same settings with its timesteps set; the pipeline's own is not touched."""
    longest = getattr(scheduler.config, "num_train_timesteps", 1000)
    if not 1 <= steps <= longest:
        raise ValueError(f"steps is {steps}; it must be between 1 and {longest}")
    mine = copy.copy(scheduler)
    for name in ("set_timesteps", "step"):
        vars(mine).pop(name, None)  # taps of an open `cached` are the pipeline's, not ours
    mine.set_timesteps(steps)
    if float(getattr(mine, "init_noise_sigma", 0.0)) != 1.0:
        raise ValueError(
            f"{type(scheduler).__name__} scales its inputs or mixes noise in another way, which from_pipeline does not "
            "follow; use a scheduler of unit noise, such as DDIM or DPM-Solver++, or give cached(pipe, …) a schedule "
            "that you have"
        )
    return mine


def _argument_names(transformer: nn.Module) -> list[str]:
    return list(inspect.signature(type(transformer).forward).parameters)[1:]
