"""Mean and interval of differences that are paired by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Difference:
    """The mean of differences that are paired by seed, with its interval.

    Attributes:
        mean: Mean of the paired differences.
        low: Lower end of the 95 % interval (Student's t); None with one seed.
        high: Upper end.
    """

    mean: float
    low: float | None
    high: float | None


def paired_difference(differences: Sequence[float]) -> Difference:
    """Mean and 95 % interval of paired differences by Student's t.

    Args:
        differences: One for each seed.

    Raises:
        ValueError: there are none.
        ImportError: scipy is missing.

    Example:
        >>> d = paired_difference([1.0, 2.0, 3.0])
        >>> d.mean, round(d.low, 2), round(d.high, 2)
        (2.0, -0.48, 4.48)
    """
    if not differences:
        raise ValueError("differences must hold at least one value, got none")
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Difference(mean, None, None)
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("intervals of paired differences need scipy: pip install 'ecanet[plot]'") from error
    margin = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - margin, mean + margin)
