"""What a training run is: its settings, the state that it carries from walk to walk, and the file
that both are kept in.

The file holds the router, the state at the start of a walk, and what must be the same on resuming:
the settings, and what the router is for. A run that is stopped in the middle of a walk repeats it
on resuming, with the same noise, and so ends in the same router, bit for bit. Of several processes
rank 0 alone touches the file. All start from its state, so a run may be resumed with another number
of processes, to rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from harmonica.check import identity
from harmonica.denoise import Denoiser
from harmonica.memory import is_out_of_memory
from harmonica.processes import batch_per_rank, from_rank_0, rank
from harmonica.router import Router
from harmonica.sdt import Update
from harmonica.search.target import Target
from harmonica.storage.files import decoding, refuse_existing, require_same
from harmonica.storage.formats import build, read_router, write_router
from harmonica.training.beta import BetaController
from harmonica.values import StrPath, require, seeded, whole

Captured = tuple[dict[str, Tensor], dict[str, Any]]  # a state as tensors and numbers by name


@dataclass
class TrainingState:
    """What is alive between two walks; nothing else is."""

    settings: dict[str, Any]  # strings and numbers that must be the same on resuming
    router: Router
    optimizer: AdamW
    lam: Tensor  # λ, (T,)
    controller: BetaController | None  # None where β is fixed
    generator: torch.Generator  # of the noises and conditions
    updates: int = 0
    walk: int = 0  # the walk that the next update belongs to

    def count(self, update: Update) -> None:
        """Count one update."""
        self.updates += 1
        self.walk = update.walk + (update.k == self.router.steps - 1)
        self.router.about["provenance"]["iterations"] = self.updates

    def capture(self) -> Captured:
        """Return copies of everything."""
        tensors = {"logits": self.router.logits, "lam": self.lam.clone()}
        tensors["generator"] = self.generator.get_state()
        if self.controller is not None:
            tensors["beta"] = self.controller.state.clone()
        for k, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{name}": value.clone() for name, value in moments.items()}
        tensors = {f"state.{name}": value for name, value in tensors.items()}
        return tensors, {"updates": self.updates, "walk": self.walk}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Set everything to what was captured; raise ValueError or KeyError if it does not fit."""
        self.updates, self.walk = counts = facts["updates"], facts["walk"]
        counted = all(isinstance(count, int) and 0 <= count <= 10**12 for count in counts)
        require(counted, f"updates and walk are {counts!r:.80}")
        self.router.about["provenance"]["iterations"] = self.updates
        logits = _tensor(tensors, "state.logits", self.router.logits)
        for k, row in enumerate(self.router.rows):
            row.copy_(logits[k])
            start = f"state.optimizer.{k}."
            if any(name.startswith(start) for name in tensors):
                likes = {"step": torch.zeros(()), "exp_avg": row, "exp_avg_sq": row}  # step: CPU
                moments = {key: _tensor(tensors, start + key, like) for key, like in likes.items()}
                self.optimizer.state[row] = moments
        self.lam.copy_(_tensor(tensors, "state.lam", self.lam))
        if self.controller is not None:
            self.controller.restore(_tensor(tensors, "state.beta", self.controller.state))
        self.generator.set_state(tensors["state.generator"].cpu())


