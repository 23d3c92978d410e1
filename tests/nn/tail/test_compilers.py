"""The tail under fx, torch.compile, export and jit: one graph that does the same."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tails import TOLERANCE, C, Tail, assert_equal, feature_map, plain, randomise_, step
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet.nn import ECA, SE
from ecanet.ops import backend as choice
from ecanet.ops import cpu
from tests.kernels_here import needs_kernels


def test_fx_shows_the_modules() -> None:
    tail = Tail(nn.BatchNorm2d(C), ECA(C), nn.ReLU())
    traced = torch.fx.symbolic_trace(tail)
    modules = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert "norm" in modules
    assert "act" in modules
    assert "squeeze" in {getattr(node.target, "__name__", "") for node in traced.graph.nodes}  # ECA, or inside it
    x, other = feature_map(3, C, 5, 4), plain(tail)
    assert_equal(step(traced, x, x), step(other, x, x), TOLERANCE[torch.float32])


COMPILED = {
    "ECA": lambda: Tail(nn.BatchNorm2d(C), ECA(C), "relu"),
    "ECA in evaluation": lambda: Tail(nn.BatchNorm2d(C), ECA(C), "relu").eval(),
    "SE": lambda: Tail(nn.BatchNorm2d(C), SE(C), nn.ReLU(inplace=True)),
    "cumulative average, circular": lambda: Tail(nn.BatchNorm2d(C, momentum=None), ECA(C, circular=True), nn.SiLU()),
    "no running statistics": lambda: Tail(nn.BatchNorm2d(C, affine=False, track_running_stats=False), ECA(C)),
    "FrozenBatchNorm2d": lambda: Tail(FrozenBatchNorm2d(C), ECA(C), "hardswish"),
    "no gate": lambda: Tail(nn.BatchNorm2d(C), None, "relu6"),
}


@pytest.mark.usefixtures("_nothing_compiled_before")
@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_compiles_to_one_graph_that_does_the_same(make) -> None:
    tail = make()
    other = plain(tail)
    compiled = torch.compile(tail, fullgraph=True, backend="aot_eager")
    x, residual = feature_map(3, C, 5, 4), torch.randn(3, C, 5, 4)
    for i in range(2):
        got = step(compiled, (i + 1) * x, residual)
        want = step(other, (i + 1) * x, residual)
        assert_equal({k.replace("_orig_mod.", ""): v for k, v in got.items()}, want, TOLERANCE[torch.float32])


@pytest.mark.usefixtures("_nothing_compiled_before")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_compilers_graph_has_the_kernels_as_one_operation_where_they_run(training, backend) -> None:
    seen = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if "ecanet" in str(node.target))
        return graph.forward

    tail = Tail(nn.BatchNorm2d(C).train(training), ECA(C), "relu")
    x = feature_map(3, C, 5, 4)
    other = plain(tail)
    with ecanet.backend(backend), torch.set_grad_enabled(training):
        got = torch.compile(tail, fullgraph=True, backend=look)(x, x)
    torch.testing.assert_close(got, other(x, x))
    name = "ecanet.batch_norm_eca_add_act" if training else "ecanet.norm_eca_add_act_"
    assert seen == ([name] if backend == "auto" and cpu.why_not() is None else [])


@pytest.mark.usefixtures("_nothing_compiled_before")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("act", [None, "relu", "silu", nn.ReLU6()], ids=str)
def test_compiled_a_residual_of_another_type_gives_the_type_of_the_sum(act, backend) -> None:
    tail = Tail(nn.BatchNorm2d(C), ECA(C), act)
    x, residual = feature_map(3, C, 5, 4).bfloat16(), torch.randn(3, C, 5, 4)
    other = plain(tail)
    with ecanet.backend(backend):
        got = torch.compile(tail, fullgraph=True, backend="aot_eager")(x, residual)
    want = other(x, residual)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-5)


@pytest.mark.usefixtures("_nothing_compiled_before")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_on_a_gpu_a_compiler_gets_one_graph_of_plain_pytorch_where_that_is_the_form(training, monkeypatch) -> None:
    """Fake tensors stand for those of a GPU, which need not be there."""
    monkeypatch.setattr(choice, "FORMS_ON_GPU", dict.fromkeys(choice.FORMS_ON_GPU, "formula"))
    graphs = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(), torch.device("cuda"):
        tail = Tail(nn.BatchNorm2d(C), ECA(C), "relu").train(training)
        x = torch.empty(2, C, 4, 4)
        out = torch.compile(tail, fullgraph=True, backend=look)(x, x)
    assert (out.device.type, out.shape) == ("cuda", x.shape)
    assert len(graphs) == 1
    assert not [node for node in graphs[0].graph.nodes if "ecanet" in str(node.target)]


@pytest.mark.usefixtures("_nothing_compiled_before")
def test_compiles_once_for_all_sizes() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    tail = Tail(nn.BatchNorm2d(C), ECA(C), "relu")
    other = plain(tail)
    compiled = torch.compile(tail, fullgraph=True, dynamic=True, backend=count)
    for shape in [(3, C, 5, 4), (2, C, 7, 6), (5, C, 3, 8)]:
        x = feature_map(*shape)
        got = {name.replace("_orig_mod.", ""): t for name, t in step(compiled, x, x).items()}
        assert_equal(got, step(other, x, x), TOLERANCE[torch.float32])
    assert len(graphs) == 1


@pytest.mark.usefixtures("_nothing_compiled_before")
def test_inductor_makes_the_same_of_it() -> None:
    tail = Tail(nn.BatchNorm2d(C), ECA(C), "relu")
    other = plain(tail)
    compiled = torch.compile(tail, fullgraph=True)
    x = feature_map(3, C, 5, 4)
    got = {name.replace("_orig_mod.", ""): t for name, t in step(compiled, x, x).items()}
    assert_equal(got, step(other, x, x), TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.usefixtures("_nothing_compiled_before")
def test_between_convolutions_inductor_converts_and_copies_no_maps() -> None:
    """It makes them channels last, and the operation takes them as they come and writes over them."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(2))
            self.tail = Tail(randomise_(nn.BatchNorm2d(C)), ECA(C), "relu")

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.tail(self.first(x), None))

    network, x = Network().eval(), torch.randn(2, C, 6, 5)
    without_caches = (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    )
    with torch.no_grad(), without_caches[0], without_caches[1]:
        got, (code,) = run_and_get_code(torch.compile(network, fullgraph=True), x)
        torch.testing.assert_close(got, network(x))
    (written,) = re.findall(r"torch\.ops\.ecanet\.norm_eca_add_act_\.default\((\w+),", code)
    assert f"{written} = extern_kernels.convolution(" in code
    assert "fused_norm_eca_add_act" not in code  # a kernel that makes the operation's argument
    assert "fused_clone" not in code


