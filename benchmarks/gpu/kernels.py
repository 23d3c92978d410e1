"""Every pass over a map against a copy's bandwidth, and the small operations between the passes."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.cases import MEMORY_FORMATS, OPS, STAGES, Case, Setup, Work, op_arguments
from ecanet.ops import coefficients, gpu, gpu_maps
from ecanet.profile.turns import Competitor

#: Maps of 103 and 205 MB in bfloat16: ResNet-50's stages, and the largest map of a stem.
SHAPES = (*((128, *stage) for stage in STAGES[:2]), *((512, *stage) for stage in STAGES[2:]), (128, 64, 112, 112))
QUICK_SHAPES = ((2, 16, 6, 6), (2, 32, 3, 3))
#: Operations on (N, C) numbers; there is no copy to compare with.
SMALL_OPS = ("eca_coefficients", "eca_coefficients_backward")
#: Elements of a tile and warps that replace ``gpu_maps.SIZES``.
_CONFIGURATIONS = ((1024, 1), (2048, 1), (1024, 2), (2048, 2), (1024, 4), (2048, 4), (4096, 4), (4096, 8))
_TUNED_SHAPES = ((128, 256, 56, 56), (512, 2048, 7, 7))
#: Bytes to be read between two uses of a tensor: twice the largest cache of today's GPUs.
_NOT_CACHED = 2**28


def sets_of(map_bytes: int, maps: int) -> int:
    """How many sets of ``maps`` maps are needed so that no set is still in the cache when it is used again."""
    return max(1, -(-_NOT_CACHED // (maps * map_bytes))) if map_bytes > 2**20 else 1


def kernel_cases(quick: bool, setup: Setup) -> Iterator[Case]:
    """Passes by layout and size, then the small operations.

    Args:
        quick: Tiny shapes.
        setup: Device and type.
    """
    shapes = QUICK_SHAPES if quick else SHAPES
    for name in OPS:
        for memory_format in MEMORY_FORMATS:
            for shape in shapes:
                build = partial(_pass, name, setup, shape, memory_format)
                yield Case("op", name, shape, memory_format, build, setup.device)
    for name in SMALL_OPS:
        for small in dict.fromkeys(shape[:2] for shape in shapes):
            yield Case("op", name, small, "contiguous", partial(_small, name, setup, small), setup.device)


def _pass(
    name: str, setup: Setup, shape: tuple[int, ...], memory_format: str, only: Collection[str] | None = None
) -> Work:
    torch.manual_seed(0)
    op = getattr(gpu, name)
    first = op_arguments(name, setup, shape, memory_format)
    map_bytes, maps = first[0].nbytes, OPS[name]
    count = sets_of(map_bytes, maps)
    sets = [first, *(op_arguments(name, setup, shape, memory_format) for _ in range(count - 1))]
    competitors = {"ecanet": Competitor(_all([partial(op, *arguments) for arguments in sets]), torch.no_grad)}
    if only is None:
        pairs = [(first[0].clone(), torch.empty_like(first[0])) for _ in range(count)]
        copies = [partial(target.copy_, source) for source, target in pairs]
        competitors["copy"] = Competitor(_all(copies), torch.no_grad)
    return Work(competitors, (), setup.tolerance, maps, map_bytes, sets=count, replayed=True)


def tuning_cases(quick: bool, setup: Setup) -> Iterator[Case]:
    """Each pass in tiles of several sizes and with several numbers of warps; "ecanet" has the library's own.

    Args:
        quick: Tiny shapes, two tiles.
        setup: Device and type.
    """
    shapes = QUICK_SHAPES[:1] if quick else _TUNED_SHAPES
    configurations = _CONFIGURATIONS[:2] if quick else _CONFIGURATIONS
    for name in OPS:
        for memory_format in MEMORY_FORMATS:
            for shape in shapes:
                build = partial(_tuned, name, configurations, setup, shape, memory_format)
                yield Case("tuning", name, shape, memory_format, build, setup.device)


def _tuned(
    name: str,
    configurations: tuple[tuple[int, int], ...],
    setup: Setup,
    shape: tuple[int, ...],
    memory_format: str,
    only: Collection[str] | None = None,
) -> Work:
    work = _pass(name, setup, shape, memory_format)
    ours = work.competitors["ecanet"].run
    others = {str(sizes): Competitor(ours, partial(_configured, sizes)) for sizes in configurations}
    return replace(work, competitors={**work.competitors, **others})


@contextmanager
def _configured(sizes: tuple[int, int]) -> Iterator[None]:
    same = {key: gpu_maps.Size(*sizes) for key in gpu_maps.SIZES}
    with torch.no_grad(), patch.object(gpu_maps, "SIZES", same):
        yield


def _all(runs: list[Callable[[], Any]]) -> Callable[[], None]:
    """A function that calls all of them."""

    def run() -> None:
        for one in runs:
            one()

    return run


def _small(name: str, setup: Setup, shape: tuple[int, int], only: Collection[str] | None = None) -> Work:
    torch.manual_seed(0)
    channels = shape[1]
    means, p, q = (torch.randn(shape, device=setup.device) for _ in range(3))
    weight, bias = torch.rand(channels, device=setup.device) + 0.5, torch.randn(channels, device=setup.device)
    kernel = torch.randn(5, device=setup.device)
    norm_and_band = means.mean(0), torch.ones_like(weight), weight, bias, 1e-5, kernel, False
    arguments: tuple[Any, ...] = (means, *norm_and_band)
    if name == "eca_coefficients_backward":
        gate, positions = coefficients.eca_coefficients(*arguments)[1], 49
        arguments = (p, q, means, gate, None, *norm_and_band, positions)
    competitors = {
        where: Competitor(partial(getattr(module, name), *arguments), torch.no_grad)
        for where, module in (("ecanet", gpu), ("plain", coefficients))
        if only is None or where in only
    }
    return Work(competitors, () if only else (("plain", "ecanet"),), Setup().tolerance, replayed=True)
