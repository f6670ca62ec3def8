"""A sham CUDA device: tensors that Python takes for cuda:0 while their numbers lie on the CPU.

No GPU is needed to see what would go wrong on one. Inside `with ShamDevice() as device:`

    tensor.device      is cuda:0 for whatever was made there or moved there
    mixed devices      are refused as CUDA refuses them
    device.waits       what made the host wait (item, tolist, nonzero, equal, …) or copied between devices, and where
    device.strict      turn each of them into a `HostWaitError`, as the capture of a graph does

How: a tensor subclass without storage, on the meta device for C++ (under CUDA's name autograd would
look for its streams), that holds a CPU tensor. A dispatch mode runs every operation on what is held,
a function mode sees what never reaches it, and the parts of torch.cuda that the library calls are
stubs. This file does not know the library.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
ROOT = Path(__file__).parents[1]

WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "bincount"}
"""Operations whose result, or its size, the host must know."""

TOGETHER = {"cat", "stack", "mm", "bmm", "addmm", "convolution", "embedding", "gather"}
"""Operations that refuse a CPU tensor even if it is a single number."""

MAKES = {"tensor", "as_tensor", "asarray"}
"""Functions that make a tensor on the CPU and copy it to the device."""


class HostWaitError(RuntimeError):
    """The host would have waited for the device, or numbers would have been copied between the two."""


class Sham(Tensor):
    """A tensor of the sham device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Sham:
        sham = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device="meta", requires_grad=requires_grad,
        )  # fmt: skip
        sham.held = held
        return sham

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @property
    def data(self):
        return Sham(self.held)

    @data.setter
    def data(self, value):
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return ShamDevice.opened().run(func, args, kwargs or {})

    def data_ptr(self):
        return self.held.data_ptr()

    def get_device(self):
        return 0

    def tolist(self):
        ShamDevice.opened().wait("tolist")
        return self.held.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def __deepcopy__(self, memo):
        copy, is_parameter = Sham(self.held.clone()), isinstance(self, torch.nn.Parameter)
        memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    def __repr__(self, **_):
        return f"Sham({self.held!r})"


