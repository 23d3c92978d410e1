"""What Inductor makes of the operations on an NVIDIA GPU, which need not be there; its kernels are compiled for one.

Prints what Inductor's code calls, by operation and memory format. Run without ``TRITON_INTERPRET``.
"""

import json
import re
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from op_cases import EVERY, RELU, Options, arguments, channels_last, dense
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config, scheduler
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from ecanet.ops import gpu

H100 = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=2**36, warp_size=32)
PROPERTIES = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
#: What Inductor asks of a GPU.
PRETENDED: list[tuple[Any, str, Any]] = [
    (DeviceProperties, "create", lambda device: PROPERTIES),
    (torch.cuda, "is_available", lambda: True),
    (torch.cuda, "device_count", lambda: 1),
    (torch.cuda, "current_device", lambda: 0),
    (torch.cuda, "get_device_properties", lambda *_: H100),
    (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
    (torch.cuda, "get_rng_state", lambda *_: torch.zeros(1)),
    (torch.cuda, "set_rng_state", lambda *_: None),
    (torch.cuda, "_exchange_device", lambda *_: 0),
    (torch.cuda, "_maybe_exchange_device", lambda *_: 0),
    (scheduler, "has_triton", lambda *_: True),
]
KERNEL = re.compile(
    r"^\w+ = async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL | re.MULTILINE
)
CALL = re.compile(r"^ +(?:\w+ = )?(?:(\w+)\.run\(|(torch\.ops\.ecanet\.\w+))", re.MULTILINE)


class _WrittenError(Exception):
    """Inductor's code is there, and would have to be loaded next, with a GPU."""


def inductor_code(operation: Any, args: list[Any]) -> str:
    """What Inductor writes for the operation."""
    written: list[str] = []
    codegen = GraphLowering.codegen

    def write(self: GraphLowering) -> None:
        written.append(codegen(self)[0].value)
        raise _WrittenError

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        with ExitStack() as stack:
            for where, name, value in [*PRETENDED, (GraphLowering, "codegen", write)]:
                stack.enter_context(patch.object(where, name, value))
            try:
                compile_fx_inner(graph, inputs)
            except InductorError as error:
                if not isinstance(error.inner_exception, _WrittenError):
                    raise
        return graph.forward

    torch._dynamo.reset()
    options = {"decompositions": select_decomp_table(), "keep_inference_input_mutations": True}  # as Inductor has them
    backend = aot_autograd(fw_compiler=compiler, **options)
    torch.compile(lambda inputs: operation(*inputs), fullgraph=True, backend=backend)(args)
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
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    config.fx_graph_cache = False
    gpu.why_not = lambda: None  # type: ignore[assignment]
    called = {}
    for name in (*EVERY, "train_tail"):
        for make in (dense, channels_last):
            like = "eca_tail" if name == "train_tail" else name
            args = arguments(like, (2, 70, 8, 8), torch.bfloat16, make, Options(RELU, kernel=5))
            if name == "train_tail":  # finds mean and variance itself
                del args[2:4]
            with FakeTensorMode(), torch.no_grad():
                code = inductor_code(getattr(torch.ops.ecanet, name), [on_gpu(arg) for arg in args])
            compile_kernels(code)
            called[f"{name} {make.__name__}"] = ["".join(names) for names in CALL.findall(code)]
    print(json.dumps(called))


if __name__ == "__main__":
    main()
