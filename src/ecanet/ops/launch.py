"""Launches compiled Triton kernels directly, which takes a fifth of the CPU time of triton's own launch.

At every launch, triton inspects every argument to find the kernel that it compiled for such arguments. It specialises
on the types of tensors, on whether 16 divides their addresses, on whether a number is 1, is divisible by 16 and fits
32 bits, and on the constants. These form the key under which the compiled kernel is cached here; calling a compiled
kernel is what triton's own tutorials do.
"""

from typing import Any

import torch
from torch import Tensor

_INT32 = 2**31 - 1
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}


def launch(function: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """``function[(programs,)](*args, **constants)`` on the current device.

    Args:
        function: A function of :func:`triton.jit`.
        programs: Size of the grid.
        args: The kernel's first parameters: tensors, numbers or None.
        constants: The kernel's other parameters, all ``tl.constexpr``, and options such as ``num_warps``.
    """
    if torch.version.hip is not None:  # for AMD, triton also specialises on the sizes of tensors
        function[(programs,)](*args, **constants)
        return
    key = (function.__name__, torch.cuda.current_device(), *constants.values(), *map(_specialization, args))
    if (cached := _compiled.get(key)) is None:
        compiled = function[(programs,)](*args, **constants)
        names = tuple(name for name in function.arg_names[len(args) :])
        _compiled[key] = compiled, names
        return
    compiled, names = cached
    compiled[programs, 1, 1](*args, *[constants[name] for name in names])


def _specialization(value: Any) -> Any:
    """The properties of a non-constant argument that triton specialises a kernel on."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -_INT32 <= value <= _INT32
    return type(value)
