"""How good the bundled model is: 1000 digits against the real ones.

    python benchmarks/tiny_model.py

DDIM-20, guidance 1.5, 100 noises for each label. The Fréchet distance is in pixel space, and is to be read beside that
of one half of the real digits against the other. Also draws five rows of each digit to results/tiny_model.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from record import RESULTS, ended, record

from harmonica import sample
from harmonica.evaluation.distances import frechet_distance, label_agreement
from harmonica.evaluation.pictures import save, sheet
from harmonica.models import load
from harmonica.models.tiny import digits


def main() -> None:
    """Sample, judge, record, draw."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    d = load("tiny", steps=20, guidance=1.5)
    labels = torch.arange(1000) % 10
    x, _ = d.draw(1000, torch.Generator().manual_seed(2024))
    images = sample(d, x, labels)
    real, real_labels = digits()
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    half = len(real) // 2
    file = Path(__file__).parent.parent / "harmonica" / "models" / "tiny.safetensors"
    figures = {
        "parameters": sum(p.numel() for p in d.model.parameters()),
        "file_bytes": file.stat().st_size,
        "label_agreement": label_agreement(images, labels, real, real_labels),
        "frechet_to_real": round(frechet_distance(images, real), 4),
        "frechet_real_half_to_half": round(
            frechet_distance(real[order[:half]], real[order[half:]]), 4
        ),
    }
    record("tiny_model", figures)
    save(
        sheet(images[:50], title="bundled model, DDIM-20, guidance 1.5"), RESULTS / "tiny_model.png"
    )


if __name__ == "__main__":
    ended(main)
