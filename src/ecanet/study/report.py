"""A comparison as a text table: accuracy with its spread, and what a gate costs."""

from collections.abc import Mapping

from ecanet.study.comparison import Comparison
from ecanet.study.costs import Cost
from ecanet.text_table import text_table


def table(comparison: Comparison, costs: Mapping[str, Cost]) -> str:
    """One row for each condition: accuracy and spread, difference from the baseline with its interval, and costs."""
    header = ["gate", "top-1 %", "spread", "difference", "95 % interval", "params +", "MAdds +", "ms/step", "time"]
    rows = [header]
    baseline_seconds = costs[comparison.baseline].seconds
    for condition in comparison.runs:
        spread, difference, cost = comparison.spread(condition), comparison.difference(condition), costs[condition]
        is_baseline = condition == comparison.baseline
        interval = "-" if difference.low is None else f"{difference.low:+.2f} to {difference.high:+.2f}"
        rows.append(
            [
                condition,
                f"{comparison.mean(condition):.2f}",
                "-" if spread is None else f"{spread:.2f}",
                "-" if is_baseline else f"{difference.mean:+.2f}",
                "-" if is_baseline else interval,
                f"{cost.parameters:,}",
                f"{cost.multiply_adds:,}",
                f"{1000 * cost.seconds:.1f}",
                f"x {cost.seconds / baseline_seconds:.2f}",
            ]
        )
    return text_table(rows)
