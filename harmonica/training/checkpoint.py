"""Checkpoint: what one training run carries from a trajectory to the next, and its file.

Between two trajectories nothing is alive but the logits, the optimizer's moments, λ, a steered β
and the random generator. Noting that state at each start makes a checkpoint a few kilobytes,
wherever the run is stopped: resuming repeats the trajectory that was cut short, with the same
noise, and so ends in the same router, bit for bit.

Of several processes (harmonica.processes) rank 0 alone touches the file. All of them start from its
state and draw the same joint noise, so a run may be resumed with another number of processes, to
the same router to rounding.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW

from harmonica.cost import macs
from harmonica.denoise import Denoiser
from harmonica.processes import from_rank_0, own, rank, share
from harmonica.router import Router
from harmonica.storage.files import StrPath, refused
from harmonica.storage.formats import read_router, write_router

if TYPE_CHECKING:
    from harmonica.sdt import Update


class Run:
    """A training run and, if it has a path, its checkpoint.

    Args:
        denoiser: what a router is trained for.
        settings: batch_size (of all processes together), lr and whatever else must be the same on
            resuming.
        iterations: updates in all; those that were made are noted in the router's provenance.
        generator: draws the router, the noise and the conditions; seed 0 if None. Rank 0's is
            everyone's.
        path: of the checkpoint, or None for a run that leaves none.
        every: updates from one write to the next.
        resume: continue from the checkpoint.

    Raises:
        TypeError: if denoiser is not one.
        FileExistsError: if path exists and resume is false.
        FileNotFoundError: if resume is true and path does not exist.
        ValueError: if a setting is out of range, or the file is not a checkpoint or made with other
            settings.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: dict[str, Any],
        iterations: int,
        generator: torch.Generator | None,
        path: StrPath | None,
        every: int,
        resume: bool,
    ) -> None:
        if not isinstance(denoiser, Denoiser):
            raise TypeError(
                f"{type(denoiser).__name__} lacks a member of harmonica.Denoiser; see its docstring"
            )
        if denoiser.steps < 2:
            raise ValueError(
                "the denoiser has 1 step, which always computes; there is nothing to train"
            )
        if min(iterations, settings["batch_size"], every) < 1:
            found = f"iterations {iterations}, batch_size {settings['batch_size']}, checkpoint_every {every}"
            raise ValueError(f"found {found}; each must be 1 or more")
        share(settings["batch_size"])
        self.iterations, self.weights = iterations, _fingerprint(denoiser)
        self.denoiser, self.settings, self.path, self.every = denoiser, settings, path, every
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        about = {
            **denoiser.about,
            "provenance": {"method": "HarmoniCa", "iterations": 0, **settings},
        }
        self.router = Router(denoiser.steps, denoiser.sites, generator=self.generator, about=about)
        self._must_freeze()
        self.router.to(denoiser.draw(1, torch.Generator())[0].device)
        self.optimizer = AdamW(self.router.parameters(), lr=settings["lr"], weight_decay=0.0)
        self.lam = torch.ones(denoiser.steps)  # (T,)
        self.steering = torch.zeros(
            3, dtype=torch.float64
        )  # of harmonica.search.budget.Steering, changed in place like λ
        self.updates = self.trajectory = self.written = 0
        self._set(*from_rank_0(lambda: self._begin(resume)))
        self.written = self.updates
        self._note()

    def _must_freeze(self) -> None:
        """Raise ValueError, before hours of work and not after, if the denoiser's `about` is not a
        schedule's.
        """
        try:
            self.router.schedule()
        except (TypeError, ValueError) as error:
            raise refused("denoiser.about", "does not describe a schedule", error) from None

    def _begin(self, resume: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state to start from: the checkpoint's, or that of a run which has done
        nothing.
        """
        if resume:
            self._restore("the checkpoint to resume" if self.path is None else self.path)
        elif self.path is not None and Path(self.path).exists():
            raise FileExistsError(
                f"{self.path} exists; resume=True continues it, or choose another name"
            )
        elif self.path is not None and not Path(self.path).absolute().parent.is_dir():
            raise FileNotFoundError(
                f"{Path(self.path).parent}: no such folder; make it before training"
            )
        self._note()
        tensors, facts = self._noted
        return {key: value.cpu() for key, value in tensors.items()}, facts

    def noise(self) -> Iterator[tuple[Tensor, Any]]:
        """Draw this process's noise and conditions, a trajectory at a time, noting the state before
        each.
        """
        while True:
            self._note()
            if self.updates - self.written >= self.every:
                self.save()
            joint = self.settings["batch_size"]
            yield own(self.denoiser.draw(joint, self.generator), joint)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Save at the end and on Ctrl-C, which then says where; not after an error, which may be in
        the numbers.
        """
        if kind is KeyboardInterrupt:
            self.save(interrupted=True)
            kept = (
                f"{self.path} continues it with resume=True" if self.path else "nothing was saved"
            )
            raise KeyboardInterrupt(f"stopped after {self.updates} updates; {kept}") from None
        if kind is None:
            self.save()

    def count(self, trajectory: int) -> None:
        """Count one update; `trajectory` is the one that the next update belongs to."""
        self.updates, self.trajectory = self.updates + 1, trajectory
        self.router.about["provenance"]["iterations"] = self.updates

    def follow(self, updates: Iterable[Update], progress: bool) -> Iterator[Update]:
        """Hand on updates and count them until there are enough.

        A progress bar shows loss, CUR and theoretical speedup, on rank 0 and where stderr is a
        terminal.
        """
        from tqdm.auto import tqdm

        quiet = (
            None if progress and rank() == 0 else True
        )  # None: silent where stderr is not a terminal
        with tqdm(total=self.iterations, initial=self.updates, unit="update", disable=quiet) as bar:
            cost = None if bar.disable else macs(self.denoiser)
            for update in islice(updates, max(0, self.iterations - self.updates)):
                ends = update.k == self.denoiser.steps - 1
                self.count(update.trajectory + ends)
                if cost is not None:
                    faster = f"{self.router.schedule(self.settings['tau']).speedup(cost):.2f}x"
                    bar.set_postfix(
                        loss=f"{update.loss:.2e}",
                        CUR=f"{update.cur:.1%}",
                        speedup=faster,
                        refresh=False,
                    )
                bar.update()
                yield update

    def _note(self) -> None:
        """Note the state between two trajectories, all of it or, if interrupted, nothing."""
        state = {"state.logits": self.router.logits, "state.lam": self.lam.clone()}
        state["state.steering"] = self.steering.clone()
        for k, row in enumerate(self.router.rows):
            for name, value in self.optimizer.state.get(row, {}).items():
                state[f"state.optimizer.{k}.{name}"] = value.clone()
        state["state.generator"] = self.generator.get_state()
        facts = {"settings": self.settings, "weights": self.weights}
        self._noted = state, {"updates": self.updates, "trajectory": self.trajectory, **facts}

    def save(self, *, interrupted: bool = False) -> None:
        """Write the router and the state noted last; of an interrupted trajectory the router at its
        start.
        """
        self.written = self.updates
        if self.path is None or rank() > 0:
            return
        router, (state, facts) = self.router, self._noted
        if interrupted:
            about = {
                **router.about,
                "provenance": {**router.about["provenance"], "iterations": facts["updates"]},
            }
            router = Router(router.steps, router.sites, logits=state["state.logits"], about=about)
        write_router(router, self.path, state, facts)

    def _restore(self, path: StrPath) -> None:
        router, tensors, facts = read_router(path)
        if not isinstance(facts.get("settings"), dict) or "state.logits" not in tensors:
            raise ValueError(
                f"{path} is a router without the state of its training; it cannot be resumed"
            )
        now = {**_belongs_to(self.router), **self.settings, "weights": self.weights}
        then = {**_belongs_to(router), **facts["settings"], "weights": facts.get("weights")}
        changed = [
            f"{key} {then.get(key)!s:.80} -> {now[key]!s:.80}"
            for key in now
            if now[key] != then.get(key)
        ]
        if changed:
            listed = "; ".join(changed)
            raise ValueError(
                f"{path} was trained with other settings ({listed:.400}); resume with the same"
            )
        try:
            done = int(router.about.get("provenance", {}).get("iterations", 0))
            self._must_fit(tensors, facts)
            self._set(tensors, facts)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise refused(
                path, "is a damaged checkpoint", f"{type(error).__name__}: {error}"
            ) from None
        if self.iterations < done:
            raise ValueError(
                f"{path} has {done} updates already and {self.iterations} were asked for; ask for more"
            )

    def _must_fit(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Raise ValueError unless each tensor of a checkpoint is of the shape that it is copied to,
        and finite.
        """
        for name, value in {"updates": facts["updates"], "trajectory": facts["trajectory"]}.items():
            if not isinstance(value, int) or not 0 <= value <= 10**12:
                raise ValueError(f"{name} is {value!r:.40}")
        wanted = {"state.logits": self.router.logits.shape, "state.lam": self.lam.shape}
        wanted["state.steering"] = self.steering.shape
        row, state = r"state\.optimizer\.[0-9]+\.(exp_avg|exp_avg_sq|step)", {"step": torch.Size()}
        for name in filter(lambda name: name.startswith("state.optimizer."), tensors):
            kind = re.fullmatch(row, name)
            if kind is None:
                raise ValueError(f"{name:.80} is no state of the optimizer")
            wanted[name] = state.get(kind[1], self.router.rows[0].shape)
        for name, shape in wanted.items():
            value = tensors[name]
            if (
                value.shape != shape
                or not value.is_floating_point()
                or not bool(value.isfinite().all())
            ):
                raise ValueError(
                    f"{name} is {tuple(value.shape)} {value.dtype}; {tuple(shape)} and finite expected"
                )

    @torch.no_grad()
    def _set(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.updates, self.trajectory = int(facts["updates"]), int(facts["trajectory"])
        self.router.about["provenance"]["iterations"] = self.updates
        for k, row in enumerate(self.router.rows):
            row.copy_(tensors["state.logits"][k])
            prefix = f"state.optimizer.{k}."
            moments = {
                key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)
            }
            if (
                moments
            ):  # they live beside their row; the step count stays on the CPU, where AdamW keeps it
                self.optimizer.state[row] = {
                    key: v if key == "step" else v.to(row) for key, v in moments.items()
                }
        self.lam.copy_(tensors["state.lam"])
        self.steering.copy_(tensors["state.steering"])
        self.generator.set_state(tensors["state.generator"])


def _fingerprint(denoiser: Denoiser) -> str:
    """Return a few numbers of the first and the last site in short: other weights would make
    another router.
    """
    sites = list(denoiser.sites.values())
    few = [
        parameter.detach().flatten()[:64].float().cpu()
        for site in (sites[0], sites[-1])
        for parameter in site.parameters()
    ]
    return f"{zlib.crc32(torch.cat(few).numpy().tobytes()) if few else 0:08x}"


def _belongs_to(router: Router) -> dict[str, Any]:
    """Return what a router was made for, in a form that survives JSON."""
    about = {
        key: list(v) if isinstance(v, tuple) else v
        for key, v in router.about.items()
        if key != "provenance"
    }
    return {"steps": router.steps, "sites": list(router.sites), **about}
