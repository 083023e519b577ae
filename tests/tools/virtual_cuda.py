"""A CUDA device that is not there: tensors on it hold real values on the CPU, and may not be mixed with others.

Fake tensors know devices but no values, and a quantization run asks for values at every step (Cholesky's outcome, k-means,
whether a range is finite). Here every storage is real and some are marked as CUDA's; each call of a torch function is
checked by torch's own rules of mixing devices, and `Tensor.device` says what the mark says.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda:7")
"""Of a number that no machine here has: what is kept by device, of these tensors, nobody else is given."""
_CROSSING = {"copy_", "data", "_has_compatible_shallow_copy_type"}
"""Functions that take tensors of two devices."""
_ALL_ALIKE = {"cat", "stack", "concat", "concatenate", "hstack", "vstack"}
"""Functions that take no CPU scalar among CUDA tensors."""
_HOST = {"numpy", "__array__", "__dlpack__"}
_NUMBERS = {int, float, bool}
"""A list of nothing else holds no tensor: `torch.tensor` is given the ids of a whole text."""


class VirtualCuda(TorchFunctionMode):
    """Inside the context ``device="cuda"`` can be had.

    Raises, where real CUDA would: RuntimeError for tensors of two devices in one call, or a generator of the other device;
    TypeError for a numpy array of a CUDA tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        # A weak reference keeps the address from being given to another storage.
        self._marked: dict[int, StorageWeakRef] = {}
        self.calls = 0

    def is_cuda(self, tensor: torch.Tensor) -> bool:
        """Returns whether the tensor is marked as CUDA's."""
        return not tensor.is_meta and tensor.untyped_storage()._cdata in self._marked

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), _name(function)
        if function is torch.device or name == "_parse_to":
            return function(*args, **kwargs)
        if name == "device":
            return CUDA if self.is_cuda(args[0]) else function(*args)
        if name == "is_cuda":
            return self.is_cuda(args[0])
        tensors = list(_tensors((args, kwargs)))
        if not (tensors or _devices((args, kwargs))):
            return function(*args, **kwargs)
        self.calls += 1
        held = [self.is_cuda(tensor) for tensor in tensors]
        if name in _HOST and any(held):
            raise TypeError("can't convert cuda device type tensor to numpy. Use Tensor.cpu() first")
        target = self._target(name, args, kwargs, any(held))
        if not (name == "to" or name in _CROSSING):
            self._check(name, args, tensors, held)
        generator = kwargs.get("generator")
        if generator is not None and target:
            raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
        before = {tensor.untyped_storage()._cdata for tensor in tensors if not tensor.is_meta}
        result = function(*_on_cpu(args), **_on_cpu(kwargs))
        if name in {"to", "cpu", "cuda"} and target != held[0] and result.untyped_storage()._cdata in before:
            result = result.clone()
        if target:
            self._mark(result, before)
        return result

    def _target(self, name: str, args: Any, kwargs: dict[str, Any], held: bool) -> bool:
        """Returns whether new results are CUDA's."""
        if name == "cpu":
            return False
        if name == "cuda":
            return True
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            return self.is_cuda(args[1])
        asked = _devices((args, kwargs))
        return asked[0].type == "cuda" if asked else held

    def _check(self, name: str, args: Any, tensors: list[torch.Tensor], held: list[bool]) -> None:
        indexing = name in {"__getitem__", "__setitem__"}
        if indexing:
            # What is indexed decides; its indices may be on the CPU, and so may values that are copied in.
            if held[0] or not any(held):
                return
            index = list(_tensors(args[1]))
            if not any(self.is_cuda(tensor) for tensor in index):
                return
        elif (
            all(held)
            or not any(held)
            or (
                name not in _ALL_ALIKE
                and all(mark or not tensor.dim() for tensor, mark in zip(tensors, held, strict=True))
            )
        ):
            return
        kinds = [f"{CUDA if mark else 'cpu'} {tuple(t.shape)}" for t, mark in zip(tensors, held, strict=True)]
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {', '.join(kinds)}")

    def _mark(self, result: Any, before: set[int]) -> None:
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            # What a call gives back of its inputs stays where it was.
            if not tensor.is_meta and storage._cdata not in before:
                self._marked[storage._cdata] = StorageWeakRef(storage)


def _name(function: Callable[..., Any]) -> str:
    name: str = getattr(function, "__name__", "")
    if name in {"__get__", "__set__"}:
        owner = getattr(function, "__self__", None)
        return getattr(owner, "__name__", name)
    return name


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple) and not _NUMBERS.issuperset(map(type, value)):
        for item in value:
            yield from _tensors(item)


def _devices(value: Any) -> list[torch.device]:
    """Returns the devices that a call's arguments name: torch.device objects, and strings that spell one."""
    args, kwargs = value
    found = [_device(item) for item in (*args[:3], kwargs.get("device"))]
    return [device for device in found if device is not None]


def _device(value: Any) -> torch.device | None:
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str) and value.partition(":")[0] in {"cuda", "cpu", "meta"}:
        return torch.device(value)
    return None


def _on_cpu(value: Any) -> Any:
    """Returns the arguments with the CPU in the place of CUDA."""
    if isinstance(value, dict):
        return {key: _real(item) for key, item in value.items()}
    return tuple(_real(item) for item in value)


def _real(value: Any) -> Any:
    device = _device(value)
    return torch.device("cpu") if device is not None and device.type == "cuda" else value


@functools.cache
def virtual_device() -> VirtualCuda:
    """Returns the one of this process: tables that code keeps by device are marked by whichever was there first."""
    return VirtualCuda()
