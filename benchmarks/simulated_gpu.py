"""The code that Inductor generates for a graph on an NVIDIA GPU; no GPU is needed."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config, scheduler
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from triton.backends.compiler import GPUTarget

_H100 = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=2**36, warp_size=32)
_PROPERTIES = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
#: What Inductor asks of a GPU, and the simulated answers.
_SIMULATED: list[tuple[Any, str, Any]] = [
    (DeviceProperties, "create", lambda device: _PROPERTIES),
    (torch.cuda, "is_available", lambda: True),
    (torch.cuda, "device_count", lambda: 1),
    (torch.cuda, "current_device", lambda: 0),
    (torch.cuda, "get_device_properties", lambda *_: _H100),
    (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
    (torch.cuda, "get_rng_state", lambda *_: torch.zeros(1)),
    (torch.cuda, "set_rng_state", lambda *_: None),
    (torch.cuda, "_exchange_device", lambda *_: 0),
    (torch.cuda, "_maybe_exchange_device", lambda *_: 0),
    (scheduler, "has_triton", lambda *_: True),
]
_OPTIONS = {"decompositions": select_decomp_table(), "keep_inference_input_mutations": True}  # as in Inductor


class GeneratedCode(NamedTuple):
    """Code that Inductor generated.

    Attributes:
        code: Python.
        kernels: Number of kernels that it launches.
        bytes: Bytes that they read and write if each reads its inputs once, as Inductor counts them.
    """

    code: str
    kernels: int
    bytes: int


class _GeneratedError(Exception):
    """Stops Inductor once the code is generated: to load it, a GPU would be needed."""


def start() -> None:
    """Simulate the GPU for triton, too; for the rest of the process."""
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    config.fx_graph_cache = False
    config.compile_threads = 1  # code is generated and not compiled: no need for processes


def generate(graph: torch.fx.GraphModule, inputs: list[Any], is_backward: bool = False) -> GeneratedCode:
    """The code that Inductor generates for a graph of fake tensors on ``cuda``."""
    generated: list[GeneratedCode] = []
    codegen = GraphLowering.codegen

    def keep(self: GraphLowering) -> None:
        code = codegen(self)[0].value
        moved, nodes, _ = self.count_bytes()
        generated.append(GeneratedCode(code, len(nodes), moved))
        raise _GeneratedError

    with ExitStack() as stack:
        for where, name, value in [*_SIMULATED, (GraphLowering, "codegen", keep)]:
            stack.enter_context(patch.object(where, name, value))
        try:
            compile_fx_inner(graph, inputs, is_backward=is_backward)
        except InductorError as error:
            if not isinstance(error.inner_exception, _GeneratedError):
                raise
    return generated[0]


def capture(run: Any, inputs: list[Any], keep: Any) -> Any:
    """Call ``run(inputs)`` compiled, with ``keep(is_backward, graph, inputs)`` in place of Inductor."""

    def compiler(is_backward: bool) -> Any:
        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            keep(is_backward, graph, inputs)
            return graph.forward

        return compile_graph

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=compiler(False),
        bw_compiler=compiler(True),
        partition_fn=min_cut_rematerialization_partition,
        **_OPTIONS,
    )
    return torch.compile(run, fullgraph=True, backend=backend)(inputs)
