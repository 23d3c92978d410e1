"""Mean and interval of differences that are paired by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T95 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
_T95 += (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass
class Difference:
    """The difference between an entry and another one, paired by seed.

    Attributes:
        mean: Mean of the paired differences.
        low: Lower end of the 95 % interval (Student's t); None with one seed.
        high: Upper end.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_difference(differences: Sequence[float]) -> Difference:
    """Mean and 95 % interval of paired differences by Student's t.

    Args:
        differences: One for each seed.

    Raises:
        ValueError: there are none.

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
    margin = _T95[min(n - 1, len(_T95)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - margin, mean + margin)
