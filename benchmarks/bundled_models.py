"""Make what is bundled, `tiny`, `garments` and the judge of garments, and measure how good it is.

    python benchmarks/bundled_models.py train tiny        an hour on one core, scikit-learn's 1797 digits
    python benchmarks/bundled_models.py train garments    an hour, Fashion-MNIST's 60 000 training photographs
    python benchmarks/bundled_models.py train judge       ten minutes, the same photographs
    make weights                                          all three
    python benchmarks/bundled_models.py figures           sample both, judge, record, draw: half an hour

Fashion-MNIST (MIT licence) is read from the four idx files that Debian's package dataset-fashion-mnist
installs. Training minimises E‖ε − ε_θ(√ᾱ·x₀ + √(1−ᾱ)·ε, t, y)‖²
(Ho et al. 2020, eq. 14) and keeps an average of the weights, which is what is written.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from judges import WEIGHTS, Classifier, Judge, digits, frechet_distance, judge_of, moments
from record import RESULTS, ended, record
from torch import Tensor
from tqdm import tqdm

from harmonica import sample
from harmonica.models import BUNDLED, DITS, load
from harmonica.models.dit import DiT
from harmonica.pictures import save, sheet
from harmonica.samplers import TRAIN_TIMESTEPS, alphas_cumprod
from harmonica.storage.files import write_tensors

PHOTOGRAPHS = Path("/usr/share/datasets/fashion-mnist")


def photographs(part: str, folder: Path = PHOTOGRAPHS) -> tuple[Tensor, Tensor]:
    """Return photographs in [−1, 1], (M, 1, 28, 28) float32, and labels (M,) int64.

    Args:
        part: "train" (60 000) or "t10k" (10 000, held out).
        folder: holds the idx files, gzipped.

    Raises FileNotFoundError if it does not.
    """
    pixels, labels = _idx(folder, f"{part}-images", 16), _idx(folder, f"{part}-labels", 8)
    images = torch.tensor(pixels.reshape(-1, 1, 28, 28) / 127.5 - 1, dtype=torch.float32)
    return images, torch.tensor(labels.astype(np.int64))


def real_images(model: str) -> tuple[Tensor, Tensor]:
    """Return the images (M, C, H, W) and labels (M,) that a bundled model was trained on."""
    return digits() if model == "tiny" else photographs("train")


def _idx(folder: Path, name: str, header: int) -> Any:
    file = next(iter(sorted(folder.glob(f"{name}-idx*.gz"))), None)
    if file is None:
        raise FileNotFoundError(
            f"{folder} has no {name}-idx*.gz; apt-get install dataset-fashion-mnist brings it"
        )
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


# ------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class Phase:
    """A stretch of training that draws its batches with a seed of its own."""

    updates: int
    rate: Callable[[int], float]  # learning rate of update 1 … updates
    batch_size: int = 128
    snr_cap: float = (
        math.inf
    )  # weight of timestep t is min(1, cap / SNR_t) (Hang et al. 2023, min-SNR)


@dataclass(frozen=True)
class Recipe:
    """How a model was trained."""

    data: Callable[[], tuple[Tensor, Tensor]]
    phases: tuple[Phase, ...]
    betas: tuple[float, float]  # of AdamW
    average: float  # decay of the averaged weights, once the start is forgotten
    null_share: float = 0.1  # labels replaced by the null class, for guidance to contrast with


def _cosine(update: int, updates: int = 24000, peak: float = 1e-3) -> float:
    """Rise over 1 % of the updates, then fall as a cosine."""
    warm, done = updates // 100, update - 1
    if done < warm:
        return peak * (0.01 + 0.99 * done / warm)
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warm) / (updates - warm)))


def _rising(update: int) -> float:
    return 1e-3 * min(1.0, update / 200)


def _falling(update: int) -> float:
    return 1e-3 * min(1.0, (SECOND - update) / COOLDOWN)


SECOND, COOLDOWN = 14038, 4000
RECIPES = {
    "tiny": Recipe(digits, (Phase(24000, _cosine),), betas=(0.9, 0.999), average=0.9995),
    "garments": Recipe(
        lambda: photographs("train"),
        (Phase(3000, _rising), Phase(SECOND, _falling, batch_size=64, snr_cap=5.0)),
        betas=(0.9, 0.99),
        average=0.999,
    ),
}


def initialised(model: DiT) -> DiT:
    """Let a new model start as the identity: the gates and the final projection are zero (adaLN-zero)."""
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            torch.nn.init.zeros_(weight)
        elif "_embedder" in name and "proj" not in name:
            torch.nn.init.normal_(weight, std=0.02)
        elif name != "pos_embed":
            torch.nn.init.xavier_uniform_(weight.view(len(weight), -1))
    return model


def train(name: str) -> DiT:
    """Train a bundled model as it was trained, and return it with averaged weights."""
    recipe = RECIPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # parameters are drawn by torch, which takes no generator
        model = initialised(DiT(**DITS[name]))
    average = DiT(**DITS[name])
    average.load_state_dict(model.state_dict())
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1.0, betas=recipe.betas, weight_decay=0.01)
    bar = tqdm(_updates(recipe, model.num_classes), desc=name, mininterval=5)
    for update, (rate, noisy, t, labels, noise, weight) in enumerate(bar, start=1):
        optimizer.param_groups[0]["lr"] = rate
        errors = (model(noisy, t, labels) - noise).square().flatten(1).mean(1)  # (B,)
        loss = (weight * errors).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(recipe.average, update / (update + 10))  # short at first, to forget the start
        with torch.no_grad():
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        if update % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return average


def _updates(
    recipe: Recipe, null: int
) -> Iterator[tuple[float, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Yield rate, noisy images (B, C, H, W), timesteps (B,), labels (B,), noise, and weights (B,)."""
    images, labels = recipe.data()
    alphas = alphas_cumprod().float()  # (1000,)
    snr = alphas / (1 - alphas)
    for seed, phase in enumerate(recipe.phases):
        generator, size = torch.Generator().manual_seed(seed), phase.batch_size
        for update in range(1, phase.updates + 1):
            rows = torch.randint(len(images), (size,), generator=generator)
            t = torch.randint(TRAIN_TIMESTEPS, (size,), generator=generator)
            noise = torch.randn(size, *images.shape[1:], generator=generator)
            dropped = torch.rand(size, generator=generator) < recipe.null_share
            signal = alphas[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
            noisy = signal.sqrt() * images[rows] + (1 - signal).sqrt() * noise  # (B, C, H, W)
            shown = labels[rows].masked_fill(dropped, null)
            yield (
                phase.rate(update),
                noisy,
                t,
                shown,
                noise,
                snr[t].clamp(max=phase.snr_cap) / snr[t],
            )


# -------------------------------------------------------------------------------------- the judge


def train_judge(epochs: int = 12, batch_size: int = 100, peak: float = 3e-3) -> Classifier:
    """Train the judge of garments: AdamW, a learning rate that rises and falls, pictures mirrored at random, dropout."""
    generator = torch.Generator().manual_seed(0)
    images, labels = photographs("train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Classifier().to(memory_format=torch.channels_last)  # faster on a CPU
        optimizer = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=0.05, fused=True)
        steps = epochs * len(images) // batch_size
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps)
        for _ in tqdm(range(epochs), desc="judge"):
            for rows in torch.randperm(len(images), generator=generator).split(batch_size):
                mirrored = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
                shown = torch.where(mirrored, images[rows].flip(3), images[rows])
                logits = network.logits(F.dropout(network.hidden(shown), 0.3))
                loss = F.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return network.requires_grad_(False)