class ShamDevice(TorchDispatchMode):
    """The device, while it is open; see the top of this file."""

    _open: ShamDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.strict = self.meta = False  # meta: a caller asked for the real meta device
        self._stack = ExitStack()

    @classmethod
    def opened(cls) -> ShamDevice:
        assert cls._open is not None, "the sham device of this tensor is closed"
        return cls._open

    def __enter__(self):
        ShamDevice._open = self
        for name, stub in _stubs(self).items():
            self._stack.enter_context(mock.patch(f"torch.cuda.{name}", stub, create=True))
        future, overwrite = torch.__future__, "overwrite_module_params_on_conversion"
        change, before = getattr(future, f"set_{overwrite}"), getattr(future, f"get_{overwrite}")()
        self._stack.callback(change, before)
        change(True)
        self._stack.enter_context(_Functions(self))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()
        ShamDevice._open = None

    @contextmanager
    def watched(self, *, strict: bool = False) -> Iterator[Counter[str]]:
        """Count waits and copies from here on, by operation and line; with `strict` raise at the first."""
        self.waits.clear()
        self.strict = strict
        try:
            yield self.waits
        finally:
            self.strict = False

    def wait(self, what: str) -> None:
        """Note that the host waits or copies, and where in this repository it is asked to."""
        frame = sys._getframe(1)
        while frame.f_back and (
            ROOT not in (file := Path(frame.f_code.co_filename)).parents
            or file.name == "sham.py"
            or "site-packages" in file.parts  # an environment may lie inside the checkout
        ):
            frame = frame.f_back
        line = f"{what} at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.waits[line] += 1
        if self.strict:
            raise HostWaitError(line)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation on the CPU tensors that are held, and note what CUDA would wait for."""
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        tensors: list[Tensor] = []

        def held(leaf: Tensor) -> Tensor:
            tensors.append(leaf)
            return leaf.held if isinstance(leaf, Sham) else leaf

        inner = _each(held, args)
        options = {key: _each(held, value) for key, value in kwargs.items()}
        shams = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Sham)}
        place = kwargs.get("device")
        if place is None:
            on_cuda = bool(shams)
        else:  # C++ takes the options of a tensor of ours to be meta
            on_cuda = place.type == "cuda" or (place.type == "meta" and not self.meta)
            options["device"] = CPU if on_cuda else place
        if name in ("_to_copy", "copy"):
            ends = {isinstance(tensor, Sham) for tensor in tensors} | {on_cuda}
            if len(ends) == 2 and place != META:
                self.wait("copy between devices")
        elif shams:
            self._refuse_mixed(name, tensors)
            if name in WAITS or (name.startswith("index") and _looks_up(name, args)):
                self.wait(name)
        result = func(*inner, **options)
        if not on_cuda or name in ("_local_scalar_dense", "equal"):
            return result
        return _each(lambda leaf: shams[id(leaf)] if id(leaf) in shams else Sham(leaf), result)

    def _refuse_mixed(self, name: str, tensors: list[Tensor]) -> None:
        """Raise as CUDA does where a CPU tensor of more than one number meets the device."""
        for tensor in tensors:
            if isinstance(tensor, Sham) or tensor.is_meta:
                continue
            if name in ("index", "index_put") and not tensor.is_floating_point():
                self.wait("copy of an index")  # CUDA takes indices from the CPU, and copies them
            elif tensor.dim() or name in TOGETHER:
                raise RuntimeError(f"{name}: tensors are on two devices, cuda:0 and cpu")


class _Functions(TorchFunctionMode):
    """Sees what does not reach a dispatch mode: data that becomes a tensor, and who means the real meta device."""

    def __init__(self, device: ShamDevice) -> None:
        super().__init__()
        self._sham = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if kwargs.get("device") is not None:
            kwargs["device"] = _indexed(kwargs["device"])
        place = kwargs.get("device")
        if name == "cuda":
            func, name, args = Tensor.to, "to", (args[0], CUDA)
        if name == "to":
            args = (args[0], *map(_indexed, args[1:]))
            place = next((arg for arg in args if isinstance(arg, torch.device)), place)
        if name == "new_tensor" and isinstance(args[0], Sham):
            func, name, place = torch.tensor, "tensor", CUDA
            kwargs, args = {"dtype": args[0].dtype, **kwargs}, args[1:]
        if place is not None and place.type == "cuda" and name in MAKES:
            self._sham.wait("copy between devices")
            made = func(*args, **{**kwargs, "device": CPU})
            return made if isinstance(made, Sham) else Sham(made)
        if place is None or place.type != "meta":
            return func(*args, **kwargs)
        with mock.patch.object(self._sham, "meta", True):
            return func(*args, **kwargs)


def _indexed(place: Any) -> Any:
    """Return the device that is meant, with its number: without one C++ would ask the driver for it."""
    place = torch.device(place) if isinstance(place, str) else place
    return CUDA if isinstance(place, torch.device) and place.type == "cuda" else place


def _each(change: Any, tree: Any) -> Any:
    """Return lists and tuples with their tensors changed; the pytree of torch takes three times as long."""
    if isinstance(tree, Tensor):
        return change(tree)
    return type(tree)(_each(change, leaf) for leaf in tree) if type(tree) in (list, tuple) else tree


def _looks_up(name: str, args: Any) -> bool:
    """Tell whether CUDA must count the places that an index of true and false names."""
    indices = args[1] if name in ("index", "index_put") else ()
    masks = any(index is not None and index.dtype == torch.bool for index in indices)
    return masks and not (name == "index_put" and args[2].numel() == 1)  # one number is filled in


class _Event:
    """A moment on the device's clock, which is the host's."""

    def __init__(self, device: ShamDevice) -> None:
        self.synchronize = partial(device.wait, "Event.synchronize")

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return (other.at - self.at) * 1e3


def _stubs(device: ShamDevice) -> dict[str, Any]:
    """Return what stands for torch.cuda's functions and classes."""
    answers = {"is_available": True, "is_initialized": True, "is_bf16_supported": True}
    answers |= {"mem_get_info": (2**36, 2**36), "device_count": 1, "current_device": 0}
    answers |= {"get_device_name": "sham"}
    answers |= dict.fromkeys(("_lazy_init", "init", "set_device", "set_rng_state", "empty_cache"))
    answers |= {"get_sync_debug_mode": "default", "graph_pool_handle": (0, 0), "set_stream": None}
    stubs = {name: mock.Mock(return_value=answer) for name, answer in answers.items()}
    parts = ("Stream", "stream", "current_stream", "device", "CUDAGraph", "graph")
    stubs |= {name: mock.MagicMock() for name in parts}
    stubs["default_generators"] = (torch.Generator(),)
    stubs["Event"] = lambda **_: _Event(device)
    stubs["synchronize"] = lambda *_: device.wait("synchronize")
    stubs["get_rng_state"] = lambda *_: torch.get_rng_state()
    stubs["set_sync_debug_mode"] = lambda mode: setattr(device, "strict", mode == "error")
    return stubs
