"""How the Triton kernels walk a feature map: its order in memory, tiles, warps, programs, splits.

All of it depends only on shapes and types, so the same tensors give the same bits on every run.
"""

import functools
import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecanet.ops import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

LANES = 32  # threads of an NVIDIA warp, which share the reads of a one-warp program
AT_ONCE = 16  # bytes that a thread reads or writes at once
LONGEST_INT32 = 2**31 - 2**22  # offsets may exceed the last element by up to a tile


class Size(NamedTuple):
    """Size of a program: elements of each map that it holds at a time, its warps, and how many programs run at once."""

    elements: int
    warps: int
    programs: int = 2048


# Keys: the kind of walk, and whether the map is channels last.
# Measured by python -m benchmarks.gpu --stages kernels,tuning.
SIZES = {
    ("elements", True): Size(4096, 4),
    ("elements", False): Size(2048, 4),
    ("squeeze", True): Size(2048, 1, 1320),
    ("squeeze", False): Size(2048, 4),
    ("moments", True): Size(2048, 1, 1320),
    ("moments", False): Size(1024, 2),
    ("reduce", True): Size(1024, 1, 2640),
    ("reduce", False): Size(1024, 4),
}


@functools.cache
def kernels_of_triton() -> Any:
    """The module with the Triton kernels; importing it imports triton."""
    return importlib.import_module("ecanet.ops.triton_kernels")


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not less than ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def type_of_sums(dtype: torch.dtype) -> Any:
    """Triton's type for sums over a map of type ``dtype``."""
    return kernels_of_triton().tl.float64 if dtype is torch.float64 else kernels_of_triton().tl.float32


def index_type(numel: int, longest: int | None = None) -> Any:
    """Triton's type for offsets into ``numel`` elements."""
    longest = LONGEST_INT32 if longest is None else longest
    return kernels_of_triton().tl.int64 if numel > longest else kernels_of_triton().tl.int32


def dense(x: Tensor) -> Tensor:
    """The map itself if it is contiguous or channels last, which the kernels can walk; otherwise a contiguous copy."""
    if x.is_contiguous():
        return x
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = formats.get(x.dim())
    return x if channels_last is not None and x.is_contiguous(memory_format=channels_last) else x.contiguous()


class Walk(NamedTuple):
    """How a map is walked.

    Attributes:
        programs: Number of programs.
        constants: The constants that the kernel is compiled with.
        splits: Number of parts that the positions are split into, for sums.
        per_split: Number of positions in each split.
    """

    programs: int
    constants: dict[str, Any]
    splits: int = 1
    per_split: int = 0


