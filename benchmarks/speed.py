"""What a schedule promises and what the clock shows, and where the rest goes.

    python benchmarks/speed.py --quick            seconds: the bundled model, two turns
    python benchmarks/speed.py                    all cases of this device; on two CPU cores an hour or more
    python benchmarks/speed.py --only dit-xl-256@37.5 --turns 3
    python benchmarks/speed.py --device cuda --dtype float16

A case is a model, a batch and a table of a given CUR, drawn at random over steps 1 … T−1, so that no kind of site and
no step is favoured. Its ways are timed by turns, one walk of each in a turn, after a warm-up:

    plain       `sample` without a schedule
    sites       `sample` under the schedule: sites overridden one by one, every feature kept
    exact       `fast.Walk(exact=True)`: norms and modulations skipped too, repeated work hoisted, the same bits
    fast        `fast.Walk`: and modulations made ahead, sums fused
    graph       the fast walk as one CUDA graph                          (on CUDA)

and for `-pipe` cases, which are stock diffusers pipelines:

    plain       the pipeline          exact            under `cached`
    pab         diffusers' own Pyramid Attention Broadcast, every second attention
    cache-dit   its DBCache, told to compute every second step; it computes the first block always   (extra `bench`)
    its-table   that very table under `cached`

Ratios are taken within a turn; medians and quartiles are over turns. Every turn is written down as it ends, so a run
that was stopped is continued by the same command, until a case has --turns turns. efficiency = measured / theoretical.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from record import RESULTS, ended, machine, memory_mib, record
from torch import Tensor, nn

from harmonica import Schedule, macs, sample
from harmonica.cache import gated
from harmonica.cost import Macs, count
from harmonica.inference.graph import GraphWalk
from harmonica.inference.lifetimes import Plan, plan_of
from harmonica.inference.walk import Accelerated, Walk
from harmonica.models import load
from harmonica.models.dit import DiT, DiTDenoiser
from harmonica.pictures import save
from harmonica.samplers import DDIM
from harmonica.storage.files import read_json

Way = Callable[[Tensor, Any], Any]

_WIDTHS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
SIZES: dict[str, dict[str, int]] = {
    f"DiT-{name}/{patch}": {"depth": d, "hidden_size": w, "num_heads": h, "patch_size": patch}
    for name, (d, w, h) in _WIDTHS.items()
    for patch in (2, 4, 8)
}
"""Arguments of `DiT` for the original twelve sizes, `DiT-S/8` to `DiT-XL/2`."""


@dataclass(frozen=True)
class Case:
    """What is timed: a model, a batch and a share of the table that is reused."""

    model: str
    batch: int
    cur: float  # per cent
    steps: int

    @property
    def name(self) -> str:
        """As --only takes it."""
        return f"{self.model}@{self.cur:g} b{self.batch} T{self.steps}"


ON_CPU = (
    Case("tiny", 1, 50, 20),
    Case("tiny", 64, 50, 20),
    Case("DiT-S/2", 8, 50, 10),
    *(Case("dit-xl-256", 1, cur, 10) for cur in (25, 37.5, 50)),
    Case("pixart-alpha-256", 1, 50, 10),
    Case("dit-xl-256-pipe", 1, 50, 10),
    Case("pixart-alpha-256-pipe", 1, 50, 10),
)
ON_GPU = (
    *(Case("dit-xl-256", batch, cur, 20) for batch in (1, 8) for cur in (25, 37.5, 50)),
    *(
        Case(model, batch, 50, 20)
        for model in ("dit-xl-512", "pixart-alpha-256", "pixart-alpha-512", "pixart-alpha-1024")
        for batch in (1, 8)
    ),
    Case("pixart-sigma-2k", 1, 50, 20),
    Case("dit-xl-256-pipe", 1, 50, 20),
    Case("pixart-alpha-256-pipe", 1, 50, 20),
)
QUICK = (Case("tiny", 1, 50, 20), Case("tiny", 64, 50, 20), Case("small-pipe", 1, 50, 10))


def schedule_of(steps: int, sites: tuple[str, ...], cur: float, seed: int = 0) -> Schedule:
    """Draw a table of this CUR: its reused entries lie anywhere in rows 1 … T−1."""
    free = (steps - 1) * len(sites)
    reused = round(cur / 100 * steps * len(sites))
    rows = torch.ones(free, dtype=torch.bool)
    rows[torch.randperm(free, generator=torch.Generator().manual_seed(seed))[:reused]] = False
    return Schedule(
        torch.cat([torch.ones(1, len(sites), dtype=torch.bool), rows.view(-1, len(sites))]),
        sites=sites,
    )


# ------------------------------------------------------------ a denoiser and its ways


@dataclass
class Bench:
    """A case made ready."""

    ways: dict[str, Way]
    theory: dict[str, float]  # of every way that promises something
    x: Tensor
    cond: Any
    facts: dict[str, Any]
    model: nn.Module


def denoiser_of(case: Case, device: str, dtype: torch.dtype) -> Any:
    """Load the model of a case; weights are random but for the bundled one's."""
    if case.model not in SIZES:
        weights = None if case.model == "tiny" else "random"
        return load(case.model, steps=case.steps, weights=weights, dtype=dtype, device=device)
    model = DiT(**SIZES[case.model]).to(device, dtype)
    return DiTDenoiser(model, DDIM(case.steps), guided_channels=3, name=case.model)


