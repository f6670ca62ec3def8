"""Values: what a caller passes is held to what is expected, and refused by name.

A number of numpy, or in a tensor without dimensions, is as good as Python's; True is none.
"""

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
StrPath = str | os.PathLike[str]
MOST = 3e38  # float32 ends there
LARGEST = 10**6  # of steps, sites, noises in a batch or pool, updates of weights; more is a mistake


def require(holds: bool, otherwise: str) -> None:
    """Raise ValueError with a message unless a condition holds."""
    if not holds:
        raise ValueError(otherwise)


def number(
    name: str, value: Any, least: float = -MOST, below: float = MOST, kinds: Any = (int, float)
) -> float:
    """Return a number as Python's; raise ValueError unless it is one, from least to below `below`.

    >>> number("tau", 1.0, 0, 1)
    Traceback (most recent call last):
    ValueError: tau is 1.0; expected a number, 0 or more and below 1
    """
    given = value.item() if getattr(value, "shape", None) == () else value
    span = f", {least:g} or more" * (least > -MOST) + f" and below {below:g}" * (below < MOST)
    expected = f"expected a {'whole ' * (kinds == (int,))}number{span}"
    fits = type(given) in kinds and least <= given < below
    require(fits, f"{name} is {value!r:.60}; {expected}")
    return given  # type: ignore[no-any-return]


def whole(name: str, value: Any, least: int = 1, below: float = MOST) -> int:
    """Return a whole number, from least to below `below`, as `number` does."""
    return int(number(name, value, least, below, (int,)))


def of_type(name: str, value: Any, kind: type[T], todo: str) -> T:
    """Return a value; raise TypeError, saying what to do, unless it is of a type."""
    if not isinstance(value, kind):
        what = f"{name} is a {type(value).__name__}, {value!r:.60}"
        raise TypeError(f"{what}; expected a {kind.__name__}: {todo}")
    return value


def items(name: str, values: Any) -> tuple[Any, ...]:
    """Return the elements of a collection; raise TypeError for a single value, text included."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {values!r:.60}; expected a list or a tuple")
    return tuple(values)


def check_rows(name: str, tree: Any, rows: int) -> None:
    """Raise ValueError unless a tree holds tensors of so many rows, and numbers that all share."""

    def plain(part: Any) -> bool:  # a list without tensors is no condition that can be cut
        return isinstance(part, list) and not any(isinstance(each, Tensor) for each in part)

    for leaf in tree_leaves(tree, is_leaf=plain):
        kind, fit = type(leaf).__name__, isinstance(leaf, int | float | None)
        if isinstance(leaf, Tensor):
            kind, fit = f"tensor of shape {tuple(leaf.shape)}", leaf.shape[:1] == (rows,)
        todo = f"expected tensors of {rows} rows, one for each noise, or numbers that all share"
        require(fit, f"{name} holds a {kind}; {todo}")


def seeded(generator: torch.Generator | None, seed: int = 0) -> torch.Generator:
    """Return the generator that a caller passed, or a new one with a seed."""
    new = torch.Generator().manual_seed(seed) if generator is None else generator
    return of_type("generator", new, torch.Generator, "torch.Generator().manual_seed(0)")
