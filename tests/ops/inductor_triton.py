"""What Inductor makes of the operations on an NVIDIA GPU, which need not be there; its kernels are compiled for one.

Prints what Inductor's code calls, by operation and memory format. Run without ``TRITON_INTERPRET``.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import op_cases as op
import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode

from ecanet.ops import gpu

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import simulated_gpu

KERNEL = re.compile(
    r"^\w+ = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL | re.MULTILINE
)
CALL = re.compile(r"^ +(?:\w+ = )?(?:(\w+)\.run\(|(torch\.ops\.ecanet\.\w+))", re.MULTILINE)


def inductor_code(operation: Any, args: list[Any]) -> str:
    """What Inductor writes for the operation."""
    written: list[str] = []

    def write(is_backward: bool, graph: torch.fx.GraphModule, inputs: list[Any]) -> None:
        written.append(simulated_gpu.generate(graph, inputs, is_backward).code)

    simulated_gpu.capture(lambda inputs: operation(*inputs), args, write)
    return written[0]


def on_gpu(value: Any) -> Any:
    """A tensor without data, where there need not be a GPU."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def compile_kernels(code: str) -> None:
    """As Inductor does when it loads its code."""
    with patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
        for name, source in KERNEL.findall(code):
            autotuner = getattr(PyCodeCache.load(source), name)
            autotuner._precompile_config(autotuner.configs[0])


def main() -> None:
    """All operations; what does not compile raises."""
    simulated_gpu.start()
    gpu.why_not = lambda: None  # type: ignore[assignment]
    called = {}
    for name in (*op.EVERY, "batch_norm_eca_add_act"):
        for make in (op.dense, op.channels_last):
            like = "norm_eca_add_act" if name == "batch_norm_eca_add_act" else name
            args = op.arguments(like, (2, 70, 8, 8), torch.bfloat16, make, op.Options(op.RELU, kernel=5))
            if name == "batch_norm_eca_add_act":  # finds mean and variance itself
                del args[2:4]
            with FakeTensorMode(), torch.no_grad():
                code = inductor_code(getattr(torch.ops.ecanet, name), [on_gpu(arg) for arg in args])
            compile_kernels(code)
            called[f"{name} {make.__name__}"] = ["".join(names) for names in CALL.findall(code)]
    print(json.dumps(called))


if __name__ == "__main__":
    main()