def of_denoiser(case: Case, device: str, dtype: torch.dtype) -> Bench:
    """Make a case of a denoiser ready."""
    d = denoiser_of(case, device, dtype)
    schedule = schedule_of(case.steps, tuple(d.sites), case.cur)
    counted = macs(d)
    x, cond = d.draw(case.batch, torch.Generator().manual_seed(0))
    ways: dict[str, Way] = {
        "plain": lambda x, cond: sample(d, x, cond),
        "sites": lambda x, cond: sample(d, x, cond, schedule),
        "exact": Walk(d, schedule, exact=True),
        "fast": Walk(d, schedule),
    }
    if device.startswith("cuda"):
        ways["graph"] = GraphWalk(Walk(d, schedule))
    theory = dict.fromkeys([way for way in ways if way != "plain"], schedule.speedup(counted))
    facts = cache_facts(d.sites, schedule, lambda: d.predict(x, 0, cond), d.model)
    facts |= {
        "gmacs_per_prediction": round(counted.total / 1e9, 3),
        "covered": round(counted.covered, 4),
    }
    return Bench(
        ways, theory, x, cond, facts | {"sites": len(d.sites), "cur": schedule.cur}, d.model
    )


def peak(plan: Plan, sizes: Sequence[float]) -> float:
    """Return the most that is alive in a walk's cache at once, for features of these sizes."""
    alive, most = [0] * len(sizes), 0.0  # features of each site
    for row in plan:
        for site, entry in enumerate(row):
            alive[site] = len(entry.keep)
            most = max(most, sum(n * size for n, size in zip(alive, sizes, strict=True)))
    return most


def cache_facts(
    sites: Any, schedule: Schedule, run: Callable[[], Any], model: nn.Module
) -> dict[str, Any]:
    """Weigh the features of one prediction: all of them, and the most that the schedule has alive at once."""
    sizes = [0] * len(sites)

    def gate(site: int, compute: Callable[[], Any]) -> Any:
        feature = compute()
        tensors = feature if isinstance(feature, tuple) else (feature,)
        sizes[site] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return feature

    with torch.no_grad(), gated(sites, gate):
        run()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    most = peak(plan_of(schedule), sizes)
    return {
        "model_mib": round(weights / 2**20, 1),
        "features_mib": round(sum(sizes) / 2**20, 1),
        "features_alive_mib": round(most / 2**20, 1),
        "cache_share_of_model": round(most / weights, 4),
    }


# ------------------------------------------------------------ stock pipelines


