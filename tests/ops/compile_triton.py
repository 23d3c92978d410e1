"""Compile every Triton kernel, in several variants, for an NVIDIA and an AMD GPU; neither has to be there.

Prints the targets by kernel. Run without ``TRITON_INTERPRET``.
"""

import json
from collections import defaultdict
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecanet.ops import gpu
from ecanet.ops import triton_kernels as kernels

TARGETS = (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))
tl = kernels.tl
INTEGERS = {
    "samples", "channels", "positions", "splits", "per_split", "rows", "per_program", "groups", "programs",
}  # fmt: skip
DOUBLES = {"mean", "m2"}  # of moments, merge and statistics


def launched_for(*shape: int, last: bool) -> dict[str, Any]:
    """The constants that a map of that shape is launched with."""
    x = torch.empty(shape, device="meta")
    return gpu._Map.of(x.to(memory_format=torch.channels_last) if last else x).constants()


WALK = launched_for(256, 256, 56, 56, last=True)
ROWS = {**launched_for(256, 2048, 7, 7, last=False), "INDEX": tl.int64}
MEANS = {"eps": 1e-5, "CIRCULAR": False, "INDEX": tl.int32, "ACC": tl.float32}
MAPS = {"x", "residual", "out", "grad", "saved", "d"}

#: Kernel, constants, arguments that are None, and the type of the maps.
VARIANTS: list[tuple[str, dict[str, Any], set[str], str]] = [
    *(
        (name, {**walk, **more}, none, dtype)
        for walk, dtype in ((WALK, "bf16"), (ROWS, "fp32"))
        for name, more, none in (
            ("moments", {"SECOND": True, "OUT": tl.float64}, set()),
            ("moments", {"SECOND": False, "OUT": tl.float32}, set()),
            ("apply", {"ACT": 1}, set()),
            ("apply", {"ACT": 3}, {"shift", "residual"}),
            ("reduce", {"ACT": 1}, {"shift"}),
            ("reduce", {"ACT": 4}, {"d", "center", "saved"}),
            ("input_grad", {"ACT": 0}, {"shift", "saved"}),
            ("input_grad", {"ACT": 3}, {"slope", "center"}),
        )
    ),
    ("merge", {"SECOND": True, "BLOCK": 512, "OUT": tl.float64, "INDEX": tl.int32}, set(), "fp32"),
    ("statistics", {"SAMPLES": 128, "CHANNELS": 16, "INDEX": tl.int32}, set(), "fp32"),
    ("update_running", {"BLOCK": 512}, set(), "fp32"),
    ("coefficients", {**MEANS, "K": 5, "BLOCK": 256}, set(), "fp32"),
    ("coefficients", {**MEANS, "CIRCULAR": True, "K": 5, "BLOCK": 256}, {"mean", "var", "weight", "bias"}, "fp32"),
    ("coefficients", {**MEANS, "K": 0, "BLOCK": 256}, {"kernel"}, "fp32"),
    *(
        ("coefficients_backward", {**MEANS, "K": k, "SAMPLES": 32, "CHANNELS": 32, "TAPS": 8}, none, "fp32")
        for k, none in ((5, {"grad_s"}), (0, {"kernel"}), (0, {"kernel", "gate", "grad_s", "mean", "var", "bias"}))
    ),
    *(
        ("finish", {"eps": 1e-5, "K": k, "CHANNELS": 128, "PROGRAMS": 64, "TAPS": 8, "ACC": tl.float32}, none, "fp32")
        for k, none in ((5, set()), (0, {"var", "weight"}))
    ),
]


def argument_type(kernel: str, name: str, map_type: str) -> str:
    """As triton spells it."""
    if name in INTEGERS:
        return "i32"
    if name in ("momentum", "unbiased"):
        return "fp32"
    if name in MAPS:
        return f"*{map_type}"
    if kernel in ("moments", "merge", "statistics") and name in DOUBLES:
        return "*fp64"
    return "*fp32"


def main() -> None:
    """Compile all; the first that does not compile raises."""
    compiled: dict[str, set[str]] = defaultdict(set)
    for name, constants, none, map_type in VARIANTS:
        kernel = getattr(kernels, name)
        fixed = {**constants, **dict.fromkeys(none)}
        signature = {
            argument: "constexpr" if argument in fixed else argument_type(name, argument, map_type)
            for argument in kernel.arg_names
        }
        ones = {argument: 1 for argument, kind in signature.items() if kind == "i32"}  # triton fixes a size of 1
        for more, targets in (({}, TARGETS), (ones, TARGETS[:1])):
            types = {argument: "constexpr" if argument in more else kind for argument, kind in signature.items()}
            known = {(kernel.arg_names.index(argument),): value for argument, value in {**fixed, **more}.items()}
            for target in targets:
                triton.compile(ASTSource(fn=kernel, signature=types, constexprs=known), target=target)
                compiled[name].add(f"{target.backend}:{target.arch}")
    print(json.dumps({name: sorted(targets) for name, targets in compiled.items()}))


if __name__ == "__main__":
    main()
