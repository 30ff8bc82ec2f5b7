"""A pretended device on a machine without one: tensors on it live on the CPU, say otherwise, and refuse to be mixed.

``install()`` prepares torch's PrivateUse1 key as a device of the name ``pretended`` (for the whole process: use it in
one of its own). In a ``PretendedDevice`` block, tensors made on it or moved to it are ``OnDevice``; an operation that
takes such a tensor and one on the CPU raises, as on a GPU. Backward passes work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
"""Operations between devices."""
_CPU_INDICES = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
"""A GPU's tensors take indices on the CPU; a tensor on the CPU takes none on a GPU."""


def install() -> None:
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Backend(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())


class OnDevice(torch.Tensor):
    """A tensor that is on the pretended device; ``held`` are its values on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy; use Tensor.cpu() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = OnDevice(self.held.detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]


class PretendedDevice(TorchDispatchMode):
    """Within it, tensors can be made on and moved to the device."""

    def __enter__(self) -> PretendedDevice:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) is made on the CPU, then moved
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    if on_device and function not in _MOVES:
        _refuse_mixed(function, args, tensors)
    wanted = kwargs.get("device")
    on = bool(on_device) if wanted is None else torch.device(wanted).type == NAME
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if function is _aten.copy_.default:
        on = isinstance(args[0], OnDevice)
    out = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not on:
        return args[0] if function is _aten.copy_.default else out
    out = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)
    return return_and_correct_aliasing(function, args, kwargs, out) if on_device else out


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnDevice) else leaf


def _refuse_mixed(function: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """A tensor of the CPU without dimensions is a number, and may be mixed with any."""
    if function in _CPU_INDICES and isinstance(args[0], OnDevice):
        indices = {id(leaf) for leaf in tree_leaves(args[1])}
        tensors = [tensor for tensor in tensors if id(tensor) not in indices]
    if any(not isinstance(tensor, OnDevice) and tensor.dim() for tensor in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device: {NAME}:0 and cpu in {function}")


def to_device(model: torch.nn.Module) -> torch.nn.Module:
    """Move a model in place, as ``model.to`` does on a GPU: tied weights stay tied."""
    moved: dict[int, torch.Tensor] = {}

    def once(tensor: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return moved.setdefault(id(tensor), make(tensor))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = once(
                    parameter, lambda p: torch.nn.Parameter(OnDevice(p.detach().clone()), p.requires_grad)
                )  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = once(buffer, lambda b: OnDevice(b.detach().clone()))
    return model
