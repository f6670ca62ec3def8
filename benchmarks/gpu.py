"""What a card that is lent for minutes can tell: does everything run on it, how fast, in how much memory.

    python benchmarks/gpu.py --budget 540            items in order of worth, as many as the seconds allow
    python benchmarks/gpu.py --device cpu --quick    the same items on the bundled model, in under a minute

Each item runs in a try of its own and results/gpu.json is written after each, so a run that is cut short
keeps what it has. An item that does not run says why. Weights are drawn, zero nowhere; nothing is downloaded.

    tests           pytest -m gpu
    target          training with a target on the bundled model
    dit             T = 20, half of the table reused: plain and Walk, eager and as graphs; real over
                    theoretical, graph over eager, and what a weighted sum at each entry takes
    update          one update at batch 32, with and without activation checkpointing, against the dry run
    refinement      peak memory of the effects of flips, against the dry run
    milliseconds    the speedup that `milliseconds` predicts, against the clock
    flux            diffusers' own Flux pipeline, 1024×1024, under `cached`: eager, compiled, features on the host
    pixart          as dit, PixArt-α 512 and 1024
    training        up to 2000 updates of DiT-XL/2 256 with a target, in the time that is left
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import RESULTS, ended, record
from weights import small_weights

from harmonica import Router, Schedule, macs, sample, sdt, train_sdt
from harmonica.command_line import check_device
from harmonica.inference.graph import GraphWalk
from harmonica.inference.timing import by_turns, milliseconds, timed
from harmonica.inference.walk import Walk
from harmonica.models import load
from harmonica.models.pipelines import cached
from harmonica.models.sites import sites
from harmonica.search.flip_effects import flip_effects_at
from harmonica.search.references import Pool

GIB = 2**30


class SkippedError(Exception):
    """Why an item does not run here."""


@dataclass
class Card:
    """The device, the time that is left on it, and the one model that lies on it."""

    device: str
    quick: bool
    deadline: float
    update_seconds: float = 0.25  # of DiT-XL/2 256 at batch 32, until it is measured
    models: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return torch.device(self.device).type == "cuda"

    def model(self, name: str) -> Any:
        """Return a model on the device, loaded once; the one before it is let go."""
        name = "tiny" if self.quick else name
        if name not in self.models:
            self.models.clear()
            dtype = torch.bfloat16 if self.cuda else torch.float32
            weights, steps = None if name == "tiny" else "random", 4 if self.quick else 20
            self.models[name] = load(
                name, weights=weights, steps=steps, dtype=dtype, device=self.device
            )
        return self.models[name]

    @contextlib.contextmanager
    def peak(self, figures: dict[str, Any]) -> Any:
        """Note the most memory that the work takes, weights included; nothing on a CPU."""
        if not self.cuda:
            yield
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        torch.cuda.synchronize(self.device)
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / GIB, 2)


def drawn(d: Any, size: int) -> tuple[torch.Tensor, Any]:
    """Draw noises and conditions."""
    return d.draw(size, torch.Generator().manual_seed(0))  # type: ignore[no-any-return]


def half_reused(d: Any) -> Schedule:
    """Draw a table whose rows after the first reuse half of their sites."""
    rows = torch.rand(d.steps, len(d.sites), generator=torch.Generator().manual_seed(0)) > 0.5
    rows[0] = True
    return Schedule(rows, sites=tuple(d.sites))


def speeds(card: Card, d: Any, batch: int) -> dict[str, Any]:
    """Time plain, Walk and graph by turns."""
    table, (x, cond) = half_reused(d), drawn(d, batch)
    graph = GraphWalk(Walk(d, table))
    walks = {"plain": lambda x, c: sample(d, x, c), "walk": Walk(d, table), "graph": graph}
    walks["plain_graph"] = GraphWalk(Walk(d))
    walks["weights"] = Walk(d, replace(table, weights=small_weights(table.compute)))
    walks["weights_graph"] = GraphWalk(walks["weights"])
    turns = by_turns(walks, x, cond, repeats=1 if card.quick else 5)
    seconds = {name: median(values) for name, values in turns.items()}
    theory, real = table.speedup(macs(d)), seconds["plain"] / seconds["walk"]
    figures: dict[str, Any] = {"seconds": {name: round(s, 4) for name, s in seconds.items()}}
    figures |= {"theoretical": round(theory, 3), "real": round(real, 3)}
    figures |= {"real_over_theoretical": round(real / theory, 3)}
    figures |= {"weights_over_reuse": round(seconds["weights"] / seconds["walk"], 3)}
    reason = graph.reason or walks["plain_graph"].reason
    if reason is not None:
        return figures | {"no_graph": reason}
    figures |= {"graph_real": round(seconds["plain_graph"] / seconds["graph"], 3)}
    return figures | {"graph_over_eager": round(seconds["walk"] / seconds["graph"], 3)}


def tests(card: Card) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    if not card.cuda:
        raise SkippedError("there is no CUDA device, all of these tests would be skipped")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "--disable-warnings"]
    root, seconds = Path(__file__).parents[1], max(30.0, min(200.0, card.left - 60))
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds)
    return {"code": ran.returncode, "said": ran.stdout.strip().splitlines()[-3:]}


def target(card: Card) -> dict[str, Any]:
    """Train to a target on the bundled model, refinement included."""
    d = load("tiny", steps=4 if card.quick else 20, device=card.device)
    how = (
        {"iterations": 6, "batch_size": 8} if card.quick else {"iterations": 190, "batch_size": 32}
    )
    router = train_sdt(
        d, **how, lr=0.1, target_speedup=1.5, budget=0 if card.quick else 640_000, progress=False
    )
    facts = router.about["provenance"]
    return {
        "speedup": router.schedule().speedup(macs(d)),
        **{k: v for k, v in facts.items() if k != "method"},
    }


def dit(card: Card) -> dict[str, Any]:
    """Time DiT-XL/2 256."""
    d, figures = card.model("dit-xl-256"), {}
    for dtype in (torch.bfloat16, torch.float16) if card.cuda else (torch.float32,):
        d.model.to(dtype)
        for batch in (1, 8):
            figures[f"{str(dtype)[6:]}, batch {batch}"] = speeds(card, d, batch)
    d.model.to(torch.bfloat16 if card.cuda else torch.float32)
    return figures


def update(card: Card) -> dict[str, Any]:
    """Time an update and hold its memory against the dry run."""
    d, size, figures = card.model("dit-xl-256"), 4 if card.quick else 32, {}
    x, cond = drawn(d, size)
    for checkpointing in (False, True):
        d.model.activation_checkpointing = checkpointing
        router = Router(d.steps, d.sites, generator=torch.Generator().manual_seed(0)).to(
            card.device
        )
        updates, seconds = sdt(d, router, [(x, cond)], proxy=None), []
        found: dict[str, Any] = {}
        with card.peak(found):
            for _ in range(min(6, d.steps - 1)):
                with timed(x) as time_of_work:
                    next(updates)
                seconds.append(time_of_work() / 1e3)
            updates.close()
        found["seconds"] = round(median(seconds[1:]), 4)
        figures["checkpointing" if checkpointing else "plain"] = found | predicted(
            card, size, checkpointing
        )
    d.model.activation_checkpointing = False
    if not card.quick:
        card.update_seconds = figures["plain"]["seconds"]
    return figures


def predicted(card: Card, size: int, checkpointing: bool) -> dict[str, Any]:
    """Return what the dry run says of memory, in GiB, or why it says nothing."""
    name, dtype = ("tiny", torch.float32) if card.quick else ("dit-xl-256", torch.bfloat16)
    how = {"dtype": dtype, "activation_checkpointing": checkpointing}
    try:
        from harmonica.training.dry_run import dry_run

        meta = load(name, weights="random", device="meta", **how)
        memory = dry_run(meta, batch_size=size, target=True).memory
    except Exception as error:  # what was measured is worth as much without it
        return {"dry_run": f"{type(error).__name__}: {error}"[:200]}
    return {f"dry_run_{what}_gib": round(most / GIB, 3) for what, most in memory.items()}


def refinement(card: Card) -> dict[str, Any]:
    """Hold the memory of the effects of flips, for one noise, against the dry run."""
    d, figures = card.model("dit-xl-256"), {}
    x, cond = drawn(d, 1)
    plain = sample(d, x, cond)
    with card.peak(figures), timed(x) as time_of_work:
        flip_effects_at(d, half_reused(d), Pool(x, cond, plain), torch.ones_like(x))
    return figures | {"seconds": round(time_of_work() / 1e3, 3)} | predicted(card, 1, False)


def clocked(card: Card) -> dict[str, Any]:
    """Hold the speedup that `milliseconds` predicts against the clock."""
    d, figures = card.model("dit-xl-256"), {}
    table = half_reused(d)
    for batch in (1, 8):
        took = table.speedup(milliseconds(d, batch, repeats=3))
        real = speeds(card, d, batch)["real"]
        figures[f"batch {batch}"] = {
            "predicted": round(took, 3),
            "real": real,
            "ratio": round(real / took, 3),
        }
    return figures


def pixart(card: Card) -> dict[str, Any]:
    """Time PixArt-α."""
    if find_spec("diffusers") is None:
        raise SkippedError("diffusers is not installed, and PixArt is its model")
    if not card.cuda:
        raise SkippedError("PixArt takes a GPU")
    sizes = {"pixart-alpha-512": (1, 8), "pixart-alpha-1024": (1,)}
    return {
        f"{name}, batch {batch}": speeds(card, card.model(name), batch)
        for name, batches in sizes.items()
        for batch in batches
    }


def flux_pipeline(card: Card) -> Any:
    """Return Flux as diffusers runs it, of its real size or a tiny one, with drawn weights and no encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tiny = {"in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1}
    tiny |= {"num_single_layers": 2, "joint_attention_dim": 64, "axes_dims_rope": (4, 4, 8)}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True, **(tiny if card.quick else {}))
    transformer.to(torch.bfloat16 if card.cuda else torch.float32).to_empty(device=card.device)
    for weight in transformer.requires_grad_(False).parameters():
        weight.normal_(std=0.02)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, *[None] * 5, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(card: Card) -> dict[str, Any]:
    """Time diffusers' Flux under a table that computes every second step."""
    card.models.clear()
    pipe, steps, pixels = flux_pipeline(card), 4 if card.quick else 10, 64 if card.quick else 1024
    model, config = pipe.transformer, pipe.transformer.config
    draw = lambda *size: torch.randn(1, *size, device=card.device, dtype=model.dtype)  # noqa: E731
    prompt, pooled = draw(512, config.joint_attention_dim), draw(config.pooled_projection_dim)
    how = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled, "output_type": "latent"}
    how |= {"height": pixels, "width": pixels, "num_inference_steps": steps}

    def walk(*_: Any) -> torch.Tensor:
        return pipe(**how, generator=torch.Generator().manual_seed(0)).images  # type: ignore[no-any-return]

    def under(computed: list[bool], **options: Any) -> Callable[..., torch.Tensor]:
        names = tuple(sites(model))
        table = Schedule([[each] * len(names) for each in computed], names)

        def run(*_: Any) -> torch.Tensor:
            with cached(pipe, table, **options):
                return walk()

        return run

    half, found = [k % 2 == 0 for k in range(steps)], {}
    ways = {"stock": walk, "cached": under(half)}
    with warnings.catch_warnings():  # a table that reuses nothing skips nothing
        warnings.simplefilter("ignore")
        found["exact"] = bool(torch.equal(walk(), under([True] * steps)()))
    if card.cuda:
        ways["cached_offload"] = under(half, offload=True)
    for name, way in ways.items():
        memory: dict[str, Any] = {}
        with card.peak(memory):
            way()
        found |= {f"{name}_{key}": value for key, value in memory.items()}
    repeats = 1 if card.quick else 3
    seconds = by_turns(ways, prompt, None, repeats=repeats)
    if card.cuda and card.left > 60:
        model.compile_repeated_blocks()
        seconds |= by_turns({"stock_compiled": walk}, prompt, None, repeats=repeats)
        for part in model.modules():
            part._compiled_call_impl = None
        for site in sites(model).values():
            site.compile()
        seconds |= by_turns({"cached_compiled": ways["cached"]}, prompt, None, repeats=repeats)
    return found | {"seconds": {name: round(median(each), 4) for name, each in seconds.items()}}


