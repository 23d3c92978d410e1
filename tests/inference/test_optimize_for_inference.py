"""optimize_for_inference: the same outputs from fewer passes, for our networks, torchvision's and timm's."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet.inference import InferenceTail, optimize_for_inference
from ecanet.models import eca_mobilenet_v2, eca_resnet18, eca_resnet50, small_eca_resnet
from ecanet.nn import GATES, Gate, build_gate

# Largest difference over largest output, float32: folding a norm into a convolution rounds its weights once more.
TOLERANCE = 1e-5

NETWORKS = {
    # name: (builder, tails, of them with a gate, norms that no convolution precedes)
    "eca_resnet18": (eca_resnet18, 8, 8, 0),
    "eca_resnet50": (eca_resnet50, 16, 16, 0),
    "se_resnet18": (lambda: eca_resnet18("se"), 8, 8, 0),
    "eca_mobilenet_v2": (eca_mobilenet_v2, 17, 17, 0),
    "small_eca_resnet": (small_eca_resnet, 3, 3, 0),
    "no gate": (lambda: eca_resnet18(None), 8, 0, 0),
    "torchvision resnet18": (torchvision_models.resnet18, 8, 0, 0),
    "torchvision resnet50": (torchvision_models.resnet50, 16, 0, 0),
    "torchvision mobilenet_v2": (torchvision_models.mobilenet_v2, 10, 0, 0),
    "torchvision regnet_y_400mf": (torchvision_models.regnet_y_400mf, 16, 0, 0),
    "torchvision densenet121": (torchvision_models.densenet121, 0, 0, 62),
}


def trained_looking(model: nn.Module) -> nn.Module:
    """Norms whose statistics and weights say something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def tails(model: nn.Module) -> list[InferenceTail]:
    return [module for module in model.modules() if isinstance(module, InferenceTail)]


def relative_difference(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("name", GATES)
def test_every_gate_is_in_a_tail_in_place_and_gives_the_same_outputs(name):
    gates = partial(build_gate, name)
    for model in (small_eca_resnet(gates, widths=(32, 64)), torchvision_models.resnet18(num_classes=3)):
        if isinstance(model, torchvision_models.ResNet):
            ecanet.insert_gates_(model, gates, preserve=False, input_shape=None)
        for gate in (module for module in trained_looking(model).modules() if isinstance(module, Gate)):
            for parameter in gate.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
        x = torch.randn(2, 3, 32, 32)
        fast = optimize_for_inference(model)
        assert all(tail.gate is not None and tail.in_place for tail in tails(fast))
        assert len(tails(fast)) == sum(isinstance(module, Gate) for module in model.modules())
        for backend in ("auto", "reference"):
            with ecanet.backend(backend), torch.no_grad():
                assert relative_difference(fast(x), model(x)) < TOLERANCE, backend


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_outputs_with_norms_folded_and_tails_in_place(name, memory_format):
    build, count, gated, norms = NETWORKS[name]
    model = trained_looking(build())
    x = torch.randn(2, 3, 64, 64).to(memory_format=memory_format)
    want = model(x).detach()
    fast = optimize_for_inference(model)
    given = x.clone(memory_format=torch.preserve_format)
    for _ in range(2):  # nothing is overwritten that the next call needs
        assert relative_difference(fast(x), want) < TOLERANCE
    assert torch.equal(x, given)
    found = tails(fast)
    assert (len(found), sum(tail.gate is not None for tail in found)) == (count, gated)
    assert all(tail.in_place for tail in found)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fast.modules()) == norms


def test_the_model_stays_as_it_is():
    model = eca_resnet18().train()
    before = copy.deepcopy(model.state_dict())
    optimize_for_inference(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_works_through_the_reference_too():
    model = trained_looking(small_eca_resnet())
    x = torch.randn(2, 3, 28, 28)
    fast = optimize_for_inference(model)
    with ecanet.backend("reference"):
        assert relative_difference(fast(x), model(x).detach()) < TOLERANCE


def test_gradients_of_the_input_are_right():
    model = trained_looking(small_eca_resnet())
    fast = optimize_for_inference(model)
    x = torch.randn(2, 3, 28, 28)
    gradients = []
    for network in (model, fast):
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(given).sum(), given)
        gradients.append(gradient)
    assert relative_difference(gradients[1], gradients[0]) < TOLERANCE


