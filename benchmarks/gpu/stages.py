"""What ``python -m benchmarks.gpu`` does, the most valuable first: a cut loses the least."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from benchmarks.cases import Case, On
from benchmarks.gpu.kernels import kernel_cases, tuning_cases
from benchmarks.gpu.networks import network_cases
from benchmarks.gpu.tails import tail_cases


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: For ``--stages``.
        what: In words.
        cases: What is timed: of ``(quick, compiled, on)``; nothing where a stage checks something.
        asked_for: Whether it is left out unless ``--stages`` names it.
    """

    name: str
    what: str
    cases: Callable[[bool, bool, On], Iterator[Case]] = lambda quick, compiled, on: iter(())
    asked_for: bool = False


STAGES = (
    Stage("environment", "card, versions, bandwidth of a copy, a matrix product"),
    Stage("correctness", "every kernel against float64; meanwhile what the next stages run is compiled"),
    Stage(
        "tails",
        "norm, gate, addition, ReLU of ResNet-50's stages, in training and at inference",
        lambda quick, compiled, on: tail_cases(quick, compiled, on, "channels_last"),
    ),
    Stage(
        "networks",
        "ResNet-50: images a second and peak memory",
        lambda quick, compiled, on: network_cases(quick, compiled, on, True),
    ),
    Stage("kernels", "each pass against the bandwidth of a copy", lambda quick, compiled, on: kernel_cases(quick, on)),
    Stage(
        "more",
        "MobileNetV2, ECA-ResNet-50-D, CUDA graphs, ResNet-101, another batch; contiguous tails",
        lambda quick, compiled, on: chain(
            network_cases(quick, compiled, on, False), tail_cases(quick, compiled, on, "contiguous")
        ),
    ),
    Stage(
        "tuning",
        "each pass in other tiles and with other numbers of warps; only if asked for",
        lambda quick, compiled, on: tuning_cases(quick, on),
        asked_for=True,
    ),
)
