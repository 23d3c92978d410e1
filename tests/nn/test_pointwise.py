"""The squeeze of a 1 x 1 convolution's output from its input: the same values, and the output is not read for them.

Compiled in plain PyTorch, as on a GPU: the kernels of the CPU are one operation of the graph.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import FrozenBatchNorm2d

import ecanet
import ecanet.nn.attached
from ecanet.models.mobilenetv2 import GatedInvertedResidual
from ecanet.models.resnet import GatedBottleneck
from ecanet.nn import ECA, SE, conv_norm_gate_add_act
from ecanet.nn.tail.pointwise import is_pointwise
from ecanet.ops import gpu

CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Graphs:
    """A compiler that runs what it gets as it is, and remembers it."""

    def __init__(self) -> None:
        self.seen: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.seen.append(graph)
        return graph.forward

    def averaged(self) -> list[int]:
        """Channels of the maps whose means the graphs take."""
        nodes = [node for graph in self.seen for node in graph.graph.nodes]
        means = [node for node in nodes if node.op == "call_method" and node.target == "mean"]
        return [node.args[0].meta["example_value"].shape[1] for node in means]


class Branch(nn.Module):
    """A bottleneck's end."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, gate: nn.Module, act: Any, hang: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.gate, self.act = conv, norm, gate, act
        for t in (*self.parameters(), *self.buffers()):
            if t.is_floating_point():
                nn.init.uniform_(t, 0.1, 1.0)
        if hang:
            ecanet.nn.attached.attach_(self.norm, self.gate)
            self.gate = None

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return conv_norm_gate_add_act(x, self.conv, self.norm, self.gate, residual, self.act)

    def one_after_another(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.conv(x)
        y = y if self.norm is None else self.norm(y)
        y = (y if self.gate is None else self.gate(y)) + residual
        return y if self.act is None else torch.relu(y) if self.act == "relu" else self.act(y)


def conv(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 32, 1, **kwargs)


BRANCHES: dict[str, Callable[[], Branch]] = {
    "eca": lambda: Branch(conv(), nn.BatchNorm2d(32), ECA(32), "relu"),
    "se": lambda: Branch(conv(bias=False), nn.BatchNorm2d(32), SE(32, 4), None),
    "no norm": lambda: Branch(conv(), None, ECA(32), "relu"),
    "frozen norm": lambda: Branch(conv(), FrozenBatchNorm2d(32), ECA(32), "relu"),
    "module of another activation": lambda: Branch(conv(), nn.BatchNorm2d(32), ECA(32), nn.Softsign()),
    "attached gate": lambda: Branch(conv(), nn.BatchNorm2d(32), ECA(32), "relu", hang=True),
}
every_branch = pytest.mark.parametrize("make", BRANCHES.values(), ids=BRANCHES)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 8, 6, 7).to(dtype), torch.randn(2, 32, 6, 7).to(dtype)


def compiled(module: nn.Module, *args: Any, **options: Any) -> tuple[Any, list[int]]:
    """What it returns for inference, and channels of the maps whose means it takes."""
    graphs = Graphs()
    with torch.no_grad(), ecanet.backend("reference"):
        out = torch.compile(module, fullgraph=True, backend=graphs, **options)(*args)
    return out, graphs.averaged()


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@every_branch
def test_the_output_is_not_read_for_its_means(make, dynamic) -> None:
    branch = make().eval()
    for residual in (inputs()[1], inputs()[1][:, :, :1, :1]):  # of another shape it is added afterwards
        out, averaged = compiled(branch, inputs()[0], residual, dynamic=dynamic)
        torch.testing.assert_close(out, branch.one_after_another(inputs()[0], residual), rtol=1e-5, atol=1e-5)
        assert averaged == [8]


@pytest.mark.parametrize("shape", [(2, 3, 40), (3, 4, 5, 9), (1, 3, 2, 5, 5)], ids=str)
def test_any_number_of_spatial_dimensions(shape) -> None:
    branch = Branch(CONVOLUTIONS[len(shape)](shape[1], 16, 1), None, ECA(16), None).double().eval()
    x, residual = torch.randn(shape).double(), torch.randn(shape[0], 16, *shape[2:]).double()
    out, averaged = compiled(branch, x, residual)
    torch.testing.assert_close(out, branch.one_after_another(x, residual), rtol=1e-12, atol=1e-12)
    assert averaged == [shape[1]]


