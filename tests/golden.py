"""Golden numbers: recordings of the authors' released code, reproduced by ours.

    python tests/golden.py tests/data/golden_a.safetensors

prints a line `record error` for each record of a file in this format, whatever its sizes, and exits 1 if one relative
error ‖ours − theirs‖ / ‖theirs‖ exceeds 1e-4. Rows of the recorded routers run backwards: row 0 is the last step.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from harmonica import Router, Schedule, denoise, image_error, reuse, sdt
from harmonica.cache import Cache
from harmonica.models.dit import DiT, DiTDenoiser
from harmonica.samplers import DDIM

LIMIT = 1e-4
SIZES = "input_size patch_size in_channels hidden_size depth num_heads num_classes"


class Recording:
    """One file: its settings, its tensors, and our denoiser with its weights."""

    def __init__(self, path: str | Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        c = self.config
        model = DiT(**{key: c[key] for key in SIZES.split()})
        weights = {k[8:]: v for k, v in self.tensors.items() if k.startswith("weights.")}
        model.load_state_dict(weights, strict=True)
        guidance = {"guidance": c["cfg_scale"], "guided_channels": 3}
        self.denoiser = DiTDenoiser(model, DDIM(c["steps"]), **guidance)
        self.labels, self.noise = self.tensors["labels"], self.tensors["noise"]

    def router(self) -> Router:
        """Return the recorded router; the row of the first executed step, the last of theirs, is not trained."""
        logits = self.tensors["official_logits"].flip(0)[1:]
        return Router(self.denoiser.steps, self.denoiser.sites, logits=logits)

    def walk(self, gate: Callable[[int], object] | None) -> tuple[Tensor, Tensor]:
        """Return x before each step and last (T+1, B, …), and guided outputs of the conditional half (T, B, …)."""
        xs, outs, predict = [self.noise], [], self.denoiser.predict

        def record(x: Tensor, k: int, cond: Tensor) -> Tensor:
            outs.append(predict(x, k, cond))
            return outs[-1]

        self.denoiser.predict = record  # type: ignore[method-assign]
        xs += denoise(self.denoiser, self.noise, self.labels, gate)  # type: ignore[arg-type]
        self.denoiser.predict = predict  # type: ignore[method-assign]
        return torch.stack(xs), torch.stack([out[: len(self.noise)] for out in outs])

    def one_trajectory(self) -> dict[str, Tensor]:
        """Run one trajectory of `sdt` with λ = 1 and a learning rate of 0, which holds the logits fixed."""
        d, c, router = self.denoiser, self.config, self.router()
        xs, mse, l1, grad, step = [self.noise], [], [], [], self.denoiser.step

        def record(x: Tensor, out: Tensor, k: int, memory: dict[str, object]) -> Tensor:
            xs.append(step(x, out, k, memory))
            return xs[-1]

        d.step = record  # type: ignore[method-assign]
        noise = [(self.noise, self.labels)]
        updates = sdt(d, router, noise, tau=c["threshold"], beta=c["beta"], lr=0.0, proxy=None)
        for k in range(1, d.steps):
            # as the loss of this update sees it: clamped by earlier updates, not yet by its own
            l1.append(router.row(k).detach().sum())
            mse.append(torch.tensor(next(updates).mse))
            grad.append(router.rows[k - 1].grad.clone())
        list(updates)  # the last sampler step
        d.step = step  # type: ignore[method-assign]
        found = {"mse": mse, "l1": l1, "grad": grad, "x": xs}
        return {f"sdt.{key}": torch.stack(value) for key, value in found.items()}

    def trained(self) -> Tensor:
        """Train on the recorded noises and return all T rows of logits in their order."""
        router, c = self.router(), self.config
        noise = [(x, self.labels) for x in self.tensors["sdt.train_noise"]]
        settings = {"tau": c["threshold"], "beta": c["beta"], "lr": c["lr"], "proxy": None}
        list(sdt(self.denoiser, router, noise, **settings))
        return torch.cat([router.logits.flip(0), self.tensors["official_logits"][-1:]])

    def reproduce(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each record's name and our number for it."""
        d, tau = self.denoiser, self.config["threshold"]
        yield "timesteps", torch.tensor(d.sampler.timesteps)
        full_x, full_out = self.walk(None)
        yield from (("full.x", full_x), ("full.out", full_out))
        schedule: Schedule = self.router().schedule(tau)
        yield "cached.compute", schedule.compute
        cache: Cache = {}
        cached_x, cached_out = self.walk(lambda k: reuse(schedule.compute[k], cache))
        yield from (("cached.x", cached_x), ("cached.out", cached_out))
        yield from self.one_trajectory().items()
        yield "sdt.trained_official_logits", self.trained()
        r = self.router()()
        for record, mode in (("telescoping", "telescoping"), ("leave_one_out", "leave-one-out")):
            lam = image_error(d, r, self.noise, self.labels, tau=tau, mode=mode)  # type: ignore[arg-type]
            yield f"lambda.{record}_mean", lam

    def errors(self) -> Iterator[tuple[str, float]]:
        """Yield each record's name and the relative error of ours."""
        for name, ours in self.reproduce():
            theirs = self.tensors[name].double()
            if ours.shape != theirs.shape:
                raise ValueError(f"{name} has shape {theirs.shape}; ours has {ours.shape}")
            yield name, float((ours.double() - theirs).norm() / (theirs.norm() or 1.0))


def main() -> int:
    """Print an error for each record of the file named on the command line."""
    if len(sys.argv) != 2:
        print("usage: python tests/golden.py FILE", file=sys.stderr)
        return 2
    wrong = 0
    for name, error in Recording(sys.argv[1]).errors():
        print(f"{name:32} {error:.2e}")
        wrong += not error <= LIMIT  # a NaN is not
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
