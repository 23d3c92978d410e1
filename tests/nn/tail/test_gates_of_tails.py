"""Every gate in the tail, and what others do to its weights and layers."""

import copy
import itertools
from collections.abc import Callable

import equations
import pytest
import torch
import torch.nn.utils.prune
from tails import (
    LAYOUTS,
    TOLERANCE,
    C,
    GateWithDropout,
    Tail,
    assert_as_one_after_another,
    assert_equal,
    build,
    feature_map,
    plain,
    randomise_,
    relative_error,
    step,
)
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet.nn import ECA, SE, Gate, SEVar1, norm_gate_add_act
from ecanet.ops import cpu
from tests.kernels_here import needs_kernels


class GateWithNorm(Gate):
    """A bottleneck with a BatchNorm inside, as many attention modules have it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.fc1, self.norm = nn.Linear(channels, 4), nn.BatchNorm1d(4)
        self.fc2 = nn.Linear(4, channels)

    def logits(self, s: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.norm(self.fc1(s))))


class DoubledECA(ECA):
    """Other logits from the same weights."""

    def logits(self, s: Tensor) -> Tensor:
        return 2 * super().logits(s)


class ShiftedECA(ECA):
    """Another gate from the same logits."""

    def gate(self, s: Tensor) -> Tensor:
        return 0.5 + super().gate(s)


class ECAWithItsOwnForward(ECA):
    """Attention that is added."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class SpatialAttention(nn.Module):
    """No function of the channel means, and no subclass of Gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


GATES: dict[str, Callable[[int], nn.Module]] = {
    **equations.GATES,
    "eca, k = 1": lambda c: ECA(c, kernel_size=1),
    "eca wider than the channels": lambda c: ECA(c, kernel_size=2 * c + 1),
    "eca, all channels circular": lambda c: ECA(c - 1 + c % 2, kernel_size=c - 1 + c % 2, circular=True),
    "eca with frozen weights": lambda c: ECA(c).requires_grad_(False),
    "se with frozen weights": lambda c: SE(c).requires_grad_(False),
    "with a BatchNorm inside": GateWithNorm,
    "other logits": DoubledECA,
    "another gate": ShiftedECA,
    "a forward of its own": ECAWithItsOwnForward,
    "no Gate": SpatialAttention,
}


@pytest.mark.parametrize("norm", ["BatchNorm2d", "evaluation", "none"])
@pytest.mark.parametrize("name", GATES)
def test_every_gate(name, norm) -> None:
    for layout in LAYOUTS.values():
        gate = randomise_(GATES[name](C))
        channels = getattr(gate, "channels", C)
        norm_module = None if norm == "none" else nn.BatchNorm2d(channels).train(norm == "BatchNorm2d")
        tail = Tail(randomise_(norm_module), gate, "relu").double()
        x = feature_map(3, channels, 5, 4, layout=layout, dtype=torch.float64)
        assert_as_one_after_another(tail, x, torch.randn_like(x), steps=2)


@pytest.mark.parametrize("gate", ["eca", "se", "eca_ns"])
def test_weights_that_are_computed_from_others(gate) -> None:
    """As ``torch.nn.utils.parametrizations`` has it: weight normalisation, pruning, adapters."""

    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    gate_module = build(gate)
    owner = {"eca": "conv", "se": "fc2", "eca_ns": ""}[gate]
    nn.utils.parametrize.register_parametrization(gate_module.get_submodule(owner), "weight", Halved())
    tail = Tail(nn.BatchNorm2d(C), gate_module, "relu").double()
    assert_as_one_after_another(tail, feature_map(3, C, 5, 4, dtype=torch.float64), steps=2)


class GateOfAnotherTensor(Gate):
    """Reads a tensor that nothing of its own shows."""

    def __init__(self, channels: int, others: Tensor) -> None:
        super().__init__(channels)
        self.others = [others]

    def logits(self, s: Tensor) -> Tensor:
        return s * self.others[0].to(s.dtype).exp()


@needs_kernels
def test_a_gate_that_reads_what_is_not_its_own_is_refused_where_a_gradient_would_be_lost() -> None:
    x, weight = feature_map(3, C, 5, 4), torch.ones(C, requires_grad=True)
    gate = GateOfAnotherTensor(C, weight)
    if cpu.why_not() is None:
        with pytest.raises(RuntimeError, match=r"shape \(32,\).*not among its parameters\(\): register it as one"):
            norm_gate_add_act(x.requires_grad_(), nn.BatchNorm2d(C), gate)
    with ecanet.backend("reference"):
        norm_gate_add_act(x, nn.BatchNorm2d(C), gate).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    with torch.no_grad():
        norm_gate_add_act(x, nn.BatchNorm2d(C), gate)
    norm_gate_add_act(x, nn.BatchNorm2d(C), GateOfAnotherTensor(C, weight.detach())).sum().backward()


@needs_kernels
def test_a_gate_of_a_foreign_tensor_is_refused_before_the_batch_is_counted() -> None:
    norm, gate = nn.BatchNorm2d(C), GateOfAnotherTensor(C, torch.ones(C, requires_grad=True))
    if cpu.why_not() is None:
        for x in (feature_map(3, C, 5, 4), feature_map(3, C, 5, 4).requires_grad_()):
            with pytest.raises(RuntimeError, match="not among its parameters"):
                norm_gate_add_act(x, norm, gate)
            with pytest.raises(RuntimeError, match="not among its parameters"):
                norm_gate_add_act(x, None, gate, None, "relu")
        assert norm.num_batches_tracked == 0
        assert torch.equal(norm.running_mean, torch.zeros(C))


@pytest.mark.parametrize("gate", ["eca", "se", "eca_ns"])
def test_parameters_that_are_computed_from_others_by_functional_call(gate) -> None:
    module, x = build(gate), feature_map(3, C, 5, 4)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        halves = {name: 0.5 * p for name, p in module.named_parameters()}
        with ecanet.backend(backend):
            out = torch.func.functional_call(module, halves, (x,))
        return torch.autograd.grad(out.square().sum(), list(module.parameters()))

    for got, want in zip(gradients("auto"), gradients("reference"), strict=True):
        assert relative_error(got, want) < 1e-4


class GateOfABuffer(Gate):
    """Scales the means by a buffer, and follows them with another where it is trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.strength: Tensor
        self.average: Tensor
        self.register_buffer("strength", torch.ones(()))
        self.register_buffer("average", torch.zeros(channels))

    def logits(self, s: Tensor) -> Tensor:
        if self.training:
            self.average.mul_(0.9).add_(s.detach().mean(0), alpha=0.1)
        return s.mul_(2) * self.weight * self.strength


