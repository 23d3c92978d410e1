"""Compile the Triton kernels, as they are launched on maps of several kinds, for an NVIDIA and an AMD GPU.

Neither has to be there. Prints what came out. Run without ``TRITON_INTERPRET``.
"""

import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import op_cases as op
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecanet.ops import gpu, gpu_maps
from ecanet.ops import triton_kernels as kernels

TARGETS = (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDE, ODD = "wide", "odd"
#: Shape, type, channels last; and whether all of the map can be read and written 16 bytes at a time.
MAPS: list[tuple[tuple[int, ...], torch.dtype, bool, str]] = [
    ((256, 256, 56, 56), torch.bfloat16, True, WIDE),
    ((128, 24, 28, 28), torch.float16, True, WIDE),
    ((8, 24, 7, 7), torch.bfloat16, False, WIDE),
    ((512, 1024, 14, 14), torch.bfloat16, False, WIDE),
    ((512, 2048, 7, 7), torch.float32, False, WIDE),
    ((1, 1, 1, 1), torch.float32, False, ODD),
    ((3, 5, 9, 9), torch.float64, False, ODD),
]
#: What has no positions is the same for a map of any size: for many channels, for few, for one, and in float64.
MAPS_OF_MEANS = [MAPS[0], MAPS[2], MAPS[5], MAPS[6]]
Launch = tuple[str, tuple[Any, ...], dict[str, Any]]


def launches(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> list[Launch]:
    """Those of every operation on such a map, and on its means."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last) if last else x
    small = gpu.reference.accumulation_dtype(dtype)
    n, c = shape[:2]
    means, channel, k = (torch.empty(s, dtype=small, device="meta") for s in ((n, c), (c,), (min(c, 5) | 1,)))
    norm, no_norm = (channel, channel, channel, channel, 1e-5), (None, None, None, None, 0.0)
    seen: list[Launch] = []
    with patch.object(gpu, "_launch", lambda kernel, programs, on, *args, **more: seen.append((kernel, args, more))):
        gpu.squeeze(x)
        gpu.moments(x)
        gpu.batch_moments(x)
        gpu.batch_moments(x, True)
        gpu.apply(x, means, means, x, op.RELU)
        gpu.apply(x, means, None, None, op.SILU)
        gpu.apply_backward(x, x, means, None, channel, x, op.RELU, True)
        gpu.apply_backward(x, x, means, means, None, None, op.SILU, False)
        gpu.input_backward(x, x, means, None, None, 0, means, channel, channel)
        gpu.input_backward(x, x, means, None, x, op.RELU, means, means, channel)
        gpu.input_backward(x, x, means, means, x, op.SILU, means, None, None)
        gpu.eca_coefficients(means, *norm, k, False)
        gpu.eca_coefficients(means, *no_norm, k, k.numel() <= c)
        gpu.eca_coefficients(means, *norm, None, False)
        backward = means, means, means
        gpu.eca_coefficients_backward(*backward, means, None, *norm, k, False, 49)
        gpu.eca_coefficients_backward(*backward, means, means, *norm, None, False, 49)
        gpu.eca_coefficients_backward(*backward, means, means, *norm, None, False, 49, 1.0, means, means)
        gpu.eca_coefficients_backward(*backward, None, None, *no_norm, None, False, 49)
        gpu.update_running(channel, channel, channel, channel, 0.1, 49)
    return seen


def source(kernel: str, args: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """A kernel for such arguments: what is None or 1 is fixed, what 16 divides is known to be."""
    function = getattr(kernels, kernel)
    signature: dict[str, str] = {}
    fixed: dict[tuple[int], Any] = {}
    known: dict[tuple[int], Any] = {}
    for i, name in enumerate(function.arg_names):
        value = args[i] if i < len(args) else constants[name]
        size = value if isinstance(value, int) and i < len(args) else None
        if i >= len(args) or value is None or size == 1:
            signature[name], fixed[i,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if size is None else "i32"
        if isinstance(value, Tensor) or (size is not None and size % 16 == 0):
            known[i,] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=known)


def spilled_bytes(log: str) -> int:
    """What does not fit into registers, as ptxas says."""
    [spilled] = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return sum(map(int, spilled))


def access_bytes(ptx: str) -> list[int]:
    """How wide loads from memory and stores to it are."""
    found = re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    return sorted({int(many or 1) * int(bits) // 8 for many, bits in found})


def compiled() -> Iterator[dict[str, Any]]:
    """Every kernel once for what it is compiled for; what works on means or channels for some of the maps alone."""
    seen: set[str] = set()
    triton.knobs.compilation.always_compile = True  # else there is no log
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.disable_line_info = True  # for debuggers
    for (shape, dtype, last, kind), longest in [*((m, 2**31) for m in MAPS), (MAPS[0], 0), (MAPS[2], 0)]:
        with patch.object(gpu_maps, "LONGEST_INT32", longest):
            launched = launches(shape, dtype, last)
        one_of_a_kind = longest > 0 and (shape, dtype, last, kind) in MAPS_OF_MEANS
        for kernel, args, constants in launched:
            if kernel not in op.WALKS and (shape, dtype, last, kind) not in MAPS_OF_MEANS:
                continue
            code = source(kernel, args, constants)
            if (key := code.hash()) in seen:
                continue
            seen.add(key)
            # For AMD one map of each kind: the kernels are the same, and what differs is Triton's own.
            for target in TARGETS if one_of_a_kind else TARGETS[:1]:
                with redirect_stdout(io.StringIO()) as log:
                    assembly = triton.compile(code, target=target).asm
                result = {
                    "kernel": kernel,
                    "target": f"{target.backend}:{target.arch}",
                    "map": f"{shape} {TYPES[dtype]}{' channels last' * last}{' 64 bits' * (longest == 0)}",
                    "wide": kind == WIDE,
                }
                if target.backend == "cuda":
                    spilled = spilled_bytes(log.getvalue())
                    result |= {"spilled_bytes": spilled, "access_bytes": access_bytes(assembly["ptx"])}
                yield result


if __name__ == "__main__":
    print(json.dumps(list(compiled())))
