"""Overrides: answer calls of a method in one thread or task, and leave all others alone.

    module.forward(x)  →  Override  →  is an answer in force in this context?
                                          no    original(x)
                                          yes   answer(original, (x,), {})
                                          yes   gate(site, lambda: original(x))

An *override* is an attribute of an instance that hides a method of its class. An *answer* is a
function that is called instead of the method, and is given the method as it was. An answer belongs
to the thread or asyncio task that put it in force, since it lies in a `contextvars.ContextVar`;
everybody else gets the method. All answers for one method share one override, counted under a
lock. Other libraries put wrappers on the same instances (accelerate's hooks): those below ours are
called, those above ours stay. This file does not know what is overridden.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from harmonica.calls import current_call, of_call

Method = Callable[..., Any]
Replacement = Callable[[Method, tuple[Any, ...], dict[str, Any]], Any]
"""(the method as it was, arguments, keyword arguments) -> what the call returns."""
Answer = Replacement | tuple[Method, int]
"""A gate and a site are short for the answer that asks the gate (`_replacement`): a site is asked
so often that one function call fewer counts."""


class Override(partial[Any]):
    """What stands on an instance instead of its method, for as long as anybody answers for it.

    A copy or a pickle of it is the method that it hides: a model that is copied or saved while it
    is overridden is the plain one.
    """

    thing: Any
    name: str  # of the method
    before: Any  # what stood on the instance before, or None
    key: Key  # what contexts look their answer up by

    @classmethod
    def of(cls, thing: Any, name: str) -> Override:
        """Return the override of thing.name, placed now unless it stands there already."""
        before = vars(thing).get(name)
        if isinstance(before, cls):
            return before
        key = Key()
        override = cls(_call, key, getattr(thing, name))
        override.thing, override.name, override.before, override.key = thing, name, before, key
        vars(thing)[name] = override
        return override

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the hidden method: pipelines look at that of `scheduler.step`."""
        return inspect.signature(self.args[1])

    def leave(self, answer: Answer) -> None:
        """Forget an answer. With the last one the instance gets back what it had before."""
        self.key.answers.remove(answer)
        own = vars(self.thing)
        if not self.key.answers and own.get(self.name) is self:
            own[self.name] = self.before
            if self.before is None:
                del own[self.name]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.args[1], memo)

    def __reduce__(self) -> Any:
        if self.before is None:
            return getattr, (self.thing, self.name)  # read of the copy, which has no override
        return copy.copy, (self.before,)


class Key:
    """Identifies an override in the contexts, and lists the answers in force in any of them."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []


Frame = tuple[tuple[Key, Answer], ...]
"""The answers of one `with`."""

_frames: ContextVar[tuple[Frame, ...]] = ContextVar("frames", default=())
_answers: ContextVar[dict[Key, Answer]] = ContextVar("answers", default={})  # noqa: B039
_get_answers = _answers.get
_lock = threading.RLock()


def _call(key: Key, original: Method, /, *args: Any, **kwargs: Any) -> Any:
    answer = _get_answers().get(key)
    if type(answer) is tuple:  # as `_replacement` does, but at once
        gate, site = answer
        # what the lambda needs are its defaults: cells of a closure would cost more
        return gate(site, lambda f=original, a=args, k=kwargs: f(*a, **k))
    if answer is None and key.answers and torch._C._current_graph_task_id() >= 0:
        answer = _of_backward(key)
    return _replacement(answer)(original, args, kwargs) if answer else original(*args, **kwargs)


def _replacement(answer: Answer) -> Replacement:
    if not isinstance(answer, tuple):
        return answer
    gate, site = answer
    return lambda original, args, kwargs: gate(of_call(site), lambda: original(*args, **kwargs))


def _of_backward(key: Key) -> Answer:
    """Return the answer for a block that backward runs again under activation checkpointing.

    On a GPU autograd does so in a thread of its own, to which no context belongs.
    """
    if len(key.answers) > 1:
        raise RuntimeError(
            "two threads train one model under activation checkpointing, and backward does not say "
            "for which of them it runs a block again; give each thread a copy of the model"
        )
    return key.answers[0]


@contextmanager
def overridden(answers: Iterable[tuple[Any, str, Answer]]) -> Iterator[None]:
    """Answer calls made in this thread or task, and put everything back, exception or not.

    `answers` holds (object, name of its method, answer) for each. Inside another `with`, the inner
    answer comes first, and its original is the outer answer.

    >>> class Thing:
    ...     def name(self): return "thing"
    >>> thing = Thing()
    >>> with overridden([(thing, "name", lambda original, args, kwargs: f"no {original()}")]):
    ...     thing.name()
    'no thing'
    >>> thing.name(), vars(thing)
    ('thing', {})
    """
    placed, frame, merged = list[tuple[Override, Answer]](), Frame(), dict[Key, Answer]()
    try:
        with _lock:
            for thing, name, answer in answers:
                override = Override.of(thing, name)
                override.key.answers.append(answer)
                placed.append((override, answer))
        frame = tuple((override.key, answer) for override, answer in placed)
        merged = _put_in_force((*_frames.get(), frame))
        yield
    finally:
        frames = _frames.get()
        if any(each is frame for each in frames):  # not if a generator is closed by another thread
            _put_in_force(tuple(each for each in frames if each is not frame))
        merged.clear()  # a copied context must not keep alive what the answers hold
        with _lock:
            for override, answer in placed:
                override.leave(answer)


def _put_in_force(frames: tuple[Frame, ...]) -> dict[Key, Answer]:
    later_call, merged = current_call.get(), dict[Key, Answer]()
    for frame in frames:
        for key, answer in frame:
            if later_call and isinstance(answer, tuple):
                answer = answer[0], of_call(answer[1])
            merged[key] = _both(answer, merged[key]) if key in merged else answer
    _frames.set(frames)
    _answers.set(merged)
    return merged


@contextmanager
def in_call(call: int) -> Iterator[None]:
    """Let sites know which call of their model within a prediction this is, 0 for the first."""
    before, answers = current_call.get(), _get_answers()
    if call == before:
        yield
        return
    current_call.set(call)
    merged = _put_in_force(_frames.get())
    try:
        yield
    finally:
        current_call.set(before)
        _answers.set(answers)
        merged.clear()


def _both(inner: Answer, outer: Answer) -> Replacement:
    above, below = _replacement(inner), _replacement(outer)
    return lambda original, args, kwargs: above(
        lambda *args, **kwargs: below(original, args, kwargs), args, kwargs
    )


def is_overridden(thing: Any, name: str) -> bool:
    """Tell whether somebody answers for thing.name in this context, or has put a wrapper there."""
    own = vars(thing).get(name)
    ours = isinstance(own, Override) and own.key not in _get_answers()
    return (own.before if ours else own) is not None
