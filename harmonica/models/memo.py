"""Memo: what one walk knows ahead, held against all that it was made from.

A `Memo` belongs to a walk. It answers with what it made before as long as the inputs are the very
same tensors, not written to since, and as long as a `Watch` sees no change in the module that made
it: other weights, other settings, another sub-module, an adapter, a hook. Nothing is looked up on
the device: torch counts the writes to a tensor (`_version`) on the CPU. It does not count a write
through `tensor.data`, as in merging an adapter; so every module that is put in place of another,
anywhere, makes all memos begin anew. A bare write through `.data` is seen at the next walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_leaves

from harmonica.override import is_overridden


@dataclass
class Memo:
    """What one walk knows ahead, and where it is.

    A walk whose condition stays the same from the first step to the last is `trusted`. Otherwise
    what is known holds for these very tensors.
    """

    timesteps: Sequence[float] = ()  # T, in execution order, as the model is given them
    exact: bool = False  # every number must be the plain model's, bit for bit
    trusted: bool = True
    k: int | None = None  # executed step; where it is not known, every module runs as it is
    known: dict[Any, Any] = field(default_factory=dict)  # by owner, for one call in a step

    def recall(self, owner: object, make: Callable[[], Any], *of: Any, state: Any) -> Any:
        """Return what is known under `owner`; make it if it is not known, or no longer, of the
        numbers and tensors `of`, and of weights whose `Watch.state` is `state`. With None nothing
        is kept.
        """
        if state is None or self.k is None:
            return make()
        of = tuple(each for each in of if not (self.trusted and isinstance(each, Tensor)))
        marks = (state, *map(_mark, of))
        if owner in self.known:
            value, marks_then, output_then, _ = self.known[owner]
            if marks == marks_then and output_then == self._marks(value):
                return value
        value = make()
        # The tensors are held too: as long as they live, no other one lies at the same address.
        self.known[owner] = value, marks, self._marks(value), of
        return value

    def _marks(self, value: Any) -> Any:
        return None if self.trusted else [_mark(leaf) for leaf in tree_leaves(value)]


def _mark(thing: Any) -> Any:
    """Return what changes when a tensor is replaced or written to; what is no tensor, itself."""
    if not isinstance(thing, Tensor):
        return thing
    if thing.is_inference():  # torch does not count what is written to it, so it equals no other
        return float("nan")
    return thing.data_ptr(), thing._version, thing.shape, thing.stride(), thing.dtype


class Watch:
    """Notices all that a module's output depends on beside its inputs.

    A module is *plain* if it consists of layers of torch, diffusers or this package, with ordinary
    weights, and without hooks, wrappers, adapters or compiled code.
    """

    def __init__(self, *modules: nn.Module) -> None:
        parts = [part for module in modules for part in module.modules()]
        self._answered = [id(vars(module)) for module in modules]  # their forward may be overridden
        self._parts = [(vars(part), *settings_of(part)) for part in parts]
        self._places = [
            (places, name, thing)
            for part in parts
            for places in (part._modules, part._parameters, part._buffers)
            for name, thing in places.items()
        ]
        self._tensors = [each for *_, each in self._places if isinstance(each, Tensor)]
        self._plain = (
            all(f"{type(part).__module__}.".startswith(_PLAIN) for part in parts)
            and all(type(each) in (Tensor, nn.Parameter) for each in self._tensors)
            and not any(each.is_inference() or each.is_meta for each in self._tensors)
            and not any(is_overridden(part, "forward") for part in parts)
        )

    def state(self) -> tuple[Any, ...] | None:
        """Return what differs after any change; None while the module is not plain."""
        for own, _, size in self._parts:
            hooked = own["_forward_hooks"] or own["_forward_pre_hooks"]
            if (hooked or "forward" in own) and id(own) not in self._answered:
                return None
            if len(own) - ("forward" in own) != size or own["training"]:
                return None
        if not self._plain or any(places.get(name) is not it for places, name, it in self._places):
            return None
        settings = [own[name] for own, names, _ in self._parts for name in names]
        versions = [(each.data_ptr(), each._version) for each in self._tensors]
        return _modules_placed[0], *settings, *versions


_modules_placed = [0]


@contextmanager
def noticing_new_modules() -> Iterator[None]:
    """Notice, in this `with`, that a module is put anywhere: an adapter may have been merged."""

    def placed(*_: object) -> None:
        _modules_placed[0] += 1

    handle = register_module_module_registration_hook(placed)
    try:
        yield
    finally:
        handle.remove()


_PLAIN = ("torch.nn.modules.", "diffusers.models.", "harmonica.models.")


def settings_of(part: nn.Module) -> tuple[list[str], int]:
    """Return the names of a module's numbers and words, and how many attributes it has."""
    simple = (int, float, str, type(None))
    own = vars(part).copy()  # at once: another thread may place or take off an override
    own.pop("forward", None)
    return [name for name, it in own.items() if name[0] != "_" and isinstance(it, simple)], len(own)