@needs_kernels
@pytest.mark.usefixtures("_nothing_compiled_before")
def test_what_somebody_else_reads_is_not_written_over() -> None:
    tail = Tail(randomise_(nn.BatchNorm2d(C)), ECA(C), "relu").eval()

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        return tail(y, y), y

    x = feature_map(2, C, 6, 5)
    with torch.no_grad():
        got, kept = torch.compile(twice, fullgraph=True)(x)
        want, y = twice(x)
    torch.testing.assert_close(got, want)
    assert torch.equal(kept, y)


@pytest.mark.usefixtures("_nothing_compiled_before")
def test_exports_in_evaluation_with_any_size() -> None:
    tail = Tail(randomise_(nn.BatchNorm2d(C)), ECA(C), "relu").eval()
    n, h, w = (torch.export.Dim(dim) for dim in "nhw")
    dims = {0: n, 2: h, 3: w}
    program = torch.export.export(tail, (torch.randn(2, C, 3, 4), torch.randn(2, C, 3, 4)), dynamic_shapes=(dims, dims))
    x = feature_map(5, C, 7, 6)
    torch.testing.assert_close(program.module()(x, x), tail(x, x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_jit_trace() -> None:
    tail = Tail(randomise_(nn.BatchNorm2d(C)), ECA(C), nn.ReLU()).eval()
    x = feature_map(3, C, 5, 4)
    traced = torch.jit.trace(tail, (x, x), check_trace=False)
    x = feature_map(2, C, 5, 4)
    torch.testing.assert_close(traced(x, x), tail(x, x))
