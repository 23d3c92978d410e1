"""The stages of ``python -m benchmarks.gpu``, the most valuable first: an early stop then loses least."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from benchmarks.cases import Case, Setup
from benchmarks.gpu.kernels import kernel_cases, tuning_cases
from benchmarks.gpu.networks import network_cases
from benchmarks.gpu.tails import tail_cases


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: Its name in ``--stages``.
        what: A description.
        cases: The cases to time, from ``(quick, compiled, setup)``; none if the stage checks something.
        on_request: Whether it only runs if ``--stages`` names it.
    """

    name: str
    what: str
    cases: Callable[[bool, bool, Setup], Iterator[Case]] = lambda quick, compiled, setup: iter(())
    on_request: bool = False


STAGES = (
    Stage("environment", "card, versions, bandwidth of a copy, a matrix product"),
    Stage("correctness", "every kernel against float64; meanwhile what the next stages run is compiled"),
    Stage(
        "tails",
        "norm, gate, addition, ReLU of ResNet-50's stages, in training and at inference",
        lambda quick, compiled, setup: tail_cases(quick, compiled, setup, "channels_last"),
    ),
    Stage(
        "networks",
        "ResNet-50: images per second and peak memory",
        lambda quick, compiled, setup: network_cases(quick, compiled, setup, True),
    ),
    Stage(
        "kernels",
        "each pass against the bandwidth of a copy",
        lambda quick, compiled, setup: kernel_cases(quick, setup),
    ),
    Stage(
        "more",
        "MobileNetV2, ECA-ResNet-50-D, CUDA graphs, ResNet-101, another batch; contiguous tails",
        lambda quick, compiled, setup: chain(
            network_cases(quick, compiled, setup, False), tail_cases(quick, compiled, setup, "contiguous")
        ),
    ),
    Stage(
        "tuning",
        "each pass in other tiles and with other numbers of warps; only if asked for",
        lambda quick, compiled, setup: tuning_cases(quick, setup),
        on_request=True,
    ),
)
