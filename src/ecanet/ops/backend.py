"""Which implementation of an operation runs: plain PyTorch (the reference) or the C++ kernels."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ecanet.ops import cpu

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
        name: ``"auto"`` takes the C++ kernels for tensors they can run on and the reference for the others;
            ``"reference"`` is plain PyTorch, anywhere; ``"cpu"`` is the C++ kernels or an error that says why not;
            ``"triton"`` has no kernels in this version.

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
    """The implementation for one feature map, ``"reference"`` or ``"cpu"``.

    Raises:
        RuntimeError: the implementation that :func:`backend` or ``ECANET_BACKEND`` asks for cannot run on ``x``.
    """
    if _choice in ("auto", "cpu") and x.is_cpu and x.dtype in CPU_DTYPES and cpu.why_not() is None:
        return "cpu"  # first, and without a look at anything else: small maps take no longer than such questions
    if _choice == "reference":
        return "reference"
    if _choice == "triton":
        raise RuntimeError(_refusal("triton", triton_reason()))
    device_type = x.device.type
    if _choice == "cpu":
        raise RuntimeError(_refusal("cpu", str(cpu_reason(device_type, x.dtype))))
    if not _told and device_type == "cpu" and not torch.compiler.is_compiling():
        _tell()
    return "reference"


def reason_against(name: str) -> str | None:
    """None if the named choice can run on this machine, on some tensor at least; else why not."""
    if name == "cpu":
        return cpu.why_not()
    if name == "triton":
        return triton_reason()
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


def triton_reason() -> str:
    """Why the Triton kernels cannot run."""
    return "this version of ecanet has no Triton kernels"


def _refusal(name: str, reason: str) -> str:
    return f"backend {name!r} cannot run: {reason}"


def _tell() -> None:
    # Once, when the reference first stands in for the kernels; whoever works on a GPU alone never sees it.
    global _told
    _told = True
    if (reason := cpu.why_not()) is not None:
        logging.getLogger("ecanet").warning("ecanet: plain PyTorch runs on the CPU: %s", reason)
