"""Checks before timing (the environment, and whether competitors agree), CUDA graphs, and times of GPU kernels."""

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ecanet.profile.turns import Competitor


def fault_of_environment(threads: int, environment: Mapping[str, str], cores: int) -> str | None:
    """None if OpenMP is set so that ``threads`` can be measured; otherwise what is wrong and what to set.

    With OpenMP's defaults two threads may land on one core; every parallel region then waits for the scheduler, 8 ms.
    """
    set_to = environment.get("OMP_NUM_THREADS")
    if threads > cores:
        return f"{threads} threads on {cores} cores measure the scheduler: use --threads {cores}"
    if threads == 1 and set_to != "1":
        return (
            f"OMP_NUM_THREADS is {set_to or 'unset'}; to measure one thread: OMP_NUM_THREADS=1 python -m benchmarks.cpu"
        )
    if threads > 1 and environment.get("OMP_PROC_BIND", "").lower() != "true":
        return (
            "without OMP_PROC_BIND=true two threads may share a core: "
            f"OMP_PROC_BIND=true OMP_NUM_THREADS={threads} python -m benchmarks.cpu --threads {threads}"
        )
    if threads > 1 and set_to not in (None, str(threads)):
        return f"OMP_NUM_THREADS is {set_to}: set it to {threads}, or leave it unset"
    return None


def replayed(competitor: Competitor) -> Competitor:
    """The competitor captured in a CUDA graph: a call replays the recorded work of the GPU."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with competitor.context():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: a first call allocates and compiles
            for _ in range(2):
                competitor.run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            competitor.run()
    return Competitor(graph.replay)


def kernel_seconds(competitor: Competitor) -> dict[str, float]:
    """Seconds of each kernel that a call launches, by the GPU's own profiler; the median of five calls."""
    from torch.profiler import ProfilerActivity, profile

    seconds: dict[str, list[float]] = {}
    with competitor.context():
        competitor.run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(5):
                competitor.run()
            torch.cuda.synchronize()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            seconds.setdefault(event.name[:60], []).append(event.device_time / 1e6)
    return {name: float(f"{statistics.median(times):.4g}") for name, times in seconds.items()}


def check_agreement(
    competitors: Mapping[str, Competitor], names: Sequence[str], tolerance: float, poison_bytes: int = 0
) -> None:
    """Run each of ``names`` once; a benchmark of a wrong result would be worthless.

    Args:
        competitors: By name.
        names: Those that compute the same; the first is the reference.
        tolerance: Euclidean norm of the difference, relative to that of the reference. Not the largest difference: a
            sum of nearly 0 before a ReLU may round to either side, and one gradient then passes or not.
        poison_bytes: Bytes of the GPU's memory that are set to NaN before each runs, so that unwritten outputs show.

    Raises:
        RuntimeError: one disagrees with the reference.
    """
    expected: tuple[Tensor, ...] | None = None
    for name in names:
        if poison_bytes:
            _poison(poison_bytes)
        with competitors[name].context():
            outputs = competitors[name].run()
        assert outputs is not None
        values = tuple(t.detach().float().clone() for t in ((outputs,) if isinstance(outputs, Tensor) else outputs))
        if expected is None:
            expected = values
        for i, (a, b) in enumerate(zip(values, expected, strict=True)):
            error, size = (a - b).norm().item(), b.norm().item()
            if not error <= tolerance * size:  # NaN is an error too
                raise RuntimeError(f"{name} and {names[0]} disagree: output {i} is {size:.3g}, off by {error:.2g}")


def _poison(size: int) -> None:
    """Let what torch allocates next on the GPU hold NaN, in any floating-point type."""
    torch.cuda.empty_cache()
    torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
