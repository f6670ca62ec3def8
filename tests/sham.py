"""A sham CUDA device: tensors that Python takes for cuda:0 while their numbers lie on the CPU.

No GPU is needed to see what would go wrong on one. Inside `with ShamDevice() as device:`

    tensor.device      is cuda:0 for whatever was made there or moved there
    mixed devices      are refused as CUDA refuses them
    device.waits       what made the host wait (item, tolist, nonzero, equal, …) or copied between devices, and where
    device.strict      turn each of them into a `HostWaits`, as the capture of a graph does

How: a tensor subclass without storage, on the meta device for C++ (under CUDA's name autograd would
look for its streams), that holds a CPU tensor. A dispatch mode runs every operation on what is held,
a function mode sees what never reaches it, and the parts of torch.cuda that the library calls are
stubs. This file does not know the library.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
ROOT = Path(__file__).parents[1]
aten = torch.ops.aten

WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_consecutive", "_unique2", "bincount",
}  # fmt: skip
"""Operations whose result, or its size, the host must know."""

TOGETHER = {"cat", "stack", "mm", "bmm", "addmm", "convolution", "embedding", "gather", "native_layer_norm"}
"""Operations that refuse a CPU tensor even if it is a single number."""

MAKES = {"tensor", "as_tensor", "asarray"}
"""Functions that make a tensor on the CPU and copy it to the device."""


class HostWaits(RuntimeError):
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
        copy = Sham(self.held.clone(), self.requires_grad)
        return memo.setdefault(id(self), torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy)

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
        assert cls._open is not None, "a tensor of the sham device is used after the device was closed"
        return cls._open

    def __enter__(self):
        ShamDevice._open = self
        for name, stub in _stubs(self).items():
            self._stack.enter_context(mock.patch(f"torch.cuda.{name}", stub, create=True))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
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
        while frame.f_back and (ROOT not in (file := Path(frame.f_code.co_filename)).parents or file.name == "sham.py"):
            frame = frame.f_back
        line = f"{what} at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.waits[line] += 1
        if self.strict:
            raise HostWaits(line)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation on the CPU tensors that are held, and note what CUDA would wait for."""
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        tensors: list[Tensor] = []

        def held(leaf: Tensor) -> Tensor:
            tensors.append(leaf)
            return leaf.held if isinstance(leaf, Sham) else leaf

        inner, options = _each(held, args), {key: _each(held, value) for key, value in kwargs.items()}
        shams = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Sham)}
        place = kwargs.get("device")
        on_cuda = bool(shams) if place is None else place.type == "cuda" or place.type == "meta" and not self.meta
        if place is not None and on_cuda:
            options["device"] = CPU
        if name in ("_to_copy", "copy"):
            if len({isinstance(tensor, Sham) for tensor in tensors} | {on_cuda}) == 2 and place != META:
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
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
                )


class _Functions(TorchFunctionMode):
    """Sees what does not reach a dispatch mode: data that becomes a tensor, and who means the real meta device."""

    def __init__(self, device: ShamDevice) -> None:
        super().__init__()
        self._sham = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if kwargs.get("device") is not None:
            kwargs["device"] = _indexed(kwargs["device"])
        place = kwargs.get("device")
        if name == "cuda":
            func, name, args = Tensor.to, "to", (args[0], CUDA)
        if name == "to":
            args = (args[0], *map(_indexed, args[1:]))
            place = next((arg for arg in args if isinstance(arg, torch.device)), place)
            if isinstance(args[0], Sham) and _stays(args[0], args[1:], kwargs):
                return args[0]
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
    masks = name in ("index", "index_put") and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1] if index is not None
    )
    return masks and not (name == "index_put" and args[2].numel() == 1)  # one number is filled in


def _stays(tensor: Sham, args: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether `tensor.to(…)` is the tensor itself."""
    for wanted in (*args, *kwargs.values()):
        if isinstance(wanted, Tensor):
            if not isinstance(wanted, Sham) or wanted.dtype != tensor.dtype:
                return False
        elif isinstance(wanted, torch.dtype):
            if wanted != tensor.dtype:
                return False
        elif isinstance(wanted, str | torch.device):
            if torch.device(wanted).type != "cuda":
                return False
        elif wanted is True and kwargs.get("copy"):
            return False
    return True


def _stubs(device: ShamDevice) -> dict[str, Any]:
    """Return what stands for torch.cuda's functions and classes."""
    import time

    class Event:
        def __init__(self, **_):
            self.at = 0.0

        def record(self, *_):
            self.at = time.perf_counter()

        def synchronize(self):
            device.wait("Event.synchronize")

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

        def query(self):
            return True

    def synchronize(*_):
        device.wait("synchronize")

    nothing = mock.MagicMock
    return {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "is_initialized": lambda: True, "set_device": lambda *_: None, "get_device_name": lambda *_: "sham",
        "synchronize": synchronize, "Event": Event, "Stream": nothing, "stream": nothing, "current_stream": nothing(),
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
        "is_bf16_supported": lambda *_, **__: True, "device": nothing, "get_sync_debug_mode": lambda: 0, 
        "set_sync_debug_mode": lambda mode: setattr(device, "strict", mode in ("error", 2)),
        "empty_cache": lambda: None,
    }  # fmt: skip
