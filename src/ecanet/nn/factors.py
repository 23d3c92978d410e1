"""A gate's factor, and whether a tensor in a file holds one."""

import math

import torch
from torch import Tensor

from ecanet.private_torch import FakeTensor

#: Relative differences within which a factor counts as the same: rounding of half types, drift of averaged networks.
_HALF_ROUNDING, _ROUNDING = 2.0**-8, 2.0**-11


def check_factor(factor: float) -> float:
    """A gate's factor as a float.

    Raises:
        TypeError: ``factor`` is not a number.
        ValueError: ``factor`` is not finite and above 0.
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise TypeError(f"factor must be a number, got {factor!r}")
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor must be finite and above 0, got {factor!r}: 1 for a plain gate, 2 for a neutral one")
    return float(factor)


def version_of(t: Tensor) -> float:
    """How often a tensor was written to, or its value where that is not counted."""
    try:
        return t._version
    except RuntimeError:  # an inference tensor counts no versions; use its value instead
        return float(t) if t.is_cpu else -1


def has_no_value(t: Tensor) -> bool:
    """Whether a tensor has only a shape, and no value."""
    return t.is_meta or isinstance(t, FakeTensor)


def is_factor(t: Tensor, factor: float) -> bool:
    """Whether a value is the factor, up to the rounding of half types or of averaged networks."""
    rounding = _HALF_ROUNDING if t.element_size() < 4 else _ROUNDING
    return abs(float(t) - factor) <= rounding * factor


def why_no_factor(t: object) -> str | None:
    """Why a value in a state dict is not a factor; None if it is."""
    if not isinstance(t, Tensor):
        return f"is a {type(t).__name__}"
    if t.numel() != 1 or t.is_complex() or t.dtype is torch.bool:
        return f"has the shape {tuple(t.shape)} and the type {t.dtype}"
    if has_no_value(t):
        return None
    value = float(t)
    return None if math.isfinite(value) and value > 0 else f"is {value:g}"