def training(card: Card) -> dict[str, Any]:
    """Train as many updates of DiT-XL/2 256 with a target as the time allows."""
    d = card.model("dit-xl-256")
    updates = 9 if card.quick else min(2000, int(0.6 * card.left / card.update_seconds))
    if updates < d.steps:
        raise SkippedError(f"{card.left:.0f} s are left, not enough for a trajectory")
    size = 4 if card.quick else 32
    start = time.monotonic()
    router = train_sdt(
        d, iterations=updates, batch_size=size, target_speedup=1.5, budget=0, progress=False
    )
    seconds, faster = time.monotonic() - start, router.schedule().speedup(macs(d))
    return {"updates": updates, "seconds": round(seconds, 1), "speedup": round(faster, 3)}


ITEMS: dict[str, tuple[Callable[[Card], dict[str, Any]], float]] = {
    "tests": (tests, 60), "target": (target, 20), "dit": (dit, 40), "update": (update, 30),
    "refinement": (refinement, 20), "milliseconds": (clocked, 15), "flux": (flux, 60),
    "pixart": (pixart, 40), "training": (training, 30),
}  # fmt: skip
"""Function, and the seconds that must be left to begin it on a GPU."""


def attempt(card: Card, item: Callable[[Card], dict[str, Any]], least: float) -> dict[str, Any]:
    """Run one item; return its figures, or why there are none."""
    if card.left < (0 if card.quick else least):
        return {"skipped": f"{card.left:.0f} s were left and it takes about {least:.0f}"}
    start = time.monotonic()
    try:
        figures = item(card)
    except SkippedError as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # the items after it are worth as much without it
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        if card.cuda:
            torch.cuda.empty_cache()
    return figures | {"took_s": round(time.monotonic() - start, 1)}


def main() -> None:
    """Run the items, and record after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of it (540)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (cuda)")
    parser.add_argument(
        "--quick", action="store_true", help="the bundled model instead of large ones"
    )
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS), help="these items")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json (results)")
    args = parser.parse_args()
    check_device(args.device)
    card = Card(args.device, args.quick, time.monotonic() + args.budget)
    figures: dict[str, Any] = {"device": args.device, "quick": args.quick}
    for name in args.only:
        figures[name] = attempt(card, *ITEMS[name])
        print(f"{name:14}{str(figures[name])[:180]}", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            record("gpu-quick" if args.quick else "gpu", figures, args.out)


if __name__ == "__main__":
    ended(main)
