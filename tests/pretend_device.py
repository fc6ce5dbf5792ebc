"""A device that pretends: tensors in CPU memory that claim to be on `cuda:0` or `cuda:1`.

Device bugs show, and stay found, on any machine:

    with PretendDevices() as devices:
        model.to("cuda:0")
        ...
    devices.launches, devices.synchronisations  # Counter of "file.py:line"

- It refuses to mix devices as CUDA does: tensors of several devices in one operation are an error, except copies,
  indices on the CPU, and CPU scalars.
- It counts operations that would launch a kernel: everything that PyTorch dispatches, without views and allocations.
  What is one kernel on an accelerator and several on the CPU (`rms_norm`) counts once.
- It counts synchronisations: what makes the host wait for the device (reading a value, sizes that depend on values,
  copies between devices that do not say `non_blocking`).

Both are counted by the innermost source line below `roots`. A storage has a device; tensors have that of their
storage, so views, parameters and gradients need no care. One thread only.
"""

import collections
import contextlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CPU = torch.device("cpu")
_ALLOCATIONS = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "lift_fresh", "detach",
    "_unsafe_view", "set_", "_local_scalar_dense", "is_same_size", "sym_size", "_pin_memory",
}  # fmt: skip
_COPIES = {"copy_", "_to_copy", "set_", "_foreach_copy_"}
_FACTORIES = {f"{name}_like" for name in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")}
_SIZES_FROM_VALUES = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
_READS = _SIZES_FROM_VALUES | {"_local_scalar_dense", "equal"}
_ONE_KERNEL = {torch.rms_norm, torch.nn.functional.rms_norm}
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}
_TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}
_DEVICE, _IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_MEMORY = 80 << 30  # bytes that a pretended device has


_STORAGES: dict[int, tuple[StorageWeakRef, torch.device]] = {}  # of all contexts: what is kept outlives one


