"""A second device where there is none: its tensors are computed on the CPU, and mix with the CPU's as CUDA's would.

Tensors there cannot be read by numpy, and an operation that gets tensors of both devices raises MixedDevices, but where
CUDA takes them: copies, indices of the CPU, and numbers, tensors without dimensions, in operations element by element.
The device is torch's PrivateUse1, under its own name, so that nothing else in the process sees an accelerator. Autocast
lowers matrix products. There is no backward pass.
"""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyDeviceGuard

DEVICE: Final = torch.device("privateuseone", 0)
COPIES: Final = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXED: Final = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}
_LIBRARIES: Final = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")


class MixedDevices(RuntimeError):
    """An operation got tensors of both devices."""


class There(torch.Tensor):
    """A tensor on the pretended device. near: its values, on the CPU."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> "There":
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        made: There = torch.Tensor._make_wrapper_subclass(cls, near.shape, device=DEVICE, **layout)  # type: ignore
        made.near = near
        return made

    def tolist(self) -> Any:
        """As a tensor on CUDA."""
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        check(func, args, kwargs)
        return run(func, args, kwargs, kwargs.get("device") in (None, DEVICE))


class Pretending(TorchDispatchMode):
    """Takes what makes tensors on the device of nothing, or of the CPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if wanted is not None and wanted.type == DEVICE.type and not any(map(is_there, tree_leaves((args, kwargs)))):
            return run(func, args, kwargs, True)
        return func(*args, **kwargs)


def is_there(value: object) -> bool:
    return isinstance(value, There)


def check(func: Any, args: Any, kwargs: Any) -> None:
    """Raise MixedDevices where CUDA would refuse the tensors."""
    if func in COPIES:
        return
    strict = (args[0], args[2:]) if func in INDEXED else (args, kwargs)
    for value in tree_leaves(strict):
        number = isinstance(value, torch.Tensor) and value.ndim == 0 and torch.Tag.pointwise in func.tags
        if isinstance(value, torch.Tensor) and not is_there(value) and not number:
            raise MixedDevices(f"{func} got tensors of {DEVICE} and of the CPU, that of shape {tuple(value.shape)}")


def run(func: Any, args: Any, kwargs: Any, there: bool) -> Any:
    """Compute on the CPU.  → results on the pretended device, or not"""

    def near(value: Any) -> Any:
        return value.near if is_there(value) else value

    moved = {name: torch.device("cpu") if name == "device" else tree_map(near, one) for name, one in kwargs.items()}
    made = func(*tree_map(near, args), **moved)
    if not there or (func is torch.ops.aten.copy_.default and not is_there(args[0])):
        return made
    wrapped = tree_map(lambda value: There(value) if isinstance(value, torch.Tensor) else value, made)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def lowered(product: Any) -> Callable[..., Any]:
    """A matrix product in the type of autocast."""

    def lower(*args: Any, **kwargs: Any) -> Any:
        dtype, key = torch.get_autocast_dtype(DEVICE.type), torch._C._dispatch_key_parse("AutocastPrivateUse1")
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            args, kwargs = tree_map(lambda one: one.to(dtype) if isinstance(one, torch.Tensor) else one, (args, kwargs))
            return product(*args, **kwargs)

    return lower


def _register() -> None:
    """Once a process: what torch's core asks of a device."""
    torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())
    products, others = _LIBRARIES
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "matmul", "bmm", "scaled_dot_product_attention"):
        products.impl(name, lowered(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")


_register()


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """The device, as long as the context lasts."""
    module = types.ModuleType(f"torch.{DEVICE.type}")  # what torch asks in Python
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    module._lazy_init = lambda: None  # type: ignore[attr-defined]
    module.is_initialized = lambda: True  # type: ignore[attr-defined]
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device) makes its tensor on the CPU and moves it
    try:
        with pytest.MonkeyPatch.context() as patch, Pretending():  # type: ignore[no-untyped-call]
            patch.setattr(torch, DEVICE.type, module, raising=False)
            patch.setitem(sys.modules, module.__name__, module)
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
