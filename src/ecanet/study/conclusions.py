"""What a study says: a table of its numbers, and sentences that never say more than these."""

import math
from collections.abc import Sequence

from ecanet.study.statistics import DIFFERENCES, LEVEL, ConditionSummary, Summary, detectable, fewest_seeds, plan


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table: the first is its head, the first column stands left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary_table(summary: Summary) -> str:
    """One row for each condition: mean and spread, the difference from the baseline with its interval, and its p."""
    rows = [["condition", "seeds", summary.metric, "spread", "difference", "95 % interval", "p", "p (Holm)"]]
    for name, row in summary.conditions.items():
        margin = None if row.low is None or row.high is None else (row.high - row.low) / 2
        ends = [end for end in (row.low, row.high) if end is not None]
        rows.append(
            [
                name,
                str(row.seeds),
                *("-" if value is None else _shown(value, row.std) for value in (row.mean, row.std)),
                "-" if row.difference is None else _shown(row.difference, margin, "+"),
                " to ".join(_shown(end, margin, "+") for end in ends) or "-",
                *("-" if p is None else f"{p:.2g}" for p in (row.p, row.p_holm)),
            ]
        )
    return aligned(rows)


def verdict(summary: Summary) -> str:
    """What the differences show, in words: a line for each condition but the baseline, then what limits them all.

    A difference is said to be shown where its 95 % interval excludes zero and its p of the sign-flip test is at most
    0.05 after Holm's correction.
    """
    others = {name: row for name, row in summary.conditions.items() if name != summary.baseline}
    lines = [_sentence(name, summary.baseline, row, len(others)) for name, row in others.items()]
    fewest = min((row.seeds for row in others.values()), default=0)
    if fewest and detectable(fewest, len(others)) is None:
        lines.append(plan(len(summary.conditions), fewest))
    if fewest == 1:
        lines.append("One seed gives no spread: run at least three before reading anything into a difference.")
    elif fewest > 1:
        lines.append("Each interval covers the true difference in 95 of 100 such studies.")
    return "\n".join(lines)


def next_step(summary: Summary) -> str:
    """What to run next, in a sentence: more seeds where a difference may have been missed, otherwise nothing."""
    others = [row for name, row in summary.conditions.items() if name != summary.baseline]
    fewest, seeds = fewest_seeds(len(others)), min((row.seeds for row in others), default=0)
    go_on = "the same command with --seeds {}; finished runs are not repeated"
    if others and seeds < fewest:
        return f"next: {go_on.format(fewest)}, and fewer can show nothing"
    open_ones = [row for row in others if not is_shown(row)]
    for size in sorted(DIFFERENCES, reverse=True):
        needed = max((row.seeds_needed[str(size)] or 0 for row in open_ones), default=0)
        if needed > seeds:
            return f"next: {go_on.format(needed)}, and a difference of {size:g} is shown in 80 of 100 cases"
    return "next: the networks of the conditions are in the folder runs, for ecanet validate and ecanet predict"


def is_shown(row: ConditionSummary) -> bool:
    """Whether the interval of a difference excludes zero and its p is at most 0.05 after Holm's correction."""
    if row.low is None or row.high is None or row.p_holm is None:
        return False
    return not row.low <= 0 <= row.high and row.p_holm <= LEVEL


def said_of_the_same(groups: Sequence[Sequence[str]]) -> list[str]:
    """A sentence for each group of conditions that are the same under several names."""
    return [
        f"{' and '.join(names)} are the same: all but one of them take time and seeds, and can show nothing."
        for names in groups
        if len(names) > 1
    ]


def _sentence(name: str, baseline: str, row: ConditionSummary, comparisons: int) -> str:
    if row.difference is None:
        return f"{name}: no seed finished both with it and with {baseline}."
    side = "above" if row.difference >= 0 else "below"
    if row.low is None or row.high is None or row.p is None or row.p_holm is None:
        return f"{name} is {_shown(abs(row.difference), None)} {side} {baseline} with 1 seed."
    margin = (row.high - row.low) / 2
    numbers = f"95 % interval {_shown(row.low, margin, '+')} to {_shown(row.high, margin, '+')}, {row.seeds} seeds"
    numbers += f", p {row.p:.2g}" + (f", {row.p_holm:.2g} after Holm's correction" if comparisons > 1 else "")
    size = f"{name} is {_shown(abs(row.difference), margin)} {side} {baseline} ({numbers})"
    if row.low <= 0 <= row.high:
        return f"{size}: the interval includes zero, so no difference is shown."
    if row.p_holm > LEVEL:
        return f"{size}: the interval lies {side} zero, but p is above {LEVEL}, so no difference is shown."
    return f"{size}: it is {'higher' if row.difference > 0 else 'lower'} on this data."


def _shown(value: float, margin: float | None, sign: str = "") -> str:
    """A number with two digits of its margin, unless that is rounding, and two decimals at least."""
    digits = max(2, 1 - math.floor(math.log10(margin))) if margin and margin > 1e-9 * abs(value) else 2
    return f"{value:{sign}.{digits}f}"
