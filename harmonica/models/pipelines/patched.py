"""Patches: answer calls of a method of a whole class, for as long as somebody needs it.

This file does not know what is patched.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from harmonica.override import Method

_lock = threading.RLock()
_patches: dict[tuple[type, str], list[Any]] = {}  # what was there, what stands there now, how many


@contextmanager
def patched(kind: type, name: str, answer: Method) -> Iterator[None]:
    """Answer calls of a method of all objects of a class, in all threads, by answer(original, …).

    Subclasses are left alone. Who patches a method that is patched already shares the first
    answer, so all answers for one method must be the same function.

    >>> class Thing:
    ...     def name(self): return "thing"
    >>> with patched(Thing, "name", lambda original, self: f"no {original(self)}"): Thing().name()
    'no thing'
    >>> Thing().name()
    'thing'
    """
    with _lock:
        if (kind, name) not in _patches:
            original = getattr(kind, name)

            @wraps(original)
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                if type(self) is not kind:
                    return original(self, *args, **kwargs)
                return answer(original, self, *args, **kwargs)

            _patches[kind, name] = [vars(kind).get(name), method, 0]
            setattr(kind, name, method)
        _patches[kind, name][2] += 1
    try:
        yield
    finally:
        with _lock:
            before, method, _ = patch = _patches[kind, name]
            patch[2] -= 1
            if patch[2] == 0:
                del _patches[kind, name]
                if vars(kind).get(name) is method and before is None:
                    delattr(kind, name)
                elif vars(kind).get(name) is method:
                    setattr(kind, name, before)