@functools.lru_cache(maxsize=4096)  # it takes microseconds, which would delay every launch
def walk_of(
    what: str,
    samples: int,
    channels: int,
    positions: int,
    channels_last: bool,
    dtype: torch.dtype,
    size: Size,
    longest: int,
) -> Walk:
    """How a map is walked; the arguments are the kind of walk, the fields of :class:`Map`, and two settings."""
    neighbours = channels if channels_last else positions
    at_once = AT_ONCE // dtype.itemsize  # elements that a thread reads or writes at once
    all_rows, numel = samples * channels, samples * channels * positions
    align = math.gcd(neighbours, 16)

    def row_blocks(rows: int) -> int:
        return samples * cdiv(channels, rows) if channels_last else cdiv(all_rows, rows)

    def constants(rows: int, at_a_time: int, **more: int) -> dict[str, Any]:
        return {
            **more, "LAST": channels_last, "ALIGN": align, "TOTAL": math.gcd(numel, 16), "ROWS": rows,
            "POSITIONS": at_a_time, "INDEX": index_type(numel, longest), "ACC": type_of_sums(dtype),
            "num_warps": size.warps,
        }  # fmt: skip

    if what == "elements":
        if channels_last:
            rows = min(power_of_2(channels), 128, size.elements)
            at_a_time = min(power_of_2(positions), size.elements // rows)
            return Walk(row_blocks(rows) * cdiv(positions, at_a_time), constants(rows, at_a_time))
        run = min(at_once, power_of_2(positions + 1) // 2)  # a run is no longer than a row
        runs = min(power_of_2(cdiv(numel, run)), size.elements // run)
        return Walk(cdiv(numel, runs * run), constants(runs, run))
    if channels_last:  # as many channels as the threads of a warp read at once: each thread sums its own channels
        rows = min(power_of_2(channels), LANES * at_once, size.elements)
        at_a_time = min(power_of_2(positions), size.elements // rows)
    else:  # a quarter of a row at a time, but at least what eight threads read at once
        at_a_time = max(8 * at_once, min(power_of_2(positions // 4), size.elements // 2))
        at_a_time = min(at_a_time, power_of_2(positions), size.elements)
        rows = min(power_of_2(all_rows), size.elements // at_a_time)
    blocks = row_blocks(rows)
    splits = max(1, min(positions // (4 * at_a_time), size.programs // blocks))
    per_split = cdiv(cdiv(positions, splits), at_a_time) * at_a_time
    splits = cdiv(positions, per_split)
    aligned = channels_last or align >= at_once or positions < 2 * at_once
    start = 1 if aligned or splits > 1 else at_once  # reads of rows start at a multiple of this
    threads_per_row = min(LANES * at_once // rows, at_a_time) if channels_last else 0
    return Walk(blocks * splits, constants(rows, at_a_time, START=start, THREADS=threads_per_row), splits, per_split)


class Map(NamedTuple):
    """A feature map as the kernels see it."""

    x: Tensor  # contiguous or channels last
    samples: int
    channels: int
    positions: int
    channels_last: bool

    @staticmethod
    def of(x: Tensor) -> "Map":
        """The map for a tensor; raises RuntimeError for an unsupported type or rank."""
        if x.dtype not in DTYPES:
            raise RuntimeError(f"ecanet: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dim() < 2:
            raise RuntimeError(f"ecanet: x must have shape (N, C, *spatial), got {tuple(x.shape)}")
        x = dense(x)
        return Map(x, x.shape[0], x.shape[1], x.shape[2:].numel(), not x.is_contiguous())

    def walk(self, what: str) -> Walk:
        """How the map is walked: by ``elements``, or for the sums of ``squeeze``, ``moments`` or ``reduce``."""
        return walk_of(what, *self[1:], self.x.dtype, SIZES[what, self.channels_last], LONGEST_INT32)

    def ordered(self, t: Tensor, name: str) -> Tensor:
        """Another map, in the memory order of this one."""
        if (t.shape, t.dtype, t.device) != (self.x.shape, self.x.dtype, self.x.device):
            raise RuntimeError(
                f"ecanet: {name} must have the shape, the type and the device of x: {tuple(self.x.shape)}, "
                f"{self.x.dtype}, {self.x.device}; got {tuple(t.shape)}, {t.dtype}, {t.device}"
            )
        if not self.channels_last:
            return t.contiguous()
        return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)

    def small(self, t: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor | None:
        """:func:`small` for this map; None stays None."""
        return None if t is None else small(t, self.x, shape, name)

    @property
    def nc(self) -> tuple[int, int]:
        """(N, C), the shape of tensors with one value per sample and channel."""
        return self.samples, self.channels

    @property
    def rows(self) -> int:
        """Number of rows, one for each sample and channel."""
        return self.samples * self.channels

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor for results; by default in the type of sums."""
        return self.x.new_empty(shape, dtype=dtype or reference.accumulation_dtype(self.x.dtype))


def small(t: Tensor, like: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """A small tensor made contiguous; raises RuntimeError, with its name, for a wrong shape or device."""
    if t.shape != shape or t.device != like.device:
        raise RuntimeError(
            f"ecanet: {name} must have shape {str(shape).replace(',)', ')')}, on {like.device}; "
            f"got {tuple(t.shape)}, on {t.device}"
        )
    return t.contiguous()
