"""Loads the library of C++ kernels, or says why it cannot."""

import os

import torch

from ecanet.ops.build import LIBRARY, fault
from ecanet.private_torch import has_kernel, why_no_kernels

#: The operations that the library implements; csrc/ops.cpp registers them.
KERNELS = (
    "squeeze",
    "moments",
    "batch_moments",
    "apply",
    "apply_",
    "apply_backward",
    "input_backward",
    "eca_coefficients",
    "eca_coefficients_backward",
    "norm_eca_add_act",
    "norm_eca_add_act_",
)

_reason: str | None = "the C++ kernels are not loaded: import ecanet.ops"


def load() -> None:
    """Load the library. If that fails, :func:`why_not` says why; nothing is raised or printed."""
    global _reason
    reason = why_no_kernels()
    _reason = _load_or_reason() if reason is None else f"the C++ kernels are not loaded: {reason}"


def why_not() -> str | None:
    """None if the kernels are loaded, otherwise one line that says why not and what to do."""
    return _reason


def _load_or_reason() -> str | None:
    if not os.path.lexists(LIBRARY):
        return "the C++ kernels are not built; to build them: ecanet build"
    try:
        problem = fault(LIBRARY)  # checked first: loading a damaged file would kill this process
        if problem is None:
            torch.ops.load_library(LIBRARY)
            problem = _missing_kernels()
    except (OSError, RuntimeError) as error:
        problem = f"cannot be loaded ({str(error.__cause__ or error).splitlines()[0]})"
    return f"the C++ kernels {problem}; to build them again: ecanet build" if problem else None


def _missing_kernels() -> str | None:
    missing = [name for name in KERNELS if not has_kernel(f"ecanet::{name}", "CPU")]
    return f"cannot be used ({LIBRARY} lacks {', '.join(missing)})" if missing else None
