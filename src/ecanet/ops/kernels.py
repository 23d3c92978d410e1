"""The kernels as eager code calls them, one object for each make: ``KERNELS["cpu"].apply(...)``.

Names and arguments are those of :mod:`ecanet.ops.reference`. They are called below autograd: what they compute is
differentiated by the caller or not at all. A compiler's graph gets ``torch.ops.ecanet`` instead.
"""

from collections.abc import Callable
from typing import Any

import torch

from ecanet.ops import gpu, statistics
from ecanet.private_torch import BelowAutograd, direct_call


class CppKernels:
    """The C++ kernels, for the CPU.

    Without autograd's dispatch, which saves the ten microseconds a call that a derivative registered in Python costs:
    small maps would notice.
    """

    update_running = staticmethod(statistics.update_running)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = direct_call(getattr(torch.ops.ecanet, name).default)

        def run(*args: Any) -> Any:
            with BelowAutograd():
                return operation(*args)

        setattr(self, name, run)
        return run


class TritonKernels:
    """The Triton kernels, for a GPU or the interpreter."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        launch = getattr(gpu, name)
        setattr(self, name, launch)
        return launch


Kernels = CppKernels | TritonKernels

#: By the names that :func:`ecanet.ops.backend.choose` returns.
KERNELS: dict[str, Kernels] = {"cpu": CppKernels(), "triton": TritonKernels()}