def pipeline_of(case: Case, device: str, dtype: torch.dtype) -> tuple[Any, Way]:
    """Return a stock pipeline with random weights, and how it is run; latents come out, or through a toy decoder."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    from harmonica.models.pixart import PIXART, transformer_of

    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).to(device, dtype)  # fmt: skip
    if case.model.startswith("pixart"):
        transformer = (
            transformer_of(PIXART[case.model.removesuffix("-pipe")]).to(device, dtype).eval()
        )
        text = torch.randn(2, 120, 4096, generator=torch.Generator().manual_seed(0)).to(
            device, dtype
        )
        mask = torch.ones(1, 120, dtype=torch.long, device=device)
        pipe: Any = PixArtAlphaPipeline(None, None, vae, transformer, DPMSolverMultistepScheduler())
        given = {
            "prompt_embeds": text[:1],
            "negative_prompt_embeds": text[1:],
            "negative_prompt": None,
        }
        given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        given |= {
            "num_inference_steps": case.steps,
            "output_type": "latent",
            "use_resolution_binning": False,
        }

        def run(x: Tensor, cond: Any) -> Any:
            return pipe(latents=x, height=256, width=256, **given).images
    else:
        small = {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "sample_size": 8,
        }
        transformer = DiTTransformer2DModel(
            out_channels=8, **(small if case.model == "small-pipe" else {})
        )
        first, *others = (block.norm1.emb for block in transformer.transformer_blocks)
        for emb in others:  # as in the released weights
            emb.load_state_dict(first.state_dict())
        transformer = transformer.to(device, dtype).eval()
        pipe = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))

        def run(x: Tensor, cond: Any) -> Any:
            options = {"num_inference_steps": case.steps, "output_type": "pt"}
            return pipe(
                [1] * case.batch, generator=torch.Generator().manual_seed(0), **options
            ).images

    pipe.set_progress_bar_config(disable=True)
    return pipe, run


def of_pipeline(case: Case, device: str, dtype: torch.dtype) -> Bench:
    """Make a case of a stock pipeline ready."""
    from harmonica.models.pipelines.caching import cached
    from harmonica.models.sites import sites

    pipe, run = pipeline_of(case, device, dtype)
    found = sites(pipe.transformer)
    schedule = schedule_of(case.steps, tuple(found), case.cur)
    x = torch.randn(case.batch, 4, *[pipe.transformer.config.sample_size] * 2).to(device, dtype)
    counted, forward = counted_in(pipe, found, lambda: run(x, None))

    def under(schedule: Schedule) -> Way:
        def way(x: Tensor, cond: Any) -> Any:
            with cached(pipe, schedule):
                return run(x, cond)

        return way

    ways: dict[str, Way] = {"plain": run, "exact": under(schedule)}
    theory = {"exact": schedule.speedup(counted)}
    ways["pab"] = pab(pipe, run)
    attention = torch.ones(case.steps, len(found), dtype=torch.bool)
    attention[1::2, [name.endswith("attn1") for name in found]] = False
    theory["pab"] = Schedule(attention).speedup(counted)
    if find_spec("cache_dit") is not None:
        ways["cache-dit"] = under_cache_dit(case, device, dtype)
        blocks = torch.ones(case.steps, len(found), dtype=torch.bool)
        blocks[1::2, [not name.startswith("transformer_blocks.0.") for name in found]] = False
        its = Schedule(blocks, sites=tuple(found))
        ways["its-table"] = under(its)
        theory["cache-dit"] = theory["its-table"] = its.speedup(counted)
    facts = cache_facts(found, schedule, forward, pipe.transformer)
    return Bench(
        ways, theory, x, None, facts | {"sites": len(found), "cur": schedule.cur}, pipe.transformer
    )


def counted_in(pipe: Any, found: Any, run: Callable[[], Any]) -> tuple[Macs, Callable[[], Any]]:
    """Run the pipeline up to its first call of the transformer; return what that costs, and the call."""
    taken: list[Any] = []

    class StopError(Exception):
        pass

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        taken.append((args, kwargs))
        raise StopError

    handle = pipe.transformer.register_forward_pre_hook(take, with_kwargs=True)
    with contextlib.suppress(StopError):
        run()
    handle.remove()
    args, kwargs = taken[0]

    def forward() -> Any:
        return pipe.transformer(*args, **kwargs)

    return count(forward, found, fake=False), forward


def pab(pipe: Any, run: Way) -> Way:
    """Run under diffusers' own Pyramid Attention Broadcast, applied anew each time: its state outlives a call."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
    from diffusers.hooks.hooks import HookRegistry

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )

    def way(x: Tensor, cond: Any) -> Any:
        apply_pyramid_attention_broadcast(pipe.transformer, config)
        try:
            return run(x, cond)
        finally:
            for module in pipe.transformer.modules():
                if hasattr(module, "_diffusers_hook"):
                    HookRegistry.check_if_exists_or_initialize(module).remove_hook(
                        "pyramid_attention_broadcast"
                    )

    return way


def under_cache_dit(case: Case, device: str, dtype: torch.dtype) -> Way:
    """Run under cache-dit, on a pipeline of its own: what it patches stays patched when it is disabled."""
    import cache_dit

    logging.getLogger("cache_dit").setLevel(logging.ERROR)
    pipe, run = pipeline_of(case, device, dtype)
    mask = [int(k % 2 == 0) for k in range(case.steps)]
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0, residual_diff_threshold=1e9,
        steps_computation_mask=mask, steps_computation_policy="static", num_inference_steps=case.steps,
    )  # fmt: skip
    cache_dit.enable_cache(pipe, cache_config=config)
    return run


# ------------------------------------------------------------ the clock


