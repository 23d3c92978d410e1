"""What a comparison says, in a table and in words: accuracy with its spread, and what a gate costs."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ecanet.inspect import gate_parameters, multiply_adds
from ecanet.study.comparison import Comparison
from ecanet.study.statistics import LEVEL, ConditionSummary, Summary, detectable, plan


@dataclass
class Cost:
    """What one training step of an entry costs.

    Attributes:
        parameters: Parameters of its gates.
        multiply_adds: Multiply-adds of the gates for one image.
        seconds: Median time of a training step (forward, backward, SGD) on one thread.
    """

    parameters: int
    multiply_adds: int
    seconds: float


def measure_costs(
    networks: Mapping[str, nn.Module], image_size: int = 28, batch_size: int = 128, rounds: int = 20
) -> dict[str, Cost]:
    """Parameters, multiply-adds and time that gates add to a network.

    The networks take turns, one training step in each round, in one process on one thread, so that other load on the
    machine affects all of them. Compare these times only with one another.

    Args:
        networks: Networks by name; the first is the plain one for comparison. They are trained a little: pass copies.
        image_size: Side of the input, in pixels.
        batch_size: Images in a step.
        rounds: Steps of each network, after two for warm-up.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _step_seconds(networks, image_size, batch_size, rounds)
    finally:
        torch.set_num_threads(threads)
    shape = (1, 3, image_size, image_size)
    work = {name: multiply_adds(network, shape) for name, network in networks.items()}
    plain = next(iter(work.values()))
    return {
        name: Cost(gate_parameters(network), work[name] - plain, seconds[name]) for name, network in networks.items()
    }


def _step_seconds(networks: Mapping[str, nn.Module], image_size: int, batch_size: int, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    labels = torch.randint(0, 10, (batch_size,), generator=generator)
    optimizers = {name: torch.optim.SGD(network.parameters(), 0.01) for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds + 2):
        for name, network in networks.items():
            start = time.perf_counter()
            F.cross_entropy(network.train()(images), labels).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def table(comparison: Comparison, costs: Mapping[str, Cost]) -> str:
    """One row for each entry: accuracy and spread, difference from the baseline with its interval, and costs."""
    header = ["gate", "top-1 %", "spread", "difference", "95 % interval", "params +", "MAdds +", "ms/step", "time"]
    rows = [header]
    plain = costs[comparison.baseline].seconds
    for entry in comparison.runs:
        spread, difference, cost = comparison.spread(entry), comparison.difference(entry), costs[entry]
        is_baseline = entry == comparison.baseline
        interval = "-" if difference.low is None else f"{difference.low:+.2f} to {difference.high:+.2f}"
        rows.append(
            [
                entry,
                f"{comparison.mean(entry):.2f}",
                "-" if spread is None else f"{spread:.2f}",
                "-" if is_baseline else f"{difference.mean:+.2f}",
                "-" if is_baseline else interval,
                f"{cost.parameters:,}",
                f"{cost.multiply_adds:,}",
                f"{1000 * cost.seconds:.1f}",
                f"x {cost.seconds / plain:.2f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def verdict(summary: Summary) -> str:
    """What the differences show, in words: a line for each condition but the baseline, then what limits them all.

    A difference is said to be shown where its 95 % interval excludes zero and its p of the sign-flip test is at most
    0.05 after Holm's correction.
    """
    others = {name: row for name, row in summary.conditions.items() if name != summary.baseline}
    lines = [_sentence(name, summary.baseline, row, len(others)) for name, row in others.items()]
    fewest = min((row.seeds for row in others.values()), default=0)
    if others and detectable(fewest, len(others)) is None:
        lines.append(plan(len(summary.conditions), fewest))
    if fewest == 1:
        lines.append("One seed gives no spread: run at least three before reading anything into a difference.")
    elif fewest > 1:
        lines.append("Each interval covers the true difference in 95 of 100 such studies.")
    return "\n".join(lines)


def _sentence(name: str, baseline: str, row: ConditionSummary, comparisons: int) -> str:
    if row.difference is None:
        return f"{name}: no seed finished both with it and with {baseline}."
    side = "above" if row.difference >= 0 else "below"
    if row.low is None or row.high is None or row.p is None or row.p_holm is None:
        return f"{name} is {_shown(row.difference, None)} {side} {baseline} with 1 seed."
    margin = (row.high - row.low) / 2
    numbers = f"95 % interval {_shown(row.low, margin, '+')} to {_shown(row.high, margin, '+')}, {row.seeds} seeds"
    numbers += f", p {row.p:.2g}" + (f", {row.p_holm:.2g} after Holm's correction" if comparisons > 1 else "")
    size = f"{name} is {_shown(row.difference, margin)} {side} {baseline} ({numbers})"
    if row.low <= 0 <= row.high:
        return f"{size}: the interval includes zero, so no difference is shown."
    if row.p_holm > LEVEL:
        return f"{size}: the interval lies {side} zero, but p is above {LEVEL}, so no difference is shown."
    return f"{size}: it is {'higher' if row.difference > 0 else 'lower'} on this data."


def _shown(value: float, margin: float | None, sign: str = "") -> str:
    """A number with two digits of its margin, and two decimals at least; without a sign, its size."""
    digits = max(2, 1 - math.floor(math.log10(margin))) if margin else 2
    return f"{value if sign else abs(value):{sign}.{digits}f}"
