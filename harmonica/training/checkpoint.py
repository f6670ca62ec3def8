"""Checkpoint: the file of a training run.

It holds the router, the state at the start of a trajectory, and what must be the same on resuming:
the settings, and what the router is for. A run that is stopped in the middle of a trajectory
repeats it on resuming, with the same noise, and so ends in the same router, bit for bit. Of several
processes rank 0 alone touches the file. All start from its state, so a run may be resumed with
another number of processes, to rounding.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from harmonica.memory import is_out_of_memory
from harmonica.processes import from_rank_0, rank
from harmonica.router import Router
from harmonica.storage.files import StrPath, changes, decoding
from harmonica.storage.formats import build, read_router, write_router
from harmonica.table import require
from harmonica.training.state import Captured, TrainingState


class Checkpoint:
    """The file of a training run, written every so many updates, before and after the search; as a
    context it saves the run on Ctrl-C and on lack of memory.

    Args:
        path: of the file; None for a run that leaves none.
        every: updates from one write to the next.
        facts: what must be the same on resuming, `settings` and `weights`.
    """

    def __init__(self, path: StrPath | None, every: int, facts: dict[str, Any]) -> None:
        self.path, self.every, self.facts = path, every, facts

    def begin(self, state: TrainingState, iterations: int, *, resume: bool) -> None:
        """Set the state that the run starts from, on all processes.

        Raises FileExistsError, FileNotFoundError or ValueError if file and request disagree.
        """
        counts = f"iterations {iterations}, checkpoint_every {self.every}"
        require(min(iterations, self.every) >= 1, f"found {counts}; each must be 1 or more")
        state.restore(*from_rank_0(lambda: self._first(state, iterations, resume)))
        self.router, self.captured, self.written = state.router, state.capture(), state.updates

    def note(self, state: TrainingState) -> None:
        """Note the state between two trajectories, and write it if a write is due."""
        self.captured = state.capture()
        if state.updates - self.written >= self.every:
            self.write()

    def write(self, *, further: bool = True) -> None:
        """Write the state noted last, and the router: as it is now, perhaps further, or as noted."""
        (tensors, counts), about, logits = self.captured, self.router.about, self.router.logits
        self.written = counts["updates"]
        if not further:
            logits, counted = tensors["state.logits"].clone(), {"iterations": self.written}
            about = {**about, "provenance": {**about["provenance"], **counted}}
        if self.path is not None and rank() == 0:
            facts = {**counts, **self.facts}
            write_router(self.path, logits, self.router.sites, about, tensors, facts)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt) and not is_out_of_memory(error):
            return
        self.write(further=False)
        if isinstance(error, KeyboardInterrupt):
            kept = (
                f"{self.path} continues it with resume=True" if self.path else "nothing was saved"
            )
            raise KeyboardInterrupt(f"stopped after {self.written} updates; {kept}") from None

    def _first(self, state: TrainingState, iterations: int, resume: bool) -> Captured:
        if resume:
            self._restore(state, iterations)
        elif self.path is not None:
            if Path(self.path).exists():
                todo = "resume=True continues it, or choose another name"
                raise FileExistsError(f"{self.path} exists; {todo}")
            folder = Path(self.path).absolute().parent
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder; make it before training")
        tensors, facts = state.capture()
        return {name: value.cpu() for name, value in tensors.items()}, facts

    def _restore(self, state: TrainingState, iterations: int) -> None:
        path = "the checkpoint to resume" if self.path is None else self.path
        fields, tensors, facts = read_router(path)
        router = build(Router, path, fields)
        whole = isinstance(facts.get("settings"), dict) and "state.logits" in tensors
        require(whole, f"{path} is a router without the state of its training; it cannot go on")
        now, then = _identity(state.router, self.facts), _identity(router, facts)
        other = changes({key: then.get(key) for key in now}, now)  # a search adds its order
        what = f"{path} was trained with other settings ({other:.400})"
        require(not other, f"{what}; resume with the same")
        with decoding(path, "is a damaged checkpoint"):
            done = int(router.about.get("provenance", {}).get("iterations", 0))
            state.restore(tensors, facts)
        enough = f"{path} has {done} updates already and {iterations} were asked for; ask for more"
        require(done <= iterations, enough)


def _identity(router: Router, facts: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same on resuming, in a form that survives JSON."""
    about = {key: value for key, value in router.about.items() if key != "provenance"}
    fields = {"sites": router.sites, **about, **facts["settings"], "weights": facts.get("weights")}
    lists = {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
    return {"steps": router.steps, **lists}
