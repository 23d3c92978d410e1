"""Take turns on one machine: time several calls A B A B ..., and compare their medians."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

#: Calls shorter than this get an untimed call before each turn, which then costs little.
_SHORT_CALL_SECONDS = 0.1
_RESAMPLES = 1000
Outputs = Tensor | tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Competitor:
    """One implementation.

    Attributes:
        run: The call that is timed. Its return value is dropped, so that its memory is free for the next call.
        context: Entered before each turn, outside the timed part.
    """

    run: Callable[[], Outputs]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """The time of one competitor.

    Attributes:
        seconds: Seconds of one call, for every round.
        calls: Number of calls in a turn.
        page_faults: Minor page faults of a call: memory that the allocator returned to the system and fetched again;
            None on systems that do not count them, such as Windows.
    """

    seconds: tuple[float, ...]
    calls: int
    page_faults: float | None


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians.

    Attributes:
        value: The ratio.
        low: Lower end of its 95 % interval, from resampling the rounds.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def take_turns(
    competitors: Mapping[str, Competitor],
    rounds: int,
    turn_seconds: float = 0.01,
    on_round: Callable[[int], object] = lambda _: None,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time the competitors A B A B ..., so that other load on the machine affects all of them.

    A turn has enough calls to last ``turn_seconds``, or a single longer call. Before short calls an untimed one runs,
    so that each competitor finds the caches as its own call leaves them, not as its predecessor's.

    Args:
        competitors: Competitors by name. Each must have run at least once, so that what a first call compiles or
            allocates is not timed.
        rounds: Turns of each competitor.
        turn_seconds: Shortest duration of a turn, in seconds.
        on_round: Called after each round with the number of rounds done.
        device: ``cuda`` measures time by events of the GPU, anything else by the clock of the CPU.
    """
    calls, short = {}, {}
    for name, competitor in competitors.items():
        calls[name], seconds = _calibrate(competitor, turn_seconds, device)
        short[name] = seconds < _SHORT_CALL_SECONDS
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    faults: dict[str, list[int | None]] = {name: [] for name in competitors}
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for name, competitor in competitors.items():
                seconds, count = _turn(competitor, calls[name], short[name], device)
                samples[name].append(seconds / calls[name])
                faults[name].append(count)
            on_round(i + 1)
    finally:
        if was_enabled:
            gc.enable()
    return {
        name: Timing(tuple(samples[name]), calls[name], _median_per_call(faults[name], calls[name]))
        for name in competitors
    }


def _calibrate(competitor: Competitor, turn_seconds: float, device: str) -> tuple[int, float]:
    """The number of calls in a turn, and the seconds of a call."""
    calls = 1
    seconds, _ = _turn(competitor, calls, False, device)
    if seconds >= _SHORT_CALL_SECONDS:
        return calls, seconds
    while (seconds := _turn(competitor, calls, True, device)[0]) < turn_seconds:
        calls = max(2 * calls, math.ceil(1.1 * calls * turn_seconds / seconds))
    return calls, seconds / calls


def _median_per_call(faults: Sequence[int | None], calls: int) -> float | None:
    counts = [count for count in faults if count is not None]
    return statistics.median(counts) / calls if counts else None


def _page_faults() -> int | None:
    """Minor page faults of this process since it began; None if the system does not count them."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _turn(competitor: Competitor, calls: int, settle: bool, device: str) -> tuple[float, int | None]:
    """Seconds and page faults of a turn; ``settle`` runs an untimed call first."""
    run = competitor.run
    clock = _gpu_clock if device == "cuda" else _cpu_clock
    with competitor.context():
        if settle:
            run()
        stop = clock()
        before = _page_faults()
        for _ in range(calls):
            run()
        seconds, after = stop(), _page_faults()
        return seconds, None if before is None or after is None else after - before


def _cpu_clock() -> Callable[[], float]:
    """Start a clock and return a function that gives the seconds since then."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def _gpu_clock() -> Callable[[], float]:
    """The same by two events of the GPU: time of the CPU counts only where the GPU waits for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()

    def stop() -> float:
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return stop


def ratio_of_medians(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """``median(a) / median(b)`` with its interval, for a and b that were measured in the same rounds.

    Example:
        >>> ratio_of_medians([1.0, 1.0, 9.0], [2.0, 2.0, 2.0]).value
        0.5
    """
    return geometric_mean_of_ratios([(a, b)])


def geometric_mean_of_ratios(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Ratio:
    """Geometric mean over ratios of medians, such as one for every shape."""
    resampled = [_resampled_ratios(tuple(a), tuple(b), seed) for seed, (a, b) in enumerate(pairs)]
    means = sorted(geometric_mean(draw) for draw in zip(*resampled, strict=True))
    value = geometric_mean([statistics.median(a) / statistics.median(b) for a, b in pairs])
    tail = len(means) // 40  # 2.5 % on either side
    return Ratio(value, means[tail], means[-1 - tail])


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of positive values.

    Example:
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


@cache  # the file, the tables and the verdicts need the same ratios
def _resampled_ratios(a: tuple[float, ...], b: tuple[float, ...], seed: int) -> list[float]:
    """Ratios of medians over rounds drawn with replacement. A round is drawn for both, as load slows down both."""
    generator, rounds = random.Random(seed), range(len(a))
    ratios = []
    for _ in range(_RESAMPLES):
        drawn = generator.choices(rounds, k=len(a))
        ratios.append(statistics.median([a[i] for i in drawn]) / statistics.median([b[i] for i in drawn]))
    return ratios