def test_a_buffer_that_is_changed_between_forward_and_backward_is_an_error() -> None:
    gate, x = GateOfABuffer(C), feature_map(3, C, 5, 4).requires_grad_()
    for backend in ("auto", "reference"):
        with ecanet.backend(backend):
            out = gate(x)
        gate.strength.mul_(100)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_a_gate_may_write_into_its_means_and_keep_an_average(grad) -> None:
    gate, x = GateOfABuffer(C), feature_map(3, C, 5, 4)
    other = copy.deepcopy(gate)
    with torch.set_grad_enabled(grad):
        got = norm_gate_add_act(x, None, gate)
        with ecanet.backend("reference"):
            want = norm_gate_add_act(x, None, other)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gate.average, other.average)
    assert not gate.average.requires_grad
    copy.deepcopy(gate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [None, "eca"])
def test_a_frozen_norm_of_a_larger_type_decides_the_type_everywhere(gate, dtype) -> None:
    x, frozen, module = feature_map(2, C, 5, 4).to(dtype), FrozenBatchNorm2d(C), build(gate)
    outputs = []
    for backend in ("auto", "reference"):
        with ecanet.backend(backend):
            outputs.append(norm_gate_add_act(x, frozen, module, x, "relu"))
    assert outputs[0].dtype == outputs[1].dtype == torch.float32
    torch.testing.assert_close(outputs[0], outputs[1])


def test_pruned_squeeze_and_excitation_follows_its_mask() -> None:
    gate, x = SE(C, 4), feature_map(3, C, 5, 4)
    torch.nn.utils.prune.l1_unstructured(gate.fc1, "weight", amount=0.5)
    before = gate(x)
    with torch.no_grad():
        gate.fc1.weight_orig.zero_()
    assert not torch.equal(gate(x), before)
    for _ in range(2):
        norm_gate_add_act(x, nn.BatchNorm2d(C), gate).square().sum().backward()
    assert gate.fc1.weight_orig.grad is not None


def pruned(eca: ECA) -> ECA:
    torch.nn.utils.prune.random_unstructured(eca.conv, "weight", amount=1)
    return eca


def fixed_length(eca: ECA) -> ECA:
    torch.nn.utils.parametrizations.weight_norm(eca.conv)
    return eca


def hooked(eca: ECA) -> ECA:
    eca.conv.register_forward_hook(lambda module, inputs, output: 3 * output)
    return eca


@pytest.mark.parametrize("circular", [False, True], ids=["", "circular"])
@pytest.mark.parametrize("change", [pruned, fixed_length, hooked])
def test_what_others_do_to_the_convolution_of_eca_is_obeyed(change, circular) -> None:
    eca = change(ECA(C, 5, circular=circular))
    x = feature_map(3, C, 5, 4)
    means = x.mean((2, 3))
    want = x * torch.sigmoid(eca.conv(means[:, None])[:, 0])[:, :, None, None]
    torch.testing.assert_close(eca(x), want)
    torch.testing.assert_close(norm_gate_add_act(x, None, eca), want)
    tail = Tail(nn.BatchNorm2d(C), eca, "relu")
    dout = torch.randn(x.shape)
    wants = step(plain(tail), x, x, dout) if change is not pruned else None  # a pruned module cannot be copied
    got = step(tail, x, x, dout)
    if wants is not None:
        assert_equal(got, wants, TOLERANCE[torch.float32])
    assert all(p.grad is not None for p in eca.parameters())