class PretendDevices:
    """A context in which `cuda:0`, `cuda:1`, ... exist.

    Args:
        roots: folders whose source lines are counted; the outermost frame counts where none of them is on the stack.
        memory: bytes that each device has free.
    """

    def __init__(self, roots: tuple[Path, ...] = (), memory: int = _MEMORY):
        self.launches: collections.Counter[str] = collections.Counter()
        self.synchronisations: collections.Counter[str] = collections.Counter()
        self.memory = memory
        self._roots = tuple(str(root) for root in roots) or (str(Path(__file__).parents[1] / "l2d"),)
        self.requested = CPU  # device of tensors that are made from nothing
        self.quiet = 0  # how many enclosing functions count as one kernel

    def __enter__(self) -> "PretendDevices":
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_replaced(torch.cuda, "mem_get_info", lambda device=None: (self.memory, self.memory)))
        properties = lambda device=None: types.SimpleNamespace(total_memory=self.memory, name="pretended")  # noqa: E731
        self._stack.enter_context(_replaced(torch.cuda, "get_device_properties", properties))
        self._stack.enter_context(_replaced(torch.cuda, "device_count", lambda: 2))
        self._stack.enter_context(_replaced(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
        self._stack.enter_context(_Dispatched(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def reset(self) -> None:
        """Forget what was counted."""
        self.launches.clear()
        self.synchronisations.clear()

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        """The device that a tensor claims to be on."""
        if tensor.is_meta or tensor.layout != torch.strided:
            return tensor.device
        kept = _STORAGES.get(tensor.untyped_storage()._cdata)
        return CPU if kept is None else kept[1]

    def claim(self, value: Any, device: torch.device) -> None:
        """Put tensors on a device, if nothing says where they are."""
        for tensor in tree_iter(value):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in _STORAGES:
                    # The weak reference keeps the address from being used for another storage.
                    _STORAGES[storage._cdata] = (StorageWeakRef(storage), device)
        if len(_STORAGES) > 100_000:
            for key in [key for key, (storage, _) in _STORAGES.items() if storage.expired()]:
                del _STORAGES[key]

    def launched(self) -> None:
        """Count one kernel."""
        if not self.quiet:
            self.launches[self._line()] += 1

    def synchronised(self) -> None:
        """Count one wait of the host."""
        self.synchronisations[self._line()] += 1

    def _line(self) -> str:
        frame: Any = sys._getframe(2)
        while not frame.f_code.co_filename.startswith(self._roots) and frame.f_back is not None:
            frame = frame.f_back
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


class _Functions(TorchFunctionMode):
    """What Python code asks of tensors: devices, transfers, factories."""

    def __init__(self, devices: PretendDevices):
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, devices = dict(kwargs or {}), self.devices
        if func == _DEVICE:
            return devices.device_of(args[0])
        if func == _IS_CUDA:
            return devices.device_of(args[0]).type == "cuda"
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self._move(func, *args, **kwargs)
        if func is torch.device and args and isinstance(args[0], int):
            return torch.device("cuda", args[0])
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func in _TO_HOST and devices.device_of(args[0]) != CPU:
            devices.synchronised()
        before, devices.requested = devices.requested, self._requested(func, args, kwargs)
        if func in _FROM_HOST:
            return self._from_host(func, args, kwargs, before)
        one = func in _ONE_KERNEL
        if one and any(isinstance(a, torch.Tensor) and devices.device_of(a) != CPU for a in args):
            devices.launched()
        devices.quiet += one
        try:
            return func(*args, **kwargs)
        finally:
            devices.requested = before
            devices.quiet -= one

    def _from_host(self, func: Any, args: Any, kwargs: dict[str, Any], before: torch.device) -> torch.Tensor:
        """A tensor of values that the host has: copied to the device, which the host waits for."""
        devices, device = self.devices, self.devices.requested
        devices.requested = before
        data = args[0] if func is not torch.Tensor.new_tensor else args[1]
        if func is torch.as_tensor and isinstance(data, torch.Tensor):
            return self._move(torch.Tensor.to, data, device, kwargs.get("dtype") or data.dtype)
        with _paused():
            made = func(*args, **kwargs)
        devices.claim(made, device)
        if device != CPU:
            devices.launched()
            devices.synchronised()
        return made

    def _requested(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
        device = kwargs.get("device")
        if device is not None:
            device = _device(device)
            if device.type == "cuda":
                kwargs["device"] = CPU
            return device
        for tensor in tree_iter(args):
            if isinstance(tensor, torch.Tensor):
                return self.devices.device_of(tensor)
        return CPU

    def _move(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, arguments = None, list(args)
        if func is torch.Tensor.cpu:
            device, arguments = CPU, []
        elif func is torch.Tensor.cuda:
            device, arguments = _device(arguments[0] if arguments else 0), []
        elif arguments and isinstance(arguments[0], torch.Tensor):
            other = arguments.pop(0)
            device, kwargs["dtype"] = self.devices.device_of(other), other.dtype
        elif arguments and (arguments[0] is None or isinstance(arguments[0], (str, int, torch.device))):
            given = arguments.pop(0)
            device = None if given is None else _device(given)
        elif kwargs.get("device") is not None:
            device = _device(kwargs["device"])
        kwargs.pop("device", None)
        if arguments and isinstance(arguments[0], torch.dtype):
            kwargs["dtype"] = arguments.pop(0)
        if arguments:
            kwargs["non_blocking"] = arguments.pop(0)
        own = self.devices.device_of(tensor)
        if device is None or device == own:
            return torch.Tensor.to(tensor, dtype=kwargs.get("dtype") or tensor.dtype, copy=kwargs.get("copy", False))
        if not kwargs.get("non_blocking") or device == CPU:
            self.devices.synchronised()
        if device.type == "meta":
            return torch.Tensor.to(tensor, device, kwargs.get("dtype"))
        before, self.devices.requested = self.devices.requested, device
        try:
            return _Moved.apply(tensor, kwargs.get("dtype") or tensor.dtype, device, own, self.devices)
        finally:
            self.devices.requested = before


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient goes back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dtype: torch.dtype, device: Any, own: Any, devices: PretendDevices):
        ctx.dtype, ctx.own, ctx.devices = tensor.dtype, own, devices
        return _copied(devices, tensor, dtype, device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        return _copied(ctx.devices, gradient, ctx.dtype, ctx.own), None, None, None, None


def _copied(devices: PretendDevices, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A copy of `tensor` on `device`."""
    with _paused():
        copied = tensor.detach().to(dtype, copy=True)
    devices.claim(copied, device)
    devices.launched()
    return copied


class _Dispatched(TorchDispatchMode):
    """What PyTorch really computes: checks devices, counts, and says where results are."""

    def __init__(self, devices: PretendDevices):
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, devices = kwargs or {}, self.devices
        name = func.overloadpacket.__name__
        tensors = [part for part in tree_iter((args, kwargs)) if isinstance(part, torch.Tensor)]
        made = not tensors or name in _FACTORIES
        device = devices.requested if made else self._common(name, args, tensors)
        if device.type == "cuda":
            if name not in _ALLOCATIONS and not _is_view(func):
                devices.launched()
            if self._waits(name, args, tensors):
                devices.synchronised()
        elif name == "copy_" and any(devices.device_of(tensor) != CPU for tensor in tensors):
            devices.synchronised()
        result = func(*args, **kwargs)
        devices.claim(result, device)
        return result

    def _common(self, name: str, args: Any, tensors: list[torch.Tensor]) -> torch.device:
        where = [self.devices.device_of(tensor) for tensor in tensors]
        if name in _COPIES:
            return where[0]
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            first = where[0]
            rest = [(t, d) for t, d in zip(tensors[1:], where[1:], strict=True) if d != CPU]
            if any(d != first for _, d in rest):
                raise RuntimeError(
                    f"indices should be either on cpu or on the same device as the indexed tensor ({first})"
                )
            return first
        real = {d for t, d in zip(tensors, where, strict=True) if t.dim() or d != CPU}
        if len(real) > 1:
            named = " and ".join(sorted(map(str, real)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {named}: {name}")
        return next(iter(real), CPU)

    def _waits(self, name: str, args: Any, tensors: list[torch.Tensor]) -> bool:
        if name in _READS:
            return True
        if name == "repeat_interleave":
            return True  # with a number of repetitions it is not dispatched
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            boolean = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            moved = any(self.devices.device_of(index) == CPU for index in indices)
            filled = name != "index" and len(indices) == 1 and args[2].numel() == 1  # becomes masked_fill
            return moved or boolean and not filled
        if name == "copy_":
            apart = len({self.devices.device_of(tensor) for tensor in tensors}) > 1
            return apart and not (len(args) > 2 and args[2])
        return False


def _grouped(lists: list[list[torch.Tensor]], with_indices: bool = False) -> dict[Any, Any]:
    """Lists of tensors, some of them empty, by device and data type of the first; for clipping and optimizers."""
    groups: dict[Any, Any] = {}
    for number, tensor in enumerate(lists[0]):
        columns, indices = groups.setdefault((tensor.device, tensor.dtype), ([[] for _ in lists], []))
        for column, values in zip(columns, lists, strict=True):
            column.extend(values[number : number + 1])
        indices.append(number)
    return groups


def _is_view(func: Any) -> bool:
    return any(part.alias_info is not None and not part.alias_info.is_write for part in func._schema.returns)


def _device(value: Any) -> torch.device:
    device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


@contextlib.contextmanager
def _paused():
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