class Branches(nn.Module):
    """What must not be overwritten or folded: outputs with two readers, layers called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norm, self.shared_norm, self.frozen = nn.BatchNorm2d(8), nn.BatchNorm2d(8), FrozenBatchNorm2d(8)
        self.gate = ecanet.ECA(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        both = torch.relu(self.norm(y) + y)  # y has two readers
        z = self.shared_norm(self.shared(both)) + self.shared(x)
        z = z + z
        broadcast = self.gate(self.frozen(self.last(z))) + z.mean((2, 3), keepdim=True)
        return nn.functional.hardswish(broadcast) + self.gate(both) * 2 + 1


def test_what_others_read_is_left_alone():
    model = Branches().eval()
    trained_looking(model)
    model.frozen.running_mean.normal_()
    x = torch.randn(2, 8, 9, 9)
    fast = optimize_for_inference(model)
    assert relative_difference(fast(x), model(x).detach()) < TOLERANCE
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in fast.modules())


def test_a_residual_that_broadcasts():
    tail = InferenceTail(ecanet.ECA(4), act=1, in_place=True)
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(1, 4, 1, 1)
    want = torch.relu(tail.gate(x) + residual)
    with torch.no_grad():
        assert torch.equal(tail(x.clone(), residual), want.detach())


def test_hooks_on_a_gate_still_fire():
    model = trained_looking(small_eca_resnet())
    fast = optimize_for_inference(model)
    seen: list[torch.Size] = []
    tails(fast)[0].gate.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x = torch.randn(1, 3, 28, 28)
    assert relative_difference(fast(x), model(x).detach()) < TOLERANCE
    assert seen == [torch.Size((1, 32, 28, 28))]


def test_result_exports_and_compiles():
    model = trained_looking(small_eca_resnet())
    fast = optimize_for_inference(model)
    x = torch.randn(2, 3, 28, 28)
    want = model(x).detach()
    exported = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for other in (exported, compiled):
        assert relative_difference(other(x), want) < TOLERANCE
    assert relative_difference(exported(x[:1].repeat(5, 1, 1, 1)), want[:1].repeat(5, 1)) < TOLERANCE


class ShapeDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 1 else -x


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15: torch.jit is deprecated
        return torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1), check_trace=False)


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: "resnet50", TypeError, "torch.nn.Module, got str"),
        (lambda: nn.DataParallel(nn.Linear(1, 1)), TypeError, "such as model.module"),
        (scripted, TypeError, "scripted or traced"),
        (lambda: torch.compile(nn.Linear(1, 1)), TypeError, "before torch.compile"),
        (ShapeDependent, ValueError, "optimise the part of it that can be"),
    ],
    ids=["not a module", "parallel", "scripted", "compiled", "cannot be traced"],
)
def test_what_cannot_be_optimised_says_what_to_do(build, error, says):
    with pytest.raises(error, match=says):
        optimize_for_inference(build())


class InPlaceOperations(nn.Module):
    """Operations whose result nobody reads, but which write into what somebody does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        a.add_(x)
        b = self.second(x)
        nn.functional.relu(b, inplace=True)
        c = self.norm(self.third(x))
        c += x
        tied = nn.functional.conv2d(x, self.third.weight)
        total = a + b
        q = nn.functional.relu(b - 1, inplace=True)
        return torch.relu(c) + torch.relu(total) + q + tied


def test_operations_in_place_keep_their_meaning():
    model = trained_looking(InPlaceOperations())
    x = torch.randn(2, 8, 5, 5)
    want = model(x).detach()
    assert relative_difference(optimize_for_inference(model)(x), want) < TOLERANCE


def test_a_hook_on_a_convolution_keeps_what_it_saw():
    model = trained_looking(small_eca_resnet())
    seen: list[Tensor] = []
    model.layer1[0].conv2.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(1, 3, 28, 28)
    optimize_for_inference(model)(x)
    model(x)
    assert relative_difference(seen[0], seen[1].detach()) < TOLERANCE


class WritesBetweenGateAndAddition(nn.Module):
    """Each way reads, with its gate, what something later writes over, before both are added."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), ecanet.ECA(8)
        self.relu, self.way = nn.ReLU(inplace=True), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        z = self.gate(y)
        if self.way == "module":
            return z + self.relu(y)
        if self.way == "function":
            return z + torch.relu_(y)
        y.mul_(3)
        return z + x


@pytest.mark.parametrize("way", ["module", "function", "method"])
def test_a_gate_reads_its_input_before_others_write_into_it(way):
    model = trained_looking(WritesBetweenGateAndAddition(way))
    x = torch.randn(2, 8, 5, 5)
    want = model(x).detach()
    assert relative_difference(optimize_for_inference(model)(x), want) < TOLERANCE


class AddsNumbers(nn.Module):
    """Additions of what no tail is made for."""

    def forward(self, i: Tensor, x: Tensor) -> Tensor:
        both = (x > 0) + (x < -1)
        spectrum = torch.fft.fft(x) + torch.fft.fft(x)
        return (i + i) * (x.shape[0] + x.dim()) + both + spectrum.real


def test_additions_of_integers_and_complex_numbers_stay_what_they_are():
    i, x = torch.tensor([1, 2]), torch.tensor([0.5, -2.0])
    assert torch.equal(optimize_for_inference(AddsNumbers())(i, x), AddsNumbers()(i, x))


@pytest.mark.parametrize("block", ["", "layer1", "layer1.0"])
def test_hooks_on_blocks_would_be_lost_so_they_are_refused(block):
    model, seen = trained_looking(small_eca_resnet()), []
    model.get_submodule(block).register_forward_hook(lambda *args: seen.append(args))
    with pytest.raises(ValueError, match="has a hook, which the copy would lose: remove it"):
        optimize_for_inference(model)
    assert not seen


def test_weights_of_a_gate_that_are_trained_again_get_gradients():
    fast = optimize_for_inference(trained_looking(small_eca_resnet()))
    weights = [w for name, w in fast.named_parameters() if "conv.weight" in name and w.dim() == 3]
    for weight in weights:
        weight.requires_grad_()
    fast(torch.randn(2, 3, 28, 28)).square().sum().backward()
    assert weights
    assert all(weight.grad is not None for weight in weights)
