"""The squeeze of a 1 x 1 convolution's output from its input: the same means, and the output is not read for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecanet
import ecanet.nn.hung
from ecanet.models.mobilenetv2 import GatedInvertedResidual
from ecanet.models.resnet import GatedBottleneck
from ecanet.nn import ECA, SE, conv_norm_gate_add_act, fused
from ecanet.nn.pointwise import is_pointwise, means_after
from ecanet.ops import cpu, gpu

needs_triton = pytest.mark.skipif(gpu.why_not() is not None, reason=str(gpu.why_not()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def conv_and_map(shape: tuple[int, ...], out: int, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    conv = CONVOLUTIONS[len(shape)](shape[1], out, 1, **kwargs).to(DEVICE, dtype).requires_grad_(False)
    return conv, torch.randn(shape, device=DEVICE).to(dtype)


@needs_triton
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 40), (3, 4, 5, 9), (1, 3, 2, 5, 5)], ids=str)
def test_they_are_the_means_of_what_the_convolution_makes(shape, dtype, bias) -> None:
    conv, x = conv_and_map(shape, 16, dtype, bias=bias)
    want = conv.double()(x.double()).flatten(2).mean(2)
    with ecanet.backend("triton"):
        means = means_after(x, conv.to(dtype).weight, conv.bias)
    assert means is not None
    assert means.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(means.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def with_hook(conv: nn.Module) -> nn.Module:
    conv.register_forward_hook(lambda *_: None)
    return conv


def test_only_what_looks_at_one_position_is_pointwise() -> None:
    yes = [nn.Conv2d(4, 8, 1), nn.Conv1d(4, 8, 1, bias=False), nn.Conv3d(4, 8, 1), nn.Conv2d(4, 8, 1, padding="same")]
    no = [
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(4, 8, (1, 3), padding="same"),
        nn.Conv2d(4, 8, 1, stride=2),
        nn.Conv2d(4, 8, 1, padding=1),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.ConvTranspose2d(4, 8, 1),
        nn.Linear(4, 8),
        nn.Sequential(nn.Conv2d(4, 8, 1)),
        with_hook(nn.Conv2d(4, 8, 1)),
    ]
    assert all(map(is_pointwise, yes))
    assert not any(map(is_pointwise, no))


@needs_triton
@pytest.mark.parametrize(
    ("shape", "out"),
    [((2, 16, 9, 9), 16), ((2, 16, 9, 9), 8), ((2, 64, 2, 2), 256), ((0, 4, 9, 9), 16), ((4, 9, 9), 16)],
    ids=["as wide", "narrowing", "matrix larger than the map", "empty", "no batch"],
)
def test_where_it_is_no_less_work_they_are_left_to_the_output(shape, out) -> None:
    weight = torch.randn(out, shape[-3], 1, 1, device=DEVICE)
    with ecanet.backend("triton"):
        assert means_after(torch.randn(shape, device=DEVICE), weight, None) is None


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_on_a_cpu_the_cache_still_holds_the_output() -> None:
    conv, x = conv_and_map((2, 4, 9, 9), 16, torch.float32)
    assert means_after(x.cpu(), conv.weight.cpu(), None) is None


@needs_triton
def test_where_a_gradient_is_asked_for_they_are_left_to_the_output() -> None:
    conv, x = conv_and_map((2, 4, 9, 9), 16, torch.float32)
    with ecanet.backend("triton"):
        assert means_after(x.requires_grad_(), conv.weight, conv.bias) is None
        assert means_after(x.detach(), conv.weight.requires_grad_(), conv.bias) is None
        with torch.no_grad():
            assert means_after(x, conv.weight, conv.bias) is not None


# --- the tail behind it ----------------------------------------------------------------------------------------------


class Branch(nn.Module):
    """A bottleneck's end."""

    def __init__(self, norm: nn.Module | None, gate: nn.Module | None, act: Any, hang: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.gate, self.act = nn.Conv2d(8, 32, 1), norm, gate, act
        for t in (*self.parameters(), *self.buffers()):
            if t.is_floating_point():
                nn.init.uniform_(t, 0.1, 1.0)
        if hang:
            ecanet.nn.hung.hang_(self.norm, self.gate)
            self.gate = None

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return conv_norm_gate_add_act(x, self.conv, self.norm, self.gate, residual, self.act)

    def one_after_another(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.conv(x)
        y = y if self.norm is None else self.norm(y)
        y = (y if self.gate is None else self.gate(y)) + residual
        return y if self.act is None else torch.relu(y) if self.act == "relu" else self.act(y)


BRANCHES: dict[str, Callable[[], Branch]] = {
    "eca": lambda: Branch(nn.BatchNorm2d(32), ECA(32), "relu"),
    "se": lambda: Branch(nn.BatchNorm2d(32), SE(32, 4), None),
    "no norm": lambda: Branch(None, ECA(32), "relu"),
    "module of another activation": lambda: Branch(nn.BatchNorm2d(32), ECA(32), nn.Softsign()),
    "hung gate": lambda: Branch(nn.BatchNorm2d(32), ECA(32), "relu", hang=True),
}


@pytest.fixture
def squeezed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Channels of what the kernels have squeezed."""
    seen: list[int] = []
    squeeze = gpu.squeeze

    def see(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return squeeze(x)

    monkeypatch.setattr(gpu, "squeeze", see)
    monkeypatch.setattr(fused, "kernels", fused._Kernels())
    return seen


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 8, 6, 7, device=DEVICE).to(dtype), torch.randn(2, 32, 6, 7, device=DEVICE).to(dtype)


@needs_triton
@pytest.mark.parametrize("make", BRANCHES.values(), ids=BRANCHES)
def test_the_tail_has_the_values_of_its_modules_and_squeezes_the_input(make, squeezed) -> None:
    branch = make().eval().to(DEVICE)
    for residual in (inputs()[1], inputs()[1][:, :, :1, :1]):  # of another shape it is added afterwards
        with torch.no_grad():
            with ecanet.backend("reference"):
                want = branch.one_after_another(inputs()[0], residual)
            with ecanet.backend("triton"):
                got = branch(inputs()[0], residual)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert squeezed == [8, 8]


@needs_triton
def test_in_training_the_norm_finds_the_means_anyway(squeezed) -> None:
    branch = BRANCHES["eca"]().to(DEVICE)
    with ecanet.backend("triton"), torch.no_grad():
        branch(*inputs())
    assert squeezed == []


@needs_triton
def test_under_autocast_the_means_are_those_of_the_output_to_its_rounding(squeezed) -> None:
    branch = BRANCHES["eca"]().eval().to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        with ecanet.backend("triton"):
            got = branch(*inputs(torch.bfloat16))
        with ecanet.backend("reference"):
            want = branch.one_after_another(*inputs(torch.bfloat16))
    assert squeezed == [8]
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=2**-6)


@needs_triton
def test_a_network_optimised_for_inference_squeezes_the_inputs_too(squeezed) -> None:
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
    block = GatedBottleneck(16, 8, downsample=downsample)
    block.eca = ECA(32)
    block = block.eval().to(DEVICE)
    fast, x = ecanet.optimize_for_inference(block), torch.randn(2, 16, 6, 7, device=DEVICE)
    with torch.no_grad():
        with ecanet.backend("reference"):
            want = block(x)
        with ecanet.backend("triton"):
            torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-4)
        assert squeezed == [8, 8]
        torch.testing.assert_close(torch.fx.symbolic_trace(fast)(x), want, rtol=1e-4, atol=1e-4)


def averages(graph: torch.fx.GraphModule) -> list[int]:
    """Channels of the maps whose means a graph takes."""
    means = [node for node in graph.graph.nodes if node.op == "call_method" and node.target == "mean"]
    return [node.args[0].meta["example_value"].shape[1] for node in means]


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("make", BRANCHES.values(), ids=BRANCHES)
def test_what_is_compiled_reads_the_output_once(make, dynamic) -> None:
    """In plain PyTorch, as on a GPU."""
    branch = make().eval()
    x, residual = (t.cpu() for t in inputs())
    averaged: list[int] = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        averaged.extend(averages(graph))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad(), ecanet.backend("reference"):
        got = torch.compile(branch, fullgraph=True, dynamic=dynamic, backend=look)(x, residual)
        torch.testing.assert_close(got, branch.one_after_another(x, residual), rtol=1e-5, atol=1e-5)
    assert averaged == [8]


def test_a_compiled_inverted_residual_averages_before_it_narrows() -> None:
    torch.manual_seed(0)
    block = GatedInvertedResidual(8, 8, 1, 6).eval()
    block.append_gate(ECA(8))
    x, averaged = torch.randn(2, 8, 6, 7), []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        averaged.extend(averages(graph))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad(), ecanet.backend("reference"):
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=look)(x), block(x))
    assert averaged == [48]


def test_what_is_exported_is_plain_modules_for_any_size() -> None:
    branch = BRANCHES["eca"]().eval()
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height")
    shapes = tuple({0: batch, 2: height} for _ in range(2))
    with torch.no_grad():
        exported = torch.export.export(branch, tuple(t.cpu() for t in inputs()), dynamic_shapes=shapes).module()
        x, residual = torch.randn(5, 8, 3, 7), torch.randn(5, 32, 3, 7)
        torch.testing.assert_close(exported(x, residual), branch.one_after_another(x, residual))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="conv must be a module, got builtin_function_or_method"):
        conv_norm_gate_add_act(torch.randn(1, 2, 3, 3), torch.relu)