def seconds(way: Way, bench: Bench) -> float:
    """Time one walk to its end."""
    if bench.x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    way(bench.x, bench.cond)
    if bench.x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mib(way: Way, bench: Bench) -> float | None:
    """Return the most memory that one walk takes above what is there before it; None where nobody counts it.

    On a CPU it is the process's memory as Linux sees it: what the allocator kept from an earlier walk is not seen.
    """
    if not bench.x.is_cuda:
        forget = Path("/proc/self/clear_refs")
        if not forget.exists():
            return None
        gc.collect()
        forget.write_text("5", encoding="ascii")  # Linux starts its maximum anew
        before = memory_mib("VmRSS")
        way(bench.x, bench.cond)
        return round(memory_mib("VmHWM") - before, 1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way(bench.x, bench.cond)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def spread(values: list[float]) -> list[float]:
    """Return lower quartile, median, upper quartile."""
    low, middle, high = (
        quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return [round(value, 4) for value in (low, middle, high)]


def summary(turns: dict[str, list[float]], theory: dict[str, float]) -> dict[str, Any]:
    """Return medians and quartiles of seconds, and of ratios taken within a turn."""
    rows: dict[str, Any] = {}
    for way, column in turns.items():
        rows[way] = {"seconds": spread(column)}
        if way in theory:
            ratios = [plain / mine for plain, mine in zip(turns["plain"], column, strict=True)]
            rows[way] |= {
                "theoretical_speedup": round(theory[way], 4),
                "measured_speedup": spread(ratios),
                "efficiency": round(median(ratios) / theory[way], 4),
            }
    return rows


# ------------------------------------------------------------ where it goes


KINDS = (
    "attention",
    "feed-forward",
    "norm",
    "embedding and modulation",
    "sampler",
    "element-wise and Python",
)


@contextlib.contextmanager
def stopwatch(bench: Bench, spent: dict[str, float], step: Any) -> Iterator[None]:
    """Add up what outermost modules of each kind take, by classes: nothing is put on the model itself."""
    kinds = {
        "Attention": 0, "Mlp": 1, "FeedForward": 1, "LayerNorm": 2, "Sequential": 3, "TimestepEmbedder": 3,
        "PatchEmbedder": 3, "PatchEmbed": 3, "AdaLayerNormSingle": 3,
        "CombinedTimestepLabelEmbeddings": 3, "PixArtAlphaTextProjection": 3,
    }  # fmt: skip
    classes = {type(m) for m in bench.model.modules() if type(m).__name__ in kinds}
    inside, originals = [False], {kind: kind.forward for kind in classes}

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                return function(*args, **kwargs)
            inside[0], start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[what] += time.perf_counter() - start
                inside[0] = False

        return forward

    for kind in classes:
        kind.forward = timed(KINDS[kinds[kind.__name__]], originals[kind])
    own = vars(step).get("step")
    step.step = timed("sampler", step.step)
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.forward = original
        if own is None:
            del step.step


def waterfall(case: Case, bench: Bench, d: Any) -> dict[str, dict[str, float]]:
    """Return seconds by kind for each way; on a CPU, where a call ends when its work does."""
    result = {}
    for name, way in bench.ways.items():
        if name in ("plain", "sites", "fast"):
            spent = dict.fromkeys(KINDS, 0.0)
            with stopwatch(bench, spent, d):
                whole = seconds(way, bench)
            spent[KINDS[-1]] = whole - sum(spent.values())
            result[name] = {kind: round(value, 4) for kind, value in spent.items()}
    return result


def picture(falls: dict[str, Any], path: Path) -> None:
    """Draw the waterfalls, each way as a stack over the plain walk's total."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * len(falls) + 2.4, 3.2), layout="constrained")
    axes = figure.subplots(1, len(falls), sharey=True, squeeze=False)[0]
    for axis, (name, fall) in zip(axes, falls.items(), strict=True):
        whole, bottom = sum(fall["plain"].values()), [0.0] * len(fall)
        for kind in KINDS:
            heights = [100 * way[kind] / whole for way in fall.values()]
            axis.bar(list(fall), heights, bottom=bottom, label=kind if axis is axes[0] else None)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axis.set_title(name.replace("@", "\n", 1), fontsize=9)
    axes[0].set_ylabel("% of the plain walk")
    figure.legend(loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


# ------------------------------------------------------------ how it grows


def growth(turns: int, device: str, dtype: torch.dtype, *, quick: bool) -> list[dict[str, Any]]:
    """Time a small DiT while one of T, batch, tokens and sites grows."""
    base = {"steps": 8, "batch": 4, "size": 16, "depth": 4}
    grown: dict[str, tuple[int, ...]] = {
        "steps": (4, 16),
        "batch": (1, 16),
        "size": (8, 32),
        "depth": (2, 8),
    }
    rows = []
    for name, values in grown.items():
        for value in sorted({base[name], *(values[-1:] if quick else values)}):
            setting = {**base, name: value}
            model = DiT(
                input_size=setting["size"], hidden_size=192, depth=setting["depth"], num_heads=6
            )
            d = DiTDenoiser(model.to(device, dtype), DDIM(setting["steps"]), name="small")
            schedule = schedule_of(setting["steps"], tuple(d.sites), 50)
            x, cond = d.draw(setting["batch"], torch.Generator().manual_seed(0))
            ways = {"plain": lambda x, cond, d=d: sample(d, x, cond), "fast": Walk(d, schedule)}
            bench = Bench(ways, {"fast": schedule.speedup(macs(d))}, x, cond, {}, model)
            for way in ways.values():
                seconds(way, bench)
            columns: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(turns):
                for way in ways:
                    columns[way].append(seconds(ways[way], bench))
            fast = summary(columns, bench.theory)["fast"]
            tokens = (setting["size"] // 2) ** 2
            rows.append(
                {"varied": name, **setting, "tokens": tokens, "sites": len(d.sites), **fast}
            )
    return rows


# ------------------------------------------------------------ the command


def run_case(
    case: Case,
    known: dict[str, Any],
    args: argparse.Namespace,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Time a case until it has its turns; `write` is given it after each."""
    dtype = getattr(torch, args.dtype)
    missing = args.turns - len(next(iter(known.get("turns", {}).values()), []))
    if missing <= 0 and "waterfall" in known:
        return
    pipe = case.model.endswith("-pipe")
    bench = of_pipeline(case, args.device, dtype) if pipe else of_denoiser(case, args.device, dtype)
    turns = {way: list(known.get("turns", {}).get(way, [])) for way in bench.ways}
    short = min(map(len, turns.values()))
    turns = {way: column[:short] for way, column in turns.items()}
    if bench.x.is_cuda or case.model.split("@")[0] in ("tiny", "small-pipe", "DiT-S/2"):
        for way in bench.ways.values():
            seconds(way, bench)
    # A large model on a CPU was warmed by weighing its features; a walk of each way would take as long as a turn.
    for _ in range(args.turns - short):
        for name, way in bench.ways.items():
            turns[name].append(seconds(way, bench))
        done = {
            **bench.facts,
            "batch": case.batch,
            "steps": case.steps,
            "dtype": args.dtype,
            "turns": turns,
        }
        done |= {"threads": torch.get_num_threads(), "ways": summary(turns, bench.theory)}
        if "peak_mib" not in known:
            done["peak_mib"] = {name: peak_mib(way, bench) for name, way in bench.ways.items()}
        if bench.x.is_cuda:
            graph = bench.ways.get("graph")
            done["graph_reason"] = graph.reason if isinstance(graph, GraphWalk) else None
        write(known | done)
        known = known | done
    if not pipe and not bench.x.is_cuda:
        d = bench.ways["fast"].denoiser  # type: ignore[attr-defined]
        assert isinstance(d, Accelerated)
        write(known | {"waterfall": waterfall(case, bench, d)})
    else:
        write(known | {"waterfall": {}})


def main(arguments: list[str] | None = None) -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="cases whose name begins so, or `growth`")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    args.turns = args.turns or (2 if args.quick else 5)
    name = ("speed_quick" if args.quick else "speed") + (
        "" if args.device == "cpu" else f"_{args.device}_{args.dtype}"
    )
    path = args.out / f"{name}.json"
    figures: dict[str, Any] = read_json(path)["figures"] if path.exists() and not args.quick else {}
    cases = QUICK if args.quick else ON_CPU if args.device == "cpu" else ON_GPU
    chosen = [case for case in cases if args.only is None or case.name.startswith(args.only)]

    def write(figures: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(None):
            record(name, figures, args.out)

    for case in chosen:

        def keep(done: dict[str, Any], case: Case = case) -> None:
            figures[case.name] = done
            write(figures)
            ways = {
                way: (row["seconds"][1], row.get("efficiency")) for way, row in done["ways"].items()
            }
            print(f"{case.name}: {ways}", flush=True)

        run_case(case, figures.get(case.name, {}), args, keep)
    if args.only in (None, "growth"):
        figures["growth"] = growth(
            args.turns, args.device, getattr(torch, args.dtype), quick=args.quick
        )
        write(figures)
    halves = [case.name for case in cases if case.cur == 50]
    falls = {
        name: figures[name]["waterfall"]
        for name in halves
        if figures.get(name, {}).get("waterfall")
    }
    if falls:
        picture(falls, args.out / f"{name}_waterfall.png")
    print(f"{path} ({machine()['cpu']}, {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    ended(main)
