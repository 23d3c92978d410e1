"""What paired seeds can show: differences, intervals, sign-flip tests, Holm's correction, and seeds needed.

Each condition is compared with the first one, the baseline, over the seeds that both have. Nothing here trains.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

try:
    import numpy as np
    from scipy import stats
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.power import TTestPower
except ImportError as error:
    raise ImportError(f"ecanet.study needs {error.name}: pip install 'ecanet[study]'") from error

from ecanet.inspect.paired import Difference, paired_difference

#: Significance level of all tests of a study together, and the power that :func:`seeds_needed` asks for.
LEVEL, POWER = 0.05, 0.8
#: Differences, in units of the metric, for which a summary says how many seeds would show them.
DIFFERENCES = (0.1, 0.3, 1.0)
#: With up to ``_EXACT_SEEDS`` seeds all patterns of signs are counted; with more, ``_DRAWN`` random ones are.
_EXACT_SEEDS, _DRAWN = 20, 99_999
#: Largest number of seeds that :func:`seeds_needed` returns.
_MAX_SEEDS = 1_000_000


@dataclass
class ConditionSummary:
    """One condition over its seeds. Values that need a baseline, or more seeds than there are, are None.

    Attributes:
        seeds: Number of its finished runs for whose seed the baseline has finished, too: only these count.
        mean: Mean of the metric over them.
        std: Sample standard deviation over them.
        difference: Mean difference from the baseline, paired by seed.
        low: Lower end of the 95 % interval of the difference (Student's t).
        high: Upper end.
        p: Two-sided p of the sign-flip test of the difference.
        p_holm: p after Holm's correction over all conditions but the baseline.
        effect: Cohen's d of paired samples (d_z): mean difference over the standard deviation of the differences.
        seeds_needed: How many seeds a study needs to show a difference of each size of :data:`DIFFERENCES`, by
            :func:`seeds_needed` with the spread of these differences. The keys are the sizes as texts.
    """

    seeds: int
    mean: float | None
    std: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    effect: float | None
    seeds_needed: dict[str, int | None]


@dataclass
class Summary:
    """A study in numbers.

    Attributes:
        baseline: The condition that the others are compared with.
        metric: What is compared.
        conditions: By name, the baseline first.
    """

    baseline: str
    metric: str
    conditions: dict[str, ConditionSummary]


def sign_flip_p(differences: Any) -> Any:
    """Two-sided p of the sign-flip test: how often the mean is as large if each difference may change its sign.

    With up to 20 seeds every pattern of signs is counted, and the smallest p is 2^(1 - n). With more, 99,999 random
    patterns are drawn, the same ones each time.

    Args:
        differences: Array (..., n) of one difference for each of n >= 2 seeds.

    Returns:
        Array (...) of p; a single number for differences of shape (n,).

    Raises:
        ValueError: there are fewer than two seeds.

    Example:
        >>> float(sign_flip_p([0.3, 0.1, 0.4, 0.2, 0.5, 0.6]))
        0.03125
    """
    values = np.asarray(differences, dtype=np.float64)
    n = values.shape[-1] if values.ndim else 0
    if n < 2:
        raise ValueError(f"differences must hold two or more seeds, got {n}")
    exact = n <= _EXACT_SEEDS
    test = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        axis=-1,
        n_resamples=np.inf if exact else _DRAWN,
        batch=max(1, 2**22 // values.size),  # 32 MB at a time
        rng=np.random.default_rng(0),
    )
    return test.pvalue


def holm(p: Sequence[float]) -> list[float]:
    """Correct p by Holm's method, so that the chance of any false finding at a level is at most that level.

    Args:
        p: One value for each comparison.
    """
    return [float(value) for value in multipletests(p, method="holm")[1]] if len(p) else []


def smallest_p(seeds: int) -> float:
    """The smallest two-sided p that the sign-flip test can give with n seeds: 2^(1 - n)."""
    return 2.0 ** (1 - seeds)


def fewest_seeds(comparisons: int, level: float = LEVEL) -> int:
    """The fewest seeds with which a comparison can reach a level under Holm's correction.

    Example:
        >>> fewest_seeds(1), fewest_seeds(9)
        (6, 9)
    """
    seeds = 2
    while smallest_p(seeds) > level / max(1, comparisons):
        seeds += 1
    return seeds


def power(effect: float, seeds: int, comparisons: int = 1, level: float = LEVEL) -> float:
    """A lower bound on the chance that a study shows a difference.

    It uses the first and strictest step of Holm's correction, so it holds whether the other conditions differ or not.
    If fewer than eight patterns of signs fit into the level, it is the chance that all seeds agree; otherwise it is the
    power of the paired t-test with one seed fewer.

    Args:
        effect: The true difference, in standard deviations of the paired differences, which are taken as normal.
        seeds: Number of seeds.
        comparisons: Number of conditions without the baseline.
        level: Significance level of all tests together.

    Returns:
        From 0 to 1.
    """
    level /= max(1, comparisons)
    patterns = level / smallest_p(min(seeds, 1000))
    if patterns < 1:
        return 0.0
    all_agree = float(stats.norm.cdf(abs(effect))) ** seeds
    if patterns < 8:
        return all_agree
    # Far out, where the power is 1, the noncentral t distribution cannot be computed.
    t_power = float(TTestPower().power(min(abs(effect), 5.0), seeds - 1, level))
    return max(all_agree, 1.0 if math.isnan(t_power) else t_power)


def seeds_needed(difference: float, spread: float, comparisons: int = 1) -> int | None:
    """How many seeds a study needs to show a difference in 80 of 100 cases.

    Args:
        difference: The true difference, in units of the metric.
        spread: Standard deviation of the paired differences, in the same units.
        comparisons: Number of conditions without the baseline.

    Returns:
        The number of seeds, or None if it is more than a million.

    Raises:
        ValueError: the difference is not above 0, or the spread is below 0.

    Example:
        >>> seeds_needed(0.3, 0.3), seeds_needed(0.3, 0.3, comparisons=9)
        (11, 18)
    """
    if not (difference > 0 and spread >= 0):
        raise ValueError(f"difference must be above 0 and spread 0 or more, got {difference} and {spread}")
    effect = difference / spread if spread else math.inf
    fewest = fewest_seeds(comparisons)
    for seeds in range(fewest, fewest + 4):  # with so few seeds, the power does not always grow with their number
        if power(effect, seeds, comparisons) >= POWER:
            return seeds
    low, high = fewest + 3, _MAX_SEEDS
    if power(effect, high, comparisons) < POWER:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, comparisons) >= POWER else (middle, high)
    return high


def detectable(seeds: int, comparisons: int = 1) -> float | None:
    """The difference that a study shows in 80 of 100 cases, in standard deviations of the paired differences.

    Args:
        seeds: Number of seeds.
        comparisons: Number of conditions without the baseline.

    Returns:
        The difference, or None if the seeds cannot show any, however large.

    Example:
        >>> round(detectable(9), 2), detectable(3)
        (1.16, None)
    """
    if smallest_p(seeds) > LEVEL / max(1, comparisons):
        return None
    low, high = 0.0, 10.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, seeds, comparisons) >= POWER else (middle, high)
    return high


def plan(conditions: int, seeds: int, spread: float | None = None) -> str:
    """Say in words, before a study runs, what it can show with its conditions and seeds.

    Args:
        conditions: Number of conditions with the baseline.
        seeds: Number of seeds of each.
        spread: Standard deviation of the paired differences in units of the metric, if it is known.
    """
    comparisons = conditions - 1
    if comparisons < 1:
        return "One condition: nothing is compared."
    against = f"{comparisons} comparison{'s' if comparisons > 1 else ''} with the baseline"
    need = "need" if comparisons > 1 else "needs"
    difference = detectable(seeds, comparisons)
    if difference is None:
        return (
            f"{_seeds(seeds)} cannot show a difference at {LEVEL}: the smallest p that {_seeds(seeds)} can give is "
            f"{smallest_p(seeds):.2g}, and {against} {need} {LEVEL / comparisons:.2g} or less under Holm's correction, "
            f"which takes {fewest_seeds(comparisons)} seeds."
        )
    size = f"{difference:.2g} standard deviations of the paired differences"
    if spread is not None:
        size += f", {difference * spread:.2g} at the spread seen so far ({spread:.2g})"
    return f"{_seeds(seeds)}, {against}: a difference of {size} is shown in 80 of 100 such studies."


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def summarise(values: Mapping[str, Mapping[int, float]], metric: str) -> Summary:
    """The numbers of a study.

    Args:
        values: The metric of each finished run, by condition (the baseline first) and seed.
        metric: Name of the metric.

    Raises:
        ValueError: there is no condition.
    """
    if not values:
        raise ValueError("values must hold at least one condition, got none")
    baseline, *others = values
    base = values[baseline]
    counted = {name: {seed: value for seed, value in runs.items() if seed in base} for name, runs in values.items()}
    paired = {name: [value - base[seed] for seed, value in counted[name].items()] for name in others}
    p = _p_of_each(paired)
    # A condition with fewer than two seeds has no p yet, but Holm's correction counts it as a comparison.
    untested = [1.0] * (len(others) - len(p))
    corrected = dict(zip(p, holm([*p.values(), *untested]), strict=False))
    return Summary(
        baseline,
        metric,
        {
            name: _summary_of(list(runs.values()), paired.get(name, []), len(others), p.get(name), corrected.get(name))
            for name, runs in counted.items()
        },
    )


def _p_of_each(paired: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The p of each condition with two or more pairs. Those with equally many are tested together, to save time."""
    p_by_name: dict[str, float] = {}
    for n in {len(differences) for differences in paired.values()}:
        names = [name for name, differences in paired.items() if len(differences) == n]
        if n > 1:
            p = sign_flip_p([paired[name] for name in names])
            p_by_name |= dict(zip(names, map(float, p), strict=True))
    return {name: p_by_name[name] for name in paired if name in p_by_name}


def _summary_of(
    values: Sequence[float], differences: Sequence[float], comparisons: int, p: float | None, p_holm: float | None
) -> ConditionSummary:
    difference = paired_difference(differences) if differences else Difference(math.nan, None, None)
    spread = statistics.stdev(differences) if len(differences) > 1 else None
    return ConditionSummary(
        seeds=len(values),
        mean=statistics.fmean(values) if values else None,
        std=statistics.stdev(values) if len(values) > 1 else None,
        difference=difference.mean if differences else None,
        low=difference.low,
        high=difference.high,
        p=p,
        p_holm=p_holm,
        effect=statistics.fmean(differences) / spread if spread else None,
        seeds_needed={
            str(size): None if spread is None else seeds_needed(size, spread, comparisons) for size in DIFFERENCES
        },
    )
