"""Shadows: an attribute of an instance that hides the method of its class, and how it is taken off
again.

Others put shadows on the same instances (accelerate's hooks, another `with` of ours), and not
everybody leaves in the order of coming. This file does not know what is overridden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def overridden(name: str, shadows: Iterable[tuple[Any, partial[Any]]]) -> Iterator[None]:
    """Hide `name` of things by their shadows, one after the other, and put everything back,
    exception or not.

    What stood on the instance before (a shadow of ours, another library's wrapper) stands there
    again afterwards; what somebody has put there or taken away meanwhile is left to them.

    >>> class Thing: name = "of the class"
    >>> thing = Thing()
    >>> with overridden("name", [(thing, partial(print))]): hidden = thing.name
    >>> hidden, thing.name
    (functools.partial(<built-in function print>), 'of the class')
    """
    placed: list[tuple[Any, partial[Any], Any]] = []
    try:
        for thing, shadow in shadows:
            own = vars(thing)
            placed.append((thing, shadow, own.get(name)))
            own[name] = shadow
        yield
    finally:
        for thing, shadow, before in placed:
            put_back(thing, name, shadow, before)


def put_back(thing: Any, name: str, shadow: partial[Any], before: Any) -> None:
    """Take `shadow` off thing.name, which had `before` when it came, or nothing if that is None.

    Where something stands on top of it, that stays. If it is a shadow of ours, it will put back
    what this one had found, since this one is gone.

    >>> class Thing: name = "of the class"
    >>> thing = Thing()
    >>> below, above = partial(print), partial(print)
    >>> thing.name = above  # it found `below`, which found nothing
    >>> put_back(thing, "name", below, None), put_back(thing, "name", above, below), thing.name
    (None, None, 'of the class')
    """
    vars(shadow)["found"] = before
    while isinstance(before, partial) and "found" in vars(before):
        before = vars(before)["found"]
    if vars(thing).get(name) is shadow:
        vars(thing)[name] = before
        if before is None:
            del vars(thing)[name]