def _tensor(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    value = tensors[name]
    kinds = [f"{tuple(each.shape)} {each.dtype}" for each in (value, like)]
    fit = kinds[0] == kinds[1] and bool(value.isfinite().all())
    require(fit, f"{name} is {kinds[0]}; expected {kinds[1]}, and finite")
    return value.to(like.device, copy=True)


def trainable_steps(denoiser: Denoiser) -> int:
    """Return T; raise ValueError for a walk of one step, of which nothing can be trained."""
    what = "the denoiser has 1 step, which always computes; nothing can be trained"
    require(denoiser.steps >= 2, what)
    return denoiser.steps


def start(
    denoiser: Denoiser, settings: dict[str, Any], target: Target | None = None,
    generator: torch.Generator | None = None,
) -> TrainingState:  # fmt: skip
    """Return the state of a run that has done nothing yet; a target chooses β by itself. Raises
    TypeError or ValueError if no router can be trained for the denoiser.
    """
    T, generator = trainable_steps(denoiser), seeded(generator)
    batch_per_rank(settings["batch_size"])
    if target is not None:
        settings |= {"target_speedup": target.speedup, "target_cost": target.cost.total}
        del settings["beta"]
    known = {**settings, "proxy": settings["proxy"] or "none"}
    provenance = {"method": "HarmoniCa", "iterations": 0, **known}
    with decoding("denoiser.about", "does not describe a schedule"):  # before hours, not after
        about = {**denoiser.about, "provenance": provenance}
        router = Router(T, denoiser.sites, generator=generator, about=about)
    device = denoiser.draw(1, torch.Generator())[0].device
    require(device.type != "meta", "the denoiser is on meta, where nothing is computed; load it")
    optimizer = AdamW(router.to(device).parameters(), lr=settings["lr"], weight_decay=0.0)
    controller = None if target is None else BetaController(target, settings["tau"], device)
    return TrainingState(settings, router, optimizer, torch.ones(T), controller, generator)


class Checkpoint:
    """The file of a training run, written every so many updates, before and after the search; as a
    context it saves the run on Ctrl-C and on lack of memory.

    `path` is None for a run that leaves no file. `state` is set to what the run starts from, on all
    processes. Raises FileExistsError, FileNotFoundError or ValueError if file and request disagree:
    on resuming, the settings and the denoiser must be the same.
    """

    def __init__(
        self, path: StrPath | None, every: int, denoiser: Denoiser, state: TrainingState,
        iterations: int, *, resume: bool,
    ) -> None:  # fmt: skip
        self.path, self.every, self.state = path, whole("checkpoint_every", every), state
        self.facts = {"settings": {**identity(denoiser), **state.settings}}
        whole("iterations", iterations)

        def first() -> Captured:
            if resume:
                self._restore(iterations)
            elif self.path is not None:
                refuse_existing(self.path, "resume=True continues it, or choose another name")
            tensors, facts = state.capture()
            return {name: value.cpu() for name, value in tensors.items()}, facts

        state.restore(*from_rank_0(first))
        self.captured, self.written = state.capture(), state.updates

    def note(self) -> None:
        """Note the state between two walks, and write it if a write is due."""
        self.captured = self.state.capture()
        if self.state.updates - self.written >= self.every:
            self.write()

    def write(self) -> None:
        """Write the state noted last, and the router as it is now, maybe part of a walk further."""
        (tensors, counts), router = self.captured, self.state.router
        self.written = counts["updates"]
        if self.path is not None and rank() == 0:
            fields = {"logits": router.logits, "sites": router.sites, "about": router.about}
            write_router(self.path, fields, (tensors, {**counts, **self.facts}))

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        stopped = isinstance(error, KeyboardInterrupt)
        if stopped or is_out_of_memory(error):
            self.state.restore(*self.captured)  # to the start of the walk
            self.write()
        if stopped:
            resumed = f"{self.path} continues it with resume=True"
            kept = resumed if self.path else "nothing was saved"
            raise KeyboardInterrupt(f"stopped after {self.written} updates; {kept}") from None

    def _restore(self, iterations: int) -> None:
        require(self.path is not None, "resume is True without a checkpoint; name the file")
        path: Any = self.path
        facts: Any
        fields, tensors, facts = read_router(path)
        router, then = build(Router, path, fields), facts.get("settings")
        complete = isinstance(then, dict) and "state.logits" in tensors
        require(complete, f"{path} is a router without the state of its training; it cannot go on")
        what, todo = f"{path} was trained with other settings", "resume with the same"
        require_same(what, then, self.facts["settings"], todo)
        with decoding(path, "is a damaged checkpoint"):
            done = int(router.about.get("provenance", {}).get("iterations", 0))
            self.state.restore(tensors, facts)
        enough = f"{path} has {done} updates already and {iterations} were asked for; ask for more"
        require(done <= iterations, enough)
