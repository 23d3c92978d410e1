"""The kernels as eager code calls them, one object per implementation: ``KERNELS["cpu"].apply(...)``.

Names and arguments are those of :mod:`ecanet.ops.reference` and :mod:`ecanet.ops.coefficients`. They are called below
autograd: what they compute is differentiated by the caller or not at all. A compiler's graph gets ``torch.ops.ecanet``
instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecanet.ops import gpu, statistics
from ecanet.private_torch import BelowAutograd, direct_call


class CppKernels:
    """The C++ kernels, for the CPU.

    Calls skip autograd's dispatch. A derivative registered in Python would cost ten microseconds per call, which
    matters for small maps.
    """

    @staticmethod
    def update_running(
        running_mean: Tensor,
        running_var: Tensor,
        mean: Tensor,
        var: Tensor,
        momentum: float | Tensor,
        count: int | Tensor,
    ) -> None:
        """Move running statistics; as :func:`ecanet.ops.statistics.update_running`, in fewer operations."""
        plain = running_mean.dtype == mean.dtype and running_var.dtype == var.dtype
        if not plain or isinstance(momentum, Tensor) or isinstance(count, Tensor):
            statistics.update_running(running_mean, running_var, mean, var, momentum, count)
            return
        keep = 1.0 - momentum
        running_mean.mul_(keep).add_(mean, alpha=momentum)
        running_var.mul_(keep).add_(var, alpha=momentum * (count / (count - 1)))

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

#: Keys are the names that :func:`ecanet.ops.backend.choose` returns.
KERNELS: dict[str, Kernels] = {"cpu": CppKernels(), "triton": TritonKernels()}
