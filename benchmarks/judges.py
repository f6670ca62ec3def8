"""Judges: what real pictures look like, for the two bundled models, whose pictures we know, and how
far a set of pictures is from them.

    model      real pictures                          named by          Fréchet distance of
    tiny       scikit-learn's 1797 digits             the 3 nearest     64 pixels
    garments   Fashion-MNIST's 10 000 held-out ones   a small network   its 64 hidden features

The digits are also what `tiny` was trained on, so its Fréchet distance rewards copies; the held-out
photographs were never shown to `garments`. The network was trained on the other 60 000.

    Fréchet distance   between Gaussians fitted to two sets (FID where the features are Inception's)

A Gaussian is fitted to vectors: the pixels of an image, or the features that a network makes of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from harmonica.values import require

WEIGHTS = Path(__file__).with_name("garments_judge.safetensors")


@dataclass(frozen=True)
class Judge:
    """Names the class of pictures and says how far a set of them is from the real ones.

    >>> abs(judge_of("tiny").frechet(digits()[0])) < 1e-6
    True
    """

    features: Callable[[Tensor], Tensor]  # pictures (B, C, H, W) -> (B, D)
    classify: Callable[[Tensor], Tensor]  # pictures (B, C, H, W) -> labels (B,)
    mean: Tensor  # (D,) of the real pictures' features
    covariance: Tensor  # (D, D)

    def agreement(self, images: Tensor, labels: Tensor) -> float:
        """Return the share, 0 … 1, of images (B, C, H, W) recognised as their own label (B,)."""
        return float((self.classify(images) == labels.to(images.device)).double().mean())

    def frechet(self, images: Tensor) -> float:
        """Return the Fréchet distance of 2 or more images (B, C, H, W) to the real pictures."""
        return self.frechet_of_features(self.features(images))

    def frechet_of_features(self, features: Tensor) -> float:
        """Return the same from features (B, D), for a bootstrap that resamples them."""
        return frechet_distance(moments(features), (self.mean, self.covariance))


class Classifier(nn.Module):
    """The network that judges garments: three convolutions, a hidden layer, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 24, 5, stride=2, padding=2), nn.ReLU()]
        for width in (24, 64):
            layers += [nn.Conv2d(width, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.hidden = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 3 * 3, 64), nn.ReLU())
        self.logits = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 1, 28, 28) in [−1, 1]."""
        return self.logits(self.hidden(images))  # type: ignore[no-any-return]


Moments = tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D) of vectors, float64


def moments(vectors: Tensor) -> Moments:
    """Return the mean and the covariance of vectors (B, …); raise ValueError if B is below 2.

    The covariance needs more vectors than they have dimensions.
    """
    count = len(vectors)
    require(count >= 2, f"there are {count} vectors; a covariance takes at least 2")
    rows = vectors.detach().flatten(1).double()  # (B, D)
    return rows.mean(0), torch.cov(rows.T).view(rows.shape[1], -1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two Gaussians (Heusel et al. 2017).

    It falls as the sets grow that the Gaussians were fitted to: compare sets of one size.
    """
    (mean, cov), (mean2, cov2) = first, second
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # Σ₁^½
    # tr (Σ₁Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½, and this one is symmetric
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum()
    return float((mean - mean2).square().sum() + cov.trace() + cov2.trace() - 2 * cross)


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits in [−1, 1], (1797, 1, 8, 8), and their labels (1797,)."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8.0 - 1.0, dtype=torch.float32).view(-1, 1, 8, 8)
    return images, torch.tensor(labels)


def judge_of(model: str) -> Judge:
    """Return the judge of a bundled model's pictures; raise ValueError for another model."""
    judges = {"tiny": _judge_of_digits, "garments": _judge_of_garments}
    unknown = f"no judge knows the pictures of {model!r}"
    require(model in judges, f"{unknown}; there is one for {', '.join(judges)}")
    return judges[model]()


def _judge_of_digits() -> Judge:
    from sklearn.neighbors import KNeighborsClassifier

    images, labels = digits()
    nearest = KNeighborsClassifier(3).fit(images.flatten(1).numpy(), labels.numpy())

    def classify(images: Tensor) -> Tensor:
        votes = nearest.predict(images.flatten(1).cpu().numpy())
        return torch.as_tensor(votes, device=images.device)

    return Judge(lambda x: x.flatten(1), classify, *moments(images))


def _judge_of_garments() -> Judge:
    from safetensors.torch import load_file

    state = {name: value.float() for name, value in load_file(WEIGHTS).items()}
    mean, covariance = state.pop("held_out.mean"), state.pop("held_out.covariance")
    network = Classifier().requires_grad_(False)
    network.load_state_dict(state)
    features, logits = _in_parts(network.hidden), _in_parts(network)
    classify = lambda images: logits(images).argmax(1)  # noqa: E731
    return Judge(features, classify, mean.double(), covariance.double())


def _in_parts(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Run a network on the CPU, 1000 pictures at a time."""

    def run(images: Tensor) -> Tensor:
        parts = [network(part.float().cpu()) for part in torch.split(images, 1000)]
        return torch.cat(parts).to(images.device)

    return run
