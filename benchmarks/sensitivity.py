"""What a unit of error at step k does to the image: λ / MSE over the steps, for an untrained router.

    python benchmarks/sensitivity.py

λ is what reuse at k does to the final image, MSE what it does to the output of step k: their ratio is how much the
image suffers from a unit of error there. Were it steep, weighing the loss by it would move reuse from one end of the
walk to the other; where it is flat, λ = 1 already weighs right. Medians over three routers, 32 noises each.
"""

from __future__ import annotations

import argparse

import torch
from record import ended, record

from harmonica import Router, image_error, sdt
from harmonica.models import load


def main() -> None:
    """Measure and record."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    d = load("tiny", steps=20)
    lams, errors = [], []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        router = Router(d.steps, d.sites, generator=generator)
        x, labels = d.draw(32, generator)
        lams.append(image_error(d, router(), x, labels)[1:])
        errors.append(
            torch.tensor([u.mse for u in sdt(d, router, [(x, labels)], lr=0.0, proxy=None)])
        )
    lam, mse = torch.stack(lams).median(0).values, torch.stack(errors).median(0).values
    ratio = (torch.stack(lams) / torch.stack(errors)).median(0).values
    columns = {"lambda": lam, "mse": mse, "lambda_over_mse": ratio, "lambda_times_mse": lam * mse}
    record(
        "sensitivity",
        {name: [float(f"{v:.2e}") for v in column.tolist()] for name, column in columns.items()},
    )


if __name__ == "__main__":
    ended(main)