@pytest.mark.parametrize("channels", [1, 2, 3, 17, 67])
def test_odd_numbers_of_channels(channels) -> None:
    for layout, gate in itertools.product(LAYOUTS.values(), [ECA(channels, 3), SEVar1(channels), None]):
        tail = Tail(randomise_(nn.BatchNorm2d(channels)), gate, "relu").double()
        x = feature_map(3, channels, 5, 3, layout=layout, dtype=torch.float64)
        assert_as_one_after_another(tail, x, torch.randn_like(x))


@pytest.mark.parametrize("switch", [False, True], ids=["", "evaluation between forward and backward"])
def test_dropout_inside_a_gate_drops_the_same_backward(switch) -> None:
    tail = Tail(nn.BatchNorm2d(C), GateWithDropout(C)).double()
    x = feature_map(3, C, 5, 4, dtype=torch.float64).requires_grad_()
    grads, after = [], []
    for module in (tail, plain(tail)):
        torch.manual_seed(1)
        out = module(x)
        torch.manual_seed(2)
        module.train(not switch)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *module.parameters()]))
        after.append(torch.rand(3))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)
    assert torch.equal(*after)  # the backward pass draws no random numbers that somebody else will miss


def test_what_is_called_inside_a_gate_is_called_once_a_step() -> None:
    gate, calls = GateWithNorm(C), []
    gate.fc1.register_forward_hook(lambda *_: calls.append("fc1"))
    step(Tail(nn.BatchNorm2d(C), gate), feature_map(3, C, 5, 4))
    assert calls == ["fc1"]
    assert gate.norm.num_batches_tracked == 1


@pytest.mark.parametrize("gate", ["eca", "se", "eca_ns"])
def test_the_gradient_belongs_to_the_weights_of_the_forward_pass(gate) -> None:
    """Here ``functional_call`` lends the module other weights, and takes them back before the backward pass."""
    tail = Tail(randomise_(nn.BatchNorm2d(C)), build(gate), "relu").double()
    lent = {name: torch.randn_like(p).requires_grad_() for name, p in tail.named_parameters()}
    x = feature_map(3, C, 5, 4, dtype=torch.float64).requires_grad_()
    grads = []
    for module in (tail, plain(tail)):
        out = torch.func.functional_call(module, lent, (x,))
        grads.append(torch.autograd.grad(out.square().sum(), [x, *lent.values()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


def test_weights_changed_between_forward_and_backward_are_an_error() -> None:
    for gate, norm in itertools.product([ECA(C), SE(C)], [None, nn.BatchNorm2d(C)]):
        out = norm_gate_add_act(feature_map(2, C, 4, 4).requires_grad_(), norm, gate, act="relu")
        with torch.no_grad():
            next(gate.parameters()).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


class GateOfAnyShape(Gate):
    """The same for all samples, all channels or both."""

    def __init__(self, channels: int, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.randn(channels))
        self.make = make

    def logits(self, s: Tensor) -> Tensor:
        return self.make(s, self.weight)


ANY_SHAPE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "(1, C)": lambda s, weight: weight[None],
    "(C,)": lambda s, weight: weight,
    "(N, 1)": lambda s, weight: (s * weight).mean(1, keepdim=True),
    "(1, 1)": lambda s, weight: (s * weight).mean()[None, None],
    "()": lambda s, weight: weight[0],
}


@pytest.mark.parametrize("name", ANY_SHAPE)
def test_a_gate_may_be_the_same_for_all_samples_or_channels(name) -> None:
    for norm in (nn.BatchNorm2d(C), nn.BatchNorm2d(C).eval(), None):
        tail = Tail(norm, GateOfAnyShape(C, ANY_SHAPE[name]), "relu").double()
        x = feature_map(3, C, 5, 4, dtype=torch.float64)
        assert_as_one_after_another(tail, x, x)
        with torch.no_grad():
            torch.testing.assert_close(tail(x), plain(tail)(x))
        x.requires_grad_()
        firsts = [torch.autograd.grad(t(x).square().sum(), x, create_graph=True)[0] for t in (tail, plain(tail))]
        got, want = (torch.autograd.grad(first.square().sum(), x)[0] for first in firsts)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@needs_kernels
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [lambda s, w: torch.cat([w, w]), lambda s, w: s[:, None] * w], ids=["2 C", "3 axes"])
def test_a_gate_of_another_shape_is_refused(make, grad) -> None:
    x, gate = feature_map(3, C, 5, 4), GateOfAnyShape(C, make)
    if cpu.why_not() is None:
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(RuntimeError, match=rf"must return the shape \(3, {C}\) or what"),
        ):
            norm_gate_add_act(x, nn.BatchNorm2d(C), gate)