def write_judge() -> None:
    """Train the judge and write it, in half precision, with the moments of the held-out photographs."""
    network = train_judge().half().float()
    held_out, _ = photographs("t10k")
    features = torch.cat([network.hidden(part) for part in held_out.split(1000)])
    mean, covariance = moments(features)
    state = {name: value.half() for name, value in network.state_dict().items()}
    state |= {"held_out.mean": mean.float(), "held_out.covariance": covariance.float()}
    write_tensors(WEIGHTS, state, {})


# ------------------------------------------------------------------------------------ the figures


def figures(name: str, each: int, count: int) -> None:
    """Sample with DDIM-20 at guidance 1.5, judge, record, and draw five rows of every class."""
    denoiser, judge = load(name, steps=20, guidance=1.5), judge_of(name)
    began = time.perf_counter()
    drawn = _sampled(denoiser, count)
    labels = torch.arange(count) % 10
    row = {
        "parameters": sum(p.numel() for p in denoiser.model.parameters()),
        "file_bytes": BUNDLED[name].stat().st_size,
        "updates": sum(phase.updates for phase in RECIPES[name].phases),
        "images_a_class": each,
        "label_agreement": judge.agreement(drawn[: 10 * each], labels[: 10 * each]),
        "images": count,
        "frechet_to_real": round(judge.frechet(drawn), 4),
        **_yardstick(name, judge),
        "seconds": round(time.perf_counter() - began),
    }
    record(f"{name}_model", row)
    shown = sheet(drawn[:50], title=f"{name}, DDIM-20, guidance 1.5")
    save(shown, RESULTS / f"{name}_model.png")


def _sampled(denoiser: Any, count: int) -> Tensor:
    """Return `count` pictures, classes by turns, made 500 at a time."""
    x, _ = denoiser.draw(count, torch.Generator().manual_seed(2024))
    labels = torch.arange(count) % 10
    parts = zip(x.split(500), labels.split(500), strict=True)
    return torch.cat([sample(denoiser, *part) for part in parts])


def _yardstick(name: str, judge: Judge) -> dict[str, float]:
    """Return what real pictures reach by the same measures."""
    if name == "tiny":
        real, _ = digits()
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        first, second = real[order].tensor_split(2)
        return {
            "frechet_real_half_to_half": round(frechet_distance(moments(first), moments(second)), 4)
        }
    (train_images, _), (held_out, labels) = photographs("train"), photographs("t10k")
    return {
        "frechet_half_of_training_images": round(judge.frechet(train_images[:30000]), 4),
        "judge_accuracy": judge.agreement(held_out, labels),
        "judge_bytes": WEIGHTS.stat().st_size,
    }


def main() -> None:
    """Train or measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("train", "figures"), default="figures")
    parser.add_argument("names", nargs="*", help="tiny, garments, judge; all if none is named")
    parser.add_argument("--each", type=int, default=100, help="images a class, for the agreement")
    parser.add_argument("--count", type=int, help="images for the Fréchet distance")
    args = parser.parse_args()
    for name in args.names or (*RECIPES, "judge"):
        if args.what == "figures" and name != "judge":
            figures(name, args.each, args.count or (1000 if name == "tiny" else 10000))
        elif args.what == "train" and name == "judge":
            write_judge()
        elif args.what == "train":
            state, half = train(name).state_dict(), name == "garments"
            write_tensors(BUNDLED[name], {k: v.half() if half else v for k, v in state.items()}, {})


if __name__ == "__main__":
    ended(main)
