"""The adaptive kernel size of ECA: how many neighbouring channels interact (Eq. 12)."""

import math
from numbers import Integral


def adaptive_kernel_size(channels: int, gamma: float = 2, b: float = 1) -> int:
    """Kernel size k of ECA for a number of channels (Eq. 12): ``k = |log2(C) / gamma + b / gamma|_odd``.

    The value t = (log2(C) + b) / gamma becomes odd as in the released code: |t| is truncated to an integer, and 1 is
    added if that is even. The paper's text, "the odd number nearest to t", gives the same k unless t is negative, which
    it never is with the default gamma and b.

    The released weights have other kernel sizes: see ``kernel_size="released"`` of :mod:`ecanet.models`.

    Args:
        channels: Number of channels C, at least 1.
        gamma: Slope of the mapping, not 0.
        b: Offset of the mapping.

    Returns:
        An odd integer, at least 1: 3 for C = 64, 5 for 128 to 1024, 7 for 2048.

    Raises:
        TypeError: ``channels`` is not an integer.
        ValueError: ``channels`` < 1, or ``gamma`` is 0.

    Example:
        >>> [adaptive_kernel_size(c) for c in (64, 256, 512, 1024, 2048)]
        [3, 5, 5, 5, 7]
    """
    check_channels(channels)
    if gamma == 0:
        raise ValueError("gamma must not be 0: the paper uses 2")
    t = (math.log2(channels) + b) / gamma
    cut = int(abs(t))
    return cut if cut % 2 else cut + 1


def check_channels(channels: int) -> None:
    """Raise unless ``channels`` is an integer of at least 1."""
    if isinstance(channels, bool) or not isinstance(channels, Integral):
        raise TypeError(f"channels must be an integer, got {channels!r}")
    if channels < 1:
        raise ValueError(f"channels must be 1 or more, got {channels}")


def check_kernel_size(kernel_size: int) -> None:
    """Raise unless ``kernel_size`` is a positive odd integer."""
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, Integral):
        raise TypeError(f"kernel_size must be an odd integer, got {kernel_size!r}")
    if kernel_size < 1:
        raise ValueError(f"kernel_size must be a positive odd integer, got {kernel_size}: try 3")
    if kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd, so that the band is centred on its channel, got {kernel_size}: "
            f"try {kernel_size - 1} or {kernel_size + 1}"
        )
