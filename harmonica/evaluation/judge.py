"""Judges: what real pictures look like, for the two bundled models, whose pictures we know.

    model      real pictures                          named by          Fréchet distance of
    tiny       scikit-learn's 1797 digits             the 3 nearest     64 pixels
    garments   Fashion-MNIST's 10 000 held-out ones   a small network   its 64 hidden features

The digits are also what `tiny` was trained on, so its Fréchet distance rewards copies; the held-out
photographs were never shown to `garments`. The network was trained on the other 60 000. This file
does not know how the pictures were made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from harmonica.evaluation.distances import frechet_distance, moments
from harmonica.table import require

DIGITS = tuple("0123456789")
GARMENTS = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "trainer", "bag", "boot",
)  # fmt: skip
"""Names of the classes, in the order of their labels."""

WEIGHTS = Path(__file__).with_name("garments_judge.safetensors")


@dataclass(frozen=True)
class Judge:
    """Names the class of pictures and says how far a set of them is from the real ones.

    >>> abs(judge_of("tiny").frechet(digits()[0])) < 1e-6
    True
    """

    classes: tuple[str, ...]
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
        self.logits = nn.Linear(64, len(GARMENTS))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 1, 28, 28) in [−1, 1]."""
        return self.logits(self.hidden(images))  # type: ignore[no-any-return]


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

    return Judge(DIGITS, lambda x: x.flatten(1), classify, *moments(images))


def _judge_of_garments() -> Judge:
    from safetensors.torch import load_file

    state = {name: value.float() for name, value in load_file(WEIGHTS).items()}
    mean, covariance = state.pop("held_out.mean"), state.pop("held_out.covariance")
    network = Classifier().requires_grad_(False)
    network.load_state_dict(state)
    features, logits = _in_parts(network.hidden), _in_parts(network)
    classify = lambda images: logits(images).argmax(1)  # noqa: E731
    return Judge(GARMENTS, features, classify, mean.double(), covariance.double())


def _in_parts(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Run a network on the CPU, 1000 pictures at a time."""

    def run(images: Tensor) -> Tensor:
        parts = [network(part.float().cpu()) for part in torch.split(images, 1000)]
        return torch.cat(parts).to(images.device)

    return run