@pytest.mark.parametrize("autocast", [True, False])
def test_half_types_differ_by_their_rounding(autocast) -> None:
    branch = BRANCHES["eca"]().eval()
    branch = branch if autocast else branch.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, averaged = compiled(branch, *inputs(torch.bfloat16))
        want = branch.one_after_another(*inputs(torch.bfloat16))
    assert averaged == [8]
    torch.testing.assert_close(out.float(), want.float(), rtol=2**-6, atol=2**-6)


def test_an_inverted_residual_averages_before_it_narrows() -> None:
    torch.manual_seed(0)
    block = GatedInvertedResidual(8, 8, 1, 6).eval()
    block.append_gate(ECA(8))
    x = torch.randn(2, 8, 6, 7)
    out, averaged = compiled(block, x)
    torch.testing.assert_close(out, block(x))
    assert averaged == [48]


def test_a_bottleneck_averages_before_it_widens() -> None:
    torch.manual_seed(0)
    block = GatedBottleneck(32, 8).eval()
    block.eca = ECA(32)
    x = torch.randn(2, 32, 6, 7)
    out, averaged = compiled(block, x)
    torch.testing.assert_close(out, block(x))
    assert averaged == [8]


def test_maps_of_many_sizes_need_no_more_graphs_than_one_by_one() -> None:
    branch, graphs = BRANCHES["eca"]().eval(), Graphs()
    run = torch.compile(branch, fullgraph=True, dynamic=True, backend=graphs)
    with torch.no_grad(), ecanet.backend("reference"):
        for samples, height, width in [(n, 3 * n + 1, 40 - 2 * n) for n in range(2, 14)]:
            run(torch.randn(samples, 8, height, width), torch.randn(samples, 32, height, width))
    assert len(graphs.seen) == 1


@pytest.mark.parametrize("name", ["no norm", "se"])
def test_on_a_gpu_a_formula_does_not_read_the_output_for_its_means(name, monkeypatch) -> None:
    """Fake tensors stand for those of a GPU, which need not be there."""
    monkeypatch.setattr(gpu, "IS_COMPLETE", True)
    graphs = Graphs()
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        branch = BRANCHES[name]().eval()
        x, residual = torch.empty(2, 8, 6, 7), torch.empty(2, 32, 6, 7)
        torch.compile(branch, fullgraph=True, backend=graphs)(x, residual)
    assert graphs.averaged() == [8]


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_other_maths(layer: Any) -> nn.Module:
    layer._conv_forward = lambda x, *_: x
    return layer


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
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 1)),
        with_hook(nn.Conv2d(4, 8, 1)),
        with_other_maths(nn.Conv2d(4, 8, 1)),
    ]
    assert all(map(is_pointwise, yes))
    assert not any(map(is_pointwise, no))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Branch(nn.Conv2d(8, 32, 3, padding=1), None, ECA(32), None),
        lambda: Branch(nn.Sequential(conv()), None, ECA(32), None),
        lambda: Branch(nn.Conv2d(8, 2**17 + 1, 1), None, ECA(2**17 + 1), None),
    ],
    ids=["looks around", "no convolution", "matrix larger than maps are"],
)
def test_elsewhere_the_output_is_averaged(make) -> None:
    branch, x = make().eval(), inputs()[0]
    residual = torch.zeros_like(branch.conv(x))
    out, averaged = compiled(branch, x, residual)
    torch.testing.assert_close(out, branch.one_after_another(x, residual))
    assert averaged == [residual.shape[1]]


def test_where_a_gradient_is_asked_for_the_output_is_averaged() -> None:
    branch, graphs = BRANCHES["no norm"]().eval(), Graphs()
    x, residual = inputs()
    with ecanet.backend("reference"):
        torch.compile(branch, fullgraph=True, backend=graphs)(x.requires_grad_(), residual)
    assert graphs.averaged() == [32]


def test_what_is_exported_is_plain_modules_for_any_size() -> None:
    branch = BRANCHES["eca"]().eval()
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height", max=4096)  # in torch 2.10 no size is endless
    shapes = tuple({0: batch, 2: height} for _ in range(2))
    with torch.no_grad():
        exported = torch.export.export(branch, inputs(), dynamic_shapes=shapes).module()
        x, residual = torch.randn(5, 8, 3, 7), torch.randn(5, 32, 3, 7)
        torch.testing.assert_close(exported(x, residual), branch.one_after_another(x, residual))


@every_branch
def test_what_is_not_compiled_has_the_same_values(make) -> None:
    for training in (True, False):
        branch, again = make().train(training), make().train(training)
        torch.testing.assert_close(branch(*inputs()), again.one_after_another(*inputs()), rtol=1e-5, atol=1e-5)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="conv must be a module, got builtin_function_or_method"):
        conv_norm_gate_add_act(torch.randn(1, 2, 3, 3), torch.relu)
