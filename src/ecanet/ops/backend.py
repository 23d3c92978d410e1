"""Which implementation of an operation runs: plain PyTorch (the reference), the C++ or the Triton kernels."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ecanet.ops import cpu, gpu

NAMES = ("auto", "reference", "cpu", "triton")
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _from_environment() -> str:
    name = os.environ.get("ECANET_BACKEND") or "auto"
    if name not in NAMES:
        raise ValueError(f"ECANET_BACKEND must be one of {', '.join(NAMES)}; it is {name!r}")
    return name


# A plain global and neither a ContextVar, which torch.compile of torch 2.10 cannot trace, nor a threading.local, which
# it reads once and for all: a compiled function recompiles when this one changes.
_choice = _from_environment()
_told = False


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation for what runs inside ``with``, or inside the function this decorates.

    The choice holds for the whole process, other threads too, as torch's own flags do. ``ECANET_BACKEND`` in the
    environment is the choice to start from.

    Args:
        name: ``"auto"`` takes the C++ kernels on the CPU, the Triton kernels on a GPU and the reference where they
            cannot run; ``"reference"`` is plain PyTorch, anywhere; ``"cpu"`` is the C++ kernels or an error that says
            why not; ``"triton"`` likewise, on the CPU too where ``TRITON_INTERPRET=1`` is in the environment.

    Raises:
        ValueError: another name.
        RuntimeError: that implementation cannot run here; the reason and what to do.

    Example:
        >>> import torch, ecanet
        >>> gate = ecanet.ECA(64)
        >>> with ecanet.backend("reference"):
        ...     gate(torch.ones(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """
    global _choice
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if (reason := reason_against(name)) is not None:
        raise RuntimeError(_refusal(name, reason))
    before = _choice
    _choice = name
    try:
        yield
    finally:
        _choice = before


def current() -> str:
    """The choice in force: ``auto``, ``reference``, ``cpu`` or ``triton``."""
    return _choice


def choose(x: torch.Tensor) -> str:
    """The implementation for one feature map: ``"reference"``, ``"cpu"`` or ``"triton"``.

    Raises:
        RuntimeError: the implementation that :func:`backend` or ``ECANET_BACKEND`` asks for cannot run on ``x``.
    """
    # First, and without a look at anything else: small maps take no longer than such questions.
    if _choice in ("auto", "cpu") and x.is_cpu and x.dtype in CPU_DTYPES and cpu.why_not() is None:
        return "cpu"
    if _choice == "reference":
        return "reference"
    device_type = x.device.type
    if _choice == "cpu":
        raise RuntimeError(_refusal("cpu", str(cpu_reason(device_type, x.dtype))))
    if _choice == "triton" or device_type == "cuda":
        reason = triton_reason(device_type, x.dtype)
        if reason is None:
            return "triton"
        if _choice == "triton":
            raise RuntimeError(_refusal("triton", reason))
    if not _told and device_type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        _tell(device_type)
    return "reference"


def reason_against(name: str) -> str | None:
    """None if the named choice can run on this machine, on some tensor at least; else why not."""
    if name == "cpu":
        return cpu.why_not()
    if name == "triton":
        return gpu.why_not()
    return None


def cpu_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """None if the C++ kernels can run on such a tensor, else why not."""
    if (reason := cpu.why_not()) is not None:
        return reason
    if device_type != "cpu":
        return f"the C++ kernels take tensors on the CPU, this one is on {device_type}"
    if dtype not in CPU_DTYPES:
        return f"the C++ kernels take float32, float64, bfloat16 and float16, this tensor is {dtype}"
    return None


def triton_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """None if the Triton kernels can run on such a tensor, else why not."""
    if (reason := gpu.why_not()) is not None:
        return reason
    if device_type != "cuda" and not (device_type == "cpu" and gpu.interpreting()):
        return f"the Triton kernels take tensors on a GPU, this one is on {device_type}"
    if dtype not in gpu.DTYPES:
        return f"the Triton kernels take float32, float64, bfloat16 and float16, this tensor is {dtype}"
    return None


def _refusal(name: str, reason: str) -> str:
    return f"backend {name!r} cannot run: {reason}"


def _tell(device_type: str) -> None:
    # Once, when the reference first stands in for kernels.
    global _told
    _told = True
    reason = cpu.why_not() if device_type == "cpu" else gpu.why_not()
    if reason is not None:
        where = "CPU" if device_type == "cpu" else "GPU"
        logging.getLogger("ecanet").warning("ecanet: plain PyTorch runs on the %s: %s", where, reason)
