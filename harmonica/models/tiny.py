"""How the bundled DiT was made: real 8×8 digits, the noise-prediction loss, one command.

    python -m harmonica.models.tiny --out harmonica/models/tiny.safetensors

trains `DiT(**TINY)` on scikit-learn's 1797 scanned digits (UCI, 8×8 pixels, 17 grey levels) and
writes its averaged weights. Nothing here is needed to use the model; it is here so that the weights
can be made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from harmonica.models.dit import DiT
from harmonica.samplers import TRAIN_TIMESTEPS, alphas_cumprod
from harmonica.storage.files import write_tensors

TINY = {
    "input_size": 8,  # pixels; there is no autoencoder
    "patch_size": 2,  # 16 tokens
    "in_channels": 1,  # grey
    "hidden_size": 64,
    "depth": 8,  # 16 sites
    "num_heads": 4,
    "num_classes": 10,
    "learn_sigma": False,
}
"""Size of the bundled model: 0.6 million parameters."""


def digits() -> tuple[Tensor, Tensor]:
    """Return the real digits, scaled to [−1, 1], and their labels: (1797, 1, 8, 8) float32, (1797,)
    int64.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 8.0 - 1.0, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(
        labels
    )


def train(
    *,
    updates: int = 24000,
    batch_size: int = 128,
    lr: float = 1e-3,
    null_share: float = 0.1,
    ema: float = 0.9995,
    seed: int = 0,
    each: Callable[[int, DiT], None] | None = None,
) -> DiT:
    """Train the bundled model: E‖ε − ε_θ(√ᾱ·x₀ + √(1−ᾱ)·ε, t, y)‖² (Ho et al. 2020, eq. 14).

    Args:
        updates: optimizer steps; the learning rate warms up over 1 % of them and decays as a
            cosine.
        batch_size: digits per update.
        lr: highest learning rate of AdamW.
        null_share: share of labels replaced by the null class, so that guidance has something to
            contrast with.
        ema: decay of the averaged weights, which are what is returned.
        seed: of the only random generator.
        each: called with the update number and the averaged model after every 1000 updates.

    Returns:
        The model with averaged weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(
            seed
        )  # parameter initialisation is the one place where torch takes no generator
        model = DiT(**TINY)  # type: ignore[arg-type]
    average = DiT(**TINY)  # type: ignore[arg-type]
    average.load_state_dict(model.state_dict())
    images, labels = digits()
    alphas = alphas_cumprod().float()  # (1000,)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01
    )
    warm = max(1, updates // 100)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, updates - warm)),
        ],
        milestones=[warm],
    )
    for update in (bar := tqdm(range(1, updates + 1), desc="tiny DiT", mininterval=5)):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        t = torch.randint(TRAIN_TIMESTEPS, (batch_size,), generator=generator)
        noise = torch.randn(batch_size, 1, 8, 8, generator=generator)
        null = torch.rand(batch_size, generator=generator) < null_share
        signal = alphas[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        noisy = signal.sqrt() * images[rows] + (1 - signal).sqrt() * noise  # (B, 1, 8, 8)
        loss = F.mse_loss(model(noisy, t, labels[rows].masked_fill(null, 10)), noise)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(
            ema, update / (update + 10)
        )  # a short memory at first, so the start is forgotten
        with torch.no_grad():
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        if update % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if each is not None and update % 1000 == 0:
            each(update, average)
    return average


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write the weights; return 0, 2 for bad input or 130 after Ctrl-C, with one line on
    stderr.
    """
    from harmonica.command_line import Parser, command, seed, whole

    p = Parser(
        prog="python -m harmonica.models.tiny",
        description="Train the bundled DiT on scikit-learn's digits.",
    )
    p.add_argument(
        "--out", type=Path, required=True, help="where to write the weights (.safetensors)"
    )
    p.add_argument("--updates", type=whole, default=24000, help="optimizer steps (24000)")
    p.add_argument("--seed", type=seed, default=0, help="of the model and of what it sees (0)")
    return command(p, run, arguments)


def run(args: argparse.Namespace) -> None:
    """Check, train, and write the averaged weights after every 1000 updates and at the end."""
    from harmonica.command_line import make_writable

    if args.updates < 1:
        raise ValueError(f"--updates is {args.updates}; it must be 1 or more")
    if args.out.is_dir():
        raise IsADirectoryError(f"--out {args.out} is a folder; a file name was expected")
    make_writable(args.out.parent)
    written = 0

    def save(update: int, model: DiT) -> None:
        nonlocal written
        write_tensors(args.out, model.state_dict(), {})
        written = update

    try:
        save(args.updates, train(updates=args.updates, seed=args.seed, each=save))
    except KeyboardInterrupt:
        kept = (
            f"{args.out} holds the weights of update {written}"
            if written
            else "nothing was written"
        )
        raise KeyboardInterrupt(f"stopped; {kept}") from None


if __name__ == "__main__":
    sys.exit(main())
