"""What a study shows: a table of its numbers, and sentences that claim no more than the numbers do."""

import math
from collections.abc import Sequence

from ecanet.study.statistics import DIFFERENCES, LEVEL, ConditionSummary, Summary, detectable, fewest_seeds, plan
from ecanet.text_table import text_table
from ecanet.untrusted import listed

#: A headline names up to this many conditions; of more it gives the number.
_MAX_NAMES = 6
#: A number with more digits than this before or after the point is written with an exponent.
_MAX_DIGITS = 9


def summary_table(summary: Summary) -> str:
    """A text table, one row for each condition: mean, spread, difference from the baseline, its interval and p."""
    rows = [["condition", "seeds", summary.metric, "spread", "difference", "95 % interval", "p", "p (Holm)"]]
    for name, row in summary.conditions.items():
        margin = None if row.low is None or row.high is None else (row.high - row.low) / 2
        ends = [end for end in (row.low, row.high) if end is not None]
        rows.append(
            [
                name,
                str(row.seeds),
                *("-" if value is None else shown_number(value, row.std) for value in (row.mean, row.std)),
                "-" if row.difference is None else shown_number(row.difference, margin, "+"),
                " to ".join(shown_number(end, margin, "+") for end in ends) or "-",
                *("-" if p is None else f"{p:.2g}" for p in (row.p, row.p_holm)),
            ]
        )
    return text_table(rows)


def verdict(summary: Summary) -> str:
    """What the differences show, in words: the lines of :func:`verdict_lines`."""
    return "\n".join(verdict_lines(summary))


def verdict_lines(summary: Summary) -> list[str]:
    """What the differences show, in words: a line for each condition but the baseline, then the limits of the study.

    A difference counts as shown if its 95 % interval excludes zero and the p of its sign-flip test is at most 0.05
    after Holm's correction.
    """
    others = {name: row for name, row in summary.conditions.items() if name != summary.baseline}
    lines = [_sentence(name, summary.baseline, row, len(others)) for name, row in others.items()]
    seeds = {row.seeds for row in others.values()} - {0}
    if seeds and detectable(min(seeds), len(others)) is None:
        lines.append(plan(len(summary.conditions), min(seeds)))
    if 1 in seeds:
        lines.append("One seed gives no spread, so nothing can be read into its difference.")
    if seeds - {1}:
        lines.append("Each interval covers the true difference in 95 of 100 such studies.")
    return lines


def headline(summary: Summary) -> str:
    """The verdict in one line: which conditions differ from the baseline by the rule of :func:`verdict_lines`."""
    rows = {name: row for name, row in summary.conditions.items() if name != summary.baseline}
    if not rows:
        return "One condition: nothing is compared."
    differ = {name: row.difference or 0.0 for name, row in rows.items() if is_shown(row)}
    if not differ:
        return f"No difference from {summary.baseline} is shown in {summary.metric}."
    sides = {
        side: [name for name, difference in differ.items() if (difference > 0) == (side == "higher")]
        for side in ("higher", "lower")
    }
    parts = [f"{side} with {_together(names)}" for side, names in sides.items() if names]
    return f"Compared with {summary.baseline}, {summary.metric} is {', and '.join(parts)}."


def _together(names: Sequence[str]) -> str:
    return "; ".join(names) if len(names) <= _MAX_NAMES else f"{len(names)} of the conditions"


def next_step(summary: Summary, seeds_given: Sequence[int]) -> str:
    """What to do next, in a sentence: run more seeds if a difference may have been missed, otherwise use the networks.

    Args:
        summary: What a study found.
        seeds_given: The seeds that it was given. For each that does not count because a run failed, one more is asked
            for.
    """
    others = [row for name, row in summary.conditions.items() if name != summary.baseline]
    fewest, seeds = fewest_seeds(len(others)), min((row.seeds for row in others), default=0)
    by_number = list(seeds_given) == list(range(len(seeds_given)))
    go_on = (
        f"the same command with {'--seeds {}' if by_number else '{} seeds in its file'}; finished runs are not repeated"
    )
    failed = len(seeds_given) - seeds
    empty = [name for name, row in summary.conditions.items() if seeds_given and not row.seeds]
    if empty:  # more seeds would fail, too; without the baseline no condition has a seed that counts
        names = summary.baseline if summary.baseline in empty else listed(empty)
        return (
            f"next: mend what makes every run of {names} fail, delete the files of the failed runs in the folder runs, "
            "and run the same command again"
        )
    if others and seeds < fewest:
        return f"next: {go_on.format(fewest + failed)}, and fewer can show nothing"
    undecided = [row for row in others if not is_shown(row)]
    for size in sorted(DIFFERENCES, reverse=True):
        needed = max((row.seeds_needed[str(size)] or 0 for row in undecided), default=0)
        if needed > seeds:
            return f"next: {go_on.format(needed + failed)}, and a difference of {size:g} is shown in 80 of 100 cases"
    return "next: the networks of the conditions are in the folder runs, for ecanet validate and ecanet predict"


def is_shown(row: ConditionSummary) -> bool:
    """Whether the 95 % interval of a difference excludes zero and its p is at most 0.05 after Holm's correction."""
    if row.low is None or row.high is None or row.p_holm is None:
        return False
    return not row.low <= 0 <= row.high and row.p_holm <= LEVEL


def notes_on_duplicates(groups: Sequence[Sequence[str]]) -> list[str]:
    """A sentence for each group of conditions that are the same under several names."""
    return [
        f"{' and '.join(names)} are the same: all but one of them take time and seeds, and can show nothing."
        for names in groups
        if len(names) > 1
    ]


def _sentence(name: str, baseline: str, row: ConditionSummary, comparisons: int) -> str:
    if row.difference is None:
        return f"{name}: no seed has finished runs of both {name} and {baseline}."
    side = "above" if row.difference >= 0 else "below"
    if row.low is None or row.high is None or row.p is None or row.p_holm is None:
        return f"{name} is {shown_number(abs(row.difference), None)} {side} {baseline} with 1 seed."
    margin = (row.high - row.low) / 2
    low, high = shown_number(row.low, margin, "+"), shown_number(row.high, margin, "+")
    numbers = f"95 % interval {low} to {high}, {row.seeds} seeds"
    numbers += f", p {row.p:.2g}" + (f", {row.p_holm:.2g} after Holm's correction" if comparisons > 1 else "")
    size = f"{name} is {shown_number(abs(row.difference), margin)} {side} {baseline} ({numbers})"
    if is_shown(row):
        return f"{size}: it is {'higher' if row.difference > 0 else 'lower'} on this data."
    if row.low <= 0 <= row.high:
        return f"{size}: the interval includes zero, so no difference is shown."
    which = "p after the correction" if comparisons > 1 else "p"
    return f"{size}: the interval lies {side} zero, but {which} is above {LEVEL}, so no difference is shown."


def shown_number(value: float, margin: float | None, sign: str = "") -> str:
    """Write a number with at least two decimals, and as many as its margin needs for two significant digits.

    A margin that is mere rounding error is ignored. A number that would take more than nine digits before or after the
    point has an exponent.

    Args:
        value: The number.
        margin: How far from it the truth may be, or None.
        sign: "+" to write the sign of positive numbers, too.
    """
    digits = max(2, 1 - math.floor(math.log10(margin))) if margin and margin > 1e-9 * abs(value) else 2
    precision = f".{digits}f" if digits <= _MAX_DIGITS and abs(value) < 10**_MAX_DIGITS else ".6g"
    return f"{value:{sign}{precision}}"
