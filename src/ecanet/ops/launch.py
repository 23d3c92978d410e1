"""Launches a Triton kernel again, without asking all that triton asks: a fifth of the time that the CPU takes for it.

Triton looks at every argument of every launch to find what it has compiled for such ones. What it compiles for is
known: the types of tensors, whether 16 divides their addresses, whether a number is 1, whether 16 divides it, whether
it fits 32 bits, and the constants. Under a key of these the compiled kernel is kept and called, as triton's own
tutorials do.
"""

from typing import Any

import torch
from torch import Tensor

_INT32 = 2**31 - 1
_known: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}


def launch(function: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """``function[(programs,)](*args, **constants)`` on the current device.

    Args:
        function: A function of :func:`triton.jit`.
        programs: Size of the grid.
        args: Tensors, numbers or None: its first parameters.
        constants: Its other parameters, all ``tl.constexpr``, and options such as ``num_warps``.
    """
    if torch.version.hip is not None:  # AMD's is compiled for more: the sizes of tensors
        function[(programs,)](*args, **constants)
        return
    key = (function.__name__, torch.cuda.current_device(), *constants.values(), *map(_kind, args))
    if (found := _known.get(key)) is None:
        compiled = function[(programs,)](*args, **constants)
        names = tuple(name for name in function.arg_names[len(args) :])
        _known[key] = compiled, names
        return
    compiled, names = found
    compiled[programs, 1, 1](*args, *[constants[name] for name in names])


def _kind(value: Any) -> Any:
    """What a kernel is compiled for, of an argument that is no constant."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -_INT32 <= value <= _INT32
    return type(value)
