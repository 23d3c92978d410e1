"""The tail of a block at once, against its modules called one after another: values, gradients, statistics, hooks."""

import copy
import gc
import itertools
import math
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import equations
import pytest
import torch
import torch.multiprocessing
import torch.nn.utils.prune
import torchvision
from sync_processes import CASES as SYNC_CASES
from sync_processes import run_in_processes, training_step
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as module_hooks
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet.nn import ECA, SE, Gate, SEVar1, norm_gate_add_act
from ecanet.ops import backend as choice
from ecanet.ops import cpu

needs_kernels = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

C = 32  # the grouped gates of Table 2 need a multiple of 16

# Error relative to the largest value: a half type is rounded by every module of the plain path, and once here.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
both_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


class Tail(nn.Module):
    """A block's tail, in the passes over the data that norm, residual and activation take."""

    def __init__(self, norm: Any = None, gate: Any = None, act: Any = None) -> None:
        super().__init__()
        self.norm, self.gate, self.act = norm, gate, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return norm_gate_add_act(x, self.norm, self.gate, residual, self.act)


class OneAfterAnother(Tail):
    """The same modules, called."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        names = {"relu": nn.ReLU(), "relu6": nn.ReLU6(), "silu": nn.SiLU(), "hardswish": nn.Hardswish()}
        act = names.get(self.act, nn.Identity()) if self.act is None or isinstance(self.act, str) else self.act
        with ecanet.backend("reference"):
            x = x if self.norm is None else self.norm(x)
            x = x if self.gate is None else self.gate(x)
            return act(x if residual is None else x + residual)


def build(gate: str | None) -> nn.Module | None:
    """A gate by its name, or none."""
    if gate is None or gate == "with dropout":
        return None if gate is None else GateWithDropout(C)
    return ecanet.nn.build_gate(gate, C)


def plain(tail: Tail) -> OneAfterAnother:
    """The same modules, in the same state."""
    return OneAfterAnother(*copy.deepcopy((tail.norm, tail.gate, tail.act)))


def feature_map(*shape: int, layout: torch.memory_format = torch.contiguous_format, **kwargs: Any) -> Tensor:
    """Random, with channel means that differ and are not 0."""
    x = torch.randn(shape, **kwargs) + 2 * torch.randn(1, shape[1], *[1] * (len(shape) - 2), **kwargs)
    if layout is torch.channels_last and len(shape) in (4, 5):
        layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=layout)
    return x


def randomise_(module: nn.Module | None) -> nn.Module | None:
    """Weights and running statistics as after some training."""
    for name, t in (*module.named_parameters(), *module.named_buffers()) if module is not None else ():
        if t.is_floating_point():
            t.detach().copy_(torch.rand_like(t) + 0.5 if name.endswith("var") else torch.randn_like(t))
    return module


def step(tail: Tail, x: Tensor, residual: Tensor | None = None, dout: Tensor | None = None) -> dict[str, Any]:
    """Everything that a step of training shows of the tail."""
    x, residual = (t if t is None else t.detach().clone().requires_grad_() for t in (x, residual))
    tail.zero_grad()
    out = tail(x, residual)
    out.backward(torch.ones_like(out) if dout is None else dout.to(out.dtype))
    return {
        "output": out.detach(),
        "gradient of x": x.grad,
        "gradient of the residual": None if residual is None else residual.grad,
        **{f"gradient of {name}": p.grad for name, p in tail.named_parameters()},
        **{name: t.clone() for name, t in tail.named_buffers()},
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error, relative to the largest value or to 1: what goes in is of that size."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1)).item()


def assert_equal(got: dict[str, Any], want: dict[str, Any], tolerance: float, case: str = "") -> None:
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        assert (g is None) == (w is None), f"{case} {name}"
        if w is None:
            continue
        assert (g.shape, g.dtype) == (w.shape, w.dtype), f"{case} {name}"
        error = relative_error(g, w)
        assert error <= tolerance, f"{case} {name}: {error:.1e}"


def assert_as_one_after_another(
    tail: Tail, x: Tensor, residual: Tensor | None = None, steps: int = 1, tolerance: float | None = None
) -> None:
    """Output, strides, every gradient and every buffer, over some steps of training with other data in each."""
    other = plain(tail)
    for i in range(steps):
        dout = torch.randn_like(x)
        got = step(tail, (i + 1) * x - i, residual, dout)
        want = step(other, (i + 1) * x - i, residual, dout)
        assert_equal(got, want, tolerance or TOLERANCE[x.dtype], f"step {i}")
        assert got["output"].stride() == want["output"].stride()


# --- norms --------------------------------------------------------------------------------------------------------

NORMS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "large eps": lambda: nn.BatchNorm2d(C, eps=0.3),
    "cumulative average": lambda: nn.BatchNorm2d(C, momentum=None),
    "momentum 0": lambda: nn.BatchNorm2d(C, momentum=0.0),
    "momentum 1": lambda: nn.BatchNorm2d(C, momentum=1.0),
    "not affine": lambda: nn.BatchNorm2d(C, affine=False),
    "no bias": lambda: without_bias(nn.BatchNorm2d(C)),
    "no running statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "evaluation": lambda: nn.BatchNorm2d(C).eval(),
    "evaluation, not affine": lambda: nn.BatchNorm2d(C, affine=False).eval(),
    "evaluation, no running statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False).eval(),
    "frozen weights": lambda: nn.BatchNorm2d(C).requires_grad_(False),
    "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(C),
    "SyncBatchNorm of one process": lambda: nn.SyncBatchNorm(C),
    "GroupNorm": lambda: nn.GroupNorm(4, C),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
}


def without_bias(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.bias = None
    return norm


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "with residual"])
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_three_steps_with_every_norm(name, gate, residual) -> None:
    for layout in LAYOUTS.values():
        norm, gate_module = randomise_(NORMS[name]()), build(gate)
        tail = Tail(norm, gate_module, "relu").double()
        x = feature_map(3, C, 5, 4, layout=layout, dtype=torch.float64)
        assert_as_one_after_another(tail, x, torch.randn_like(x) if residual else None, steps=3)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (5, C)),
        (nn.BatchNorm1d, (3, C, 7)),
        (nn.BatchNorm2d, (3, C, 5, 4)),
        (nn.BatchNorm2d, (2, C, 1, 1)),
        (nn.BatchNorm2d, (1, C, 3, 1)),
        (nn.BatchNorm3d, (2, C, 3, 2, 5)),
        (nn.SyncBatchNorm, (5, C)),
    ],
    ids=lambda part: part.__name__ if isinstance(part, type) else str(part),
)
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_every_rank(norm, shape, gate) -> None:
    for layout, training in itertools.product(LAYOUTS.values(), [True, False]):
        gate_module = build(gate)
        tail = Tail(randomise_(norm(C)), gate_module, "relu").double().train(training)
        x = feature_map(*shape, layout=layout, dtype=torch.float64)
        assert_as_one_after_another(tail, x, torch.randn_like(x))


@both_layouts
def test_a_norm_that_starts_at_zero_learns(layout) -> None:
    """``zero_init_residual`` of ResNets: with gamma = 0 the output knows nothing of x, gamma's gradient must."""
    norm = nn.BatchNorm2d(C)
    nn.init.zeros_(norm.weight)
    for gate in (None, ECA(C), SE(C)):
        tail = Tail(copy.deepcopy(norm), gate, "relu").double()
        x = feature_map(3, C, 5, 4, layout=layout, dtype=torch.float64)
        assert_as_one_after_another(tail, x, torch.randn_like(x))
        assert tail.norm.weight.grad.abs().min() > 0


@both_layouts
def test_evaluation_leaves_the_norm_as_it_is(layout) -> None:
    norm = randomise_(nn.BatchNorm2d(C)).eval()
    before = copy.deepcopy(norm.state_dict())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            norm_gate_add_act(feature_map(2, C, 4, 4, layout=layout), norm, ECA(C))
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("gate", [None, "eca", "se", "se_var1"], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_without_gradients_the_values_and_the_statistics_are_the_same(gate, training, mode) -> None:
    for layout, name in itertools.product(LAYOUTS.values(), ["BatchNorm2d", "none", "cumulative average"]):
        gate_module = build(gate)
        tail = Tail(randomise_(NORMS[name]()), gate_module, "relu").double().train(training)
        other = plain(tail)
        with mode():
            x = feature_map(3, C, 5, 4, layout=layout, dtype=torch.float64)
            residual = torch.randn_like(x)
            got, want = tail(x, residual), other(x, residual)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dict(tail.named_buffers()), dict(other.named_buffers()), rtol=1e-12, atol=1e-12)


def test_a_norm_that_does_not_count_its_batches() -> None:
    norm = nn.BatchNorm2d(C)
    norm.num_batches_tracked = None  # of state dicts older than the counter
    assert_as_one_after_another(Tail(norm.double(), ECA(C).double()), feature_map(2, C, 3, 3, dtype=torch.float64))


# --- gates --------------------------------------------------------------------------------------------------------


class GateWithDropout(Gate):
    """Linear, with dropout inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.linear = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(0.5)

    def logits(self, s: Tensor) -> Tensor:
        return self.linear(self.dropout(s))


class GateWithNorm(Gate):
    """A bottleneck with a BatchNorm inside, as many attention modules have it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.fc1, self.norm = nn.Linear(channels, 4), nn.BatchNorm1d(4)
        self.fc2 = nn.Linear(4, channels)

    def logits(self, s: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.norm(self.fc1(s))))


class NormOfOnesOwn(nn.BatchNorm2d):
    """A norm that does something more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


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


# --- residual and activation --------------------------------------------------------------------------------------


class Softsign(nn.Module):
    """An activation that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs())


ACTS = [
    None,
    *("relu", "relu6", "silu", "hardswish"),
    *(nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.SiLU(), nn.SiLU(inplace=True)),
    *(nn.Hardswish(), nn.Hardswish(inplace=True), nn.GELU(), nn.LeakyReLU(0.1), nn.PReLU(), Softsign()),
]


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_every_activation(act, gate) -> None:
    for layout, norm in itertools.product(LAYOUTS.values(), [nn.BatchNorm2d(C), None]):
        gate_module = build(gate)
        tail = Tail(norm, gate_module, copy.deepcopy(act)).double()
        x = 3 * feature_map(3, C, 5, 4, layout=layout, dtype=torch.float64)
        if norm is None and gate is None and getattr(act, "inplace", False):
            continue  # it would write into x
        assert_as_one_after_another(tail, x)
        assert_as_one_after_another(tail, x, 3 * torch.randn_like(x))


@both_layouts
@pytest.mark.parametrize(
    ("name", "make"),
    {
        "as x": lambda x: torch.randn_like(x),
        "contiguous": lambda x: torch.randn(x.shape, dtype=x.dtype),
        "channels last": lambda x: torch.randn(x.shape, dtype=x.dtype).to(memory_format=torch.channels_last),
        "one map for all samples": lambda x: torch.randn(1, *x.shape[1:], dtype=x.dtype),
        "one number per channel": lambda x: torch.randn(x.shape[1], 1, 1, dtype=x.dtype),
        "expanded": lambda x: torch.randn(x.shape[1], 1, 1, dtype=x.dtype).expand(x.shape),
        "of a larger type": lambda x: torch.randn_like(x, dtype=torch.float64),
        "of a smaller type": lambda x: torch.randn_like(x, dtype=torch.bfloat16),
        "a slice": lambda x: torch.randn(3 * x.shape[0], *x.shape[1:], dtype=x.dtype)[::3],
    }.items(),
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_every_residual(name, make, layout) -> None:
    for gate in (None, ECA(C), SE(C)):
        tail = Tail(nn.BatchNorm2d(C), gate, "relu")
        x = feature_map(3, C, 5, 4, layout=layout)
        other, dout = plain(tail), torch.randn(x.shape)
        residual = make(x)
        assert_equal(step(tail, x, residual, dout), step(other, x, residual, dout), TOLERANCE[torch.float32])


@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
@pytest.mark.parametrize("act", [None, "relu", "silu"], ids=str)
def test_only_what_requires_a_gradient_gets_one(gate, act) -> None:
    x, residual = feature_map(3, C, 5, 4, dtype=torch.float64), torch.randn(3, C, 5, 4, dtype=torch.float64)
    for training, x_needs, residual_needs, weights_need in itertools.product([True, False], repeat=4):
        gate_module = build(gate)
        tail = Tail(nn.BatchNorm2d(C), gate_module, act).double().train(training).requires_grad_(weights_need)
        grads = []
        for module in (tail, plain(tail)):
            inputs = [x.clone().requires_grad_(x_needs), residual.clone().requires_grad_(residual_needs)]
            out = module(*inputs)
            assert out.requires_grad == (x_needs or residual_needs or weights_need)
            if out.requires_grad:
                out.square().sum().backward()
            grads.append([t.grad for t in (*inputs, *module.parameters())])
        assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
        for got, want in zip(*grads, strict=True):
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_x_may_be_its_own_residual() -> None:
    for act in ("relu", "silu", None):
        tail = Tail(nn.BatchNorm2d(C), ECA(C), act).double()
        other = plain(tail)
        x = feature_map(3, C, 5, 4, dtype=torch.float64).requires_grad_()
        (got,), (want,) = (torch.autograd.grad(m(x, x).square().sum(), x) for m in (tail, other))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_nothing_to_do_is_the_map_itself() -> None:
    x = torch.randn(2, C, 3, 3)
    assert norm_gate_add_act(x) is x
    assert torch.equal(norm_gate_add_act(x, act="relu"), x.relu())
    assert torch.equal(norm_gate_add_act(x, residual=x), 2 * x)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x.chunk(2, dim=0)[1],
        lambda x: x[:, :, :1, :1].expand_as(x),
        lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:],
    ],
    ids=["sliced", "transposed", "half of the batch", "expanded", "rows of channels last"],
)
def test_any_strides(view) -> None:
    tail = Tail(nn.BatchNorm2d(C), ECA(C), "relu").double()
    other = plain(tail)
    base = feature_map(4, C, 5, 4, dtype=torch.float64).requires_grad_()
    (got,), (want,) = (torch.autograd.grad(m(view(base), view(base)).square().sum(), base) for m in (tail, other))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_an_empty_batch() -> None:
    tail = Tail(nn.BatchNorm2d(C).eval(), ECA(C), "relu")
    x = torch.randn(0, C, 4, 4, requires_grad=True)
    out = tail(x, x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


# --- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["of the type of x", "of float32"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_smaller_types_are_as_close_to_float64_as_the_modules_are(gate, dtype, weights) -> None:
    for layout, act, training in itertools.product(LAYOUTS.values(), [None, "silu"], [True, False]):
        norm, gate_module = randomise_(nn.BatchNorm2d(C)), build(gate)
        tail = Tail(norm, gate_module, act).train(training)
        tail = tail.to(dtype) if weights == "of the type of x" else tail
        x = feature_map(4, C, 7, 7, layout=layout).to(dtype)
        residual, dout = torch.randn_like(x), torch.randn_like(x)
        exact = plain(tail).double()
        other = plain(tail)
        got, modules = step(tail, x, residual, dout), step(other, x, residual, dout)
        want = step(exact, x.double(), residual.double(), dout.double())
        for name, w in want.items():
            if w is None or not w.is_floating_point():
                continue
            assert (got[name].shape, got[name].dtype) == (modules[name].shape, modules[name].dtype), name
            error, error_of_modules = (relative_error(t[name], w) for t in (got, modules))
            assert error <= 1.5 * error_of_modules + TOLERANCE[dtype], f"{name}: {error:.1e}, {error_of_modules:.1e}"


def test_under_autocast_the_maps_stay_in_bfloat16() -> None:
    conv, tail = nn.Conv2d(3, C, 3), Tail(nn.BatchNorm2d(C), ECA(C), "silu")
    other = plain(tail)
    x = torch.randn(3, 3, 8, 8)
    results = []
    for module in (tail, other):
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
            out = module(y, y)
        assert y.dtype == out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), [conv.weight, *module.parameters()])
        assert {g.dtype for g in grads} == {torch.float32}
        results.append({"output": out, **{str(i): g for i, g in enumerate(grads)}})
    assert_equal(*results, 2 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("gate", ["se", "se_var3", "eca_ns", "eca"])
def test_autocast_does_not_reach_the_gate(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu")
    x = feature_map(3, C, 5, 4).requires_grad_()
    inputs = [x, *tail.parameters()]
    want = tail(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = tail(x, x)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (got, want)]
    torch.testing.assert_close(*grads)


def train_in_float16(
    backend: str, gate: str, scaler: torch.amp.GradScaler, steps: int
) -> tuple[list[float], list[Tensor]]:
    """Losses of a small network under autocast, and its weights before the first step and after each."""
    torch.manual_seed(0)
    network = ecanet.models.small_eca_resnet(gate, widths=[8, 16], num_classes=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    x, target = torch.randn(16, 3, 12, 12), torch.randint(4, (16,))
    losses, weights = [], [nn.utils.parameters_to_vector(network.parameters()).detach()]
    with ecanet.backend(backend):
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(network(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            weights.append(nn.utils.parameters_to_vector(network.parameters()).detach())
    return losses, weights


def assert_trained_alike(got: tuple[list[float], list[Tensor]], want: tuple[list[float], list[Tensor]]) -> None:
    """Losses up to what float16 rounds; weights up to 3 % of their way: gradients add up many roundings."""
    assert got[0] == pytest.approx(want[0], rel=2**-12)
    assert torch.equal(got[1][0], want[1][0])
    moved = want[1][-1] - want[1][0]
    assert moved.norm() > 0.1
    assert (got[1][-1] - want[1][-1]).norm() <= 2**-5 * moved.norm()


@pytest.mark.parametrize("gate", ["eca", "se"])
def test_training_in_float16_with_scaled_gradients_follows_the_reference(gate) -> None:
    runs = [
        train_in_float16(backend, gate, torch.amp.GradScaler("cpu", init_scale=2.0**10), steps=5)
        for backend in ("auto", "reference")
    ]
    assert_trained_alike(*runs)
    losses = runs[0][0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("gate", ["eca", "se"])
def test_gradients_that_overflow_are_seen_by_the_scaler_which_leaves_out_the_step(gate) -> None:
    runs = []
    for backend in ("auto", "reference"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
        runs.append(train_in_float16(backend, gate, scaler, steps=4))
        assert scaler.get_scale() == 2.0**10  # lowered once
    before, skipped, after = runs[0][1][:3]
    assert torch.equal(skipped, before)
    assert not torch.equal(after, before)
    assert_trained_alike(*runs)


@both_layouts
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_a_mean_much_larger_than_the_deviation_costs_no_more_digits_than_the_modules_lose(gate, layout) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate))
    exact, other = plain(tail).double(), plain(tail)
    x = (1000 + torch.randn(4, C, 14, 14)).contiguous(memory_format=layout)
    dout = torch.randn_like(x)
    got, modules, want = step(tail, x, None, dout), step(other, x, None, dout), step(exact, x.double(), None, dout)
    for name in (name for name in want if want[name] is not None and want[name].is_floating_point()):
        error, error_of_modules = (relative_error(t[name], want[name]) for t in (got, modules))
        assert error <= 2 * error_of_modules + TOLERANCE[torch.float32], f"{name}: {error:.1e}, {error_of_modules:.1e}"


# --- who is called ------------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Names of the classes of the modules that are called from now on."""
    names: list[str] = []
    original = nn.Module.__call__

    def record(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names.append(type(self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", record)
    return names


TAKEN_OVER = {
    "BatchNorm, ECA, ReLU": (nn.BatchNorm2d(C), ECA(C), nn.ReLU(inplace=True), []),
    "BatchNorm, SE, SiLU": (nn.BatchNorm2d(C), SE(C), nn.SiLU(), []),
    "BatchNorm in evaluation": (nn.BatchNorm2d(C).eval(), ECA(C), nn.Hardswish(), []),
    "BatchNorm alone": (nn.BatchNorm2d(C), None, nn.ReLU6(), []),
    "SyncBatchNorm": (nn.SyncBatchNorm(C), ECA(C), None, []),
    "FrozenBatchNorm2d": (FrozenBatchNorm2d(C), ECA(C), "relu", []),
    "a gate of one's own": (nn.BatchNorm2d(C), GateWithDropout(C), "relu", ["Dropout", "Linear"]),
    "a norm of one's own is called": (NormOfOnesOwn(C), ECA(C), "relu", ["NormOfOnesOwn"]),
    "GroupNorm is called": (nn.GroupNorm(4, C), ECA(C), "relu", ["GroupNorm"]),
    "GELU is called": (nn.BatchNorm2d(C), ECA(C), nn.GELU(), ["GELU"]),
    "what is no Gate is called": (nn.BatchNorm2d(C), nn.Identity(), "relu", ["Identity"]),
}


@needs_kernels
@pytest.mark.parametrize(("norm", "gate", "act", "modules"), TAKEN_OVER.values(), ids=TAKEN_OVER)
def test_the_kernels_take_over_what_they_know(norm, gate, act, modules, called) -> None:
    norm_gate_add_act(torch.randn(2, C, 4, 4, requires_grad=True), norm, gate, torch.randn(2, C, 4, 4), act)
    assert called == modules


def test_on_the_reference_the_modules_are_called(called) -> None:
    with ecanet.backend("reference"):
        norm_gate_add_act(torch.randn(2, C, 4, 4), nn.BatchNorm2d(C), ECA(C), None, nn.ReLU())
    assert called == ["BatchNorm2d", "ECA", "ReLU"]


def forward_hook(module: nn.Module, log: list[str]) -> Any:
    return module.register_forward_hook(lambda *_: log.append("forward"))


def forward_pre_hook(module: nn.Module, log: list[str]) -> Any:
    return module.register_forward_pre_hook(lambda *_: log.append("forward pre"))


def full_backward_hook(module: nn.Module, log: list[str]) -> Any:
    return module.register_full_backward_hook(lambda *_: log.append("backward"))


def full_backward_pre_hook(module: nn.Module, log: list[str]) -> Any:
    return module.register_full_backward_pre_hook(lambda *_: log.append("backward pre"))


def replaced_forward(module: nn.Module, log: list[str]) -> Any:
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        log.append("replaced forward")
        return original(x)

    module.forward = forward


HOOKS = [forward_hook, forward_pre_hook, full_backward_hook, full_backward_pre_hook, replaced_forward]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", ["norm", "gate", "act"])
def test_hooks_fire_and_nothing_else_changes(where, hook) -> None:
    for gate in (ECA(C), SE(C)):
        tail = Tail(nn.BatchNorm2d(C), gate, nn.ReLU()).double()
        want = plain(tail)
        log: list[str] = []
        hook(getattr(tail, where), log)
        x = feature_map(3, C, 5, 4, dtype=torch.float64)
        got = step(tail, x, x)
        assert len(log) == 1
        assert_equal(got, step(want, x, x), TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    "register",
    [
        module_hooks.register_module_forward_hook,
        module_hooks.register_module_forward_pre_hook,
        module_hooks.register_module_full_backward_hook,
    ],
)
def test_hooks_on_all_modules_see_every_module(register) -> None:
    seen: list[str] = []
    tail = Tail(nn.BatchNorm2d(C), ECA(C), nn.ReLU())
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        step(tail, feature_map(3, C, 5, 4), torch.randn(3, C, 5, 4))
    finally:
        handle.remove()
    assert {"BatchNorm2d", "ECA", "ReLU"} <= set(seen)


def test_a_hook_that_changes_the_output_of_the_norm_is_obeyed() -> None:
    norm, gate, x = nn.BatchNorm2d(C), ECA(C), feature_map(3, C, 5, 4)
    norm.register_forward_hook(lambda module, args, out: out + 1)
    torch.testing.assert_close(norm_gate_add_act(x, norm, gate), gate(norm(x)))


# --- graphs and transforms ----------------------------------------------------------------------------------------


@pytest.fixture
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


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


def test_functional_derivatives_take_the_plain_path() -> None:
    tail = Tail(randomise_(nn.BatchNorm2d(C)).eval(), SE(C), "relu").double()
    parameters = dict(tail.named_parameters())
    x = feature_map(3, C, 5, 4, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(tail, weights, (x, x)).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    want = step(plain(tail), x, x, 2 * plain(tail)(x, x).detach())
    for name in parameters:
        torch.testing.assert_close(got[0][name], want[f"gradient of {name}"])
    torch.testing.assert_close(got[1], want["gradient of x"] + want["gradient of the residual"])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_forward_derivatives_take_the_plain_path(training) -> None:
    tail = Tail(nn.BatchNorm2d(C, track_running_stats=not training), ECA(C), "silu").double().train(training)
    x, tangent = feature_map(3, C, 5, 4, dtype=torch.float64), torch.randn(3, C, 5, 4, dtype=torch.float64)
    _, want = torch.func.jvp(plain(tail), (x,), (tangent,))
    _, got = torch.func.jvp(tail, (x,), (tangent,))
    torch.testing.assert_close(got, want)
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(tail(forward_ad.make_dual(x, tangent))).tangent, want)


def test_vmap_over_sets_of_maps() -> None:
    tail = Tail(randomise_(nn.BatchNorm2d(C)).eval(), ECA(C), "relu")
    x = feature_map(6, C, 5, 4)
    torch.testing.assert_close(torch.vmap(tail)(x.unflatten(0, (3, 2))), tail(x).unflatten(0, (3, 2)))


def test_subclasses_of_tensor_see_torch_functions() -> None:
    seen = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs)

    x = feature_map(3, C, 5, 4)
    tail = Tail(nn.BatchNorm2d(C).eval(), ECA(C), "relu")
    out = tail(x.as_subclass(Logged))
    assert isinstance(out, Logged)
    assert "batch_norm" in seen
    torch.testing.assert_close(out.as_subclass(Tensor), tail(x))


@pytest.mark.parametrize("gate", [None, "eca", "se", "with dropout"], ids=str)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing(gate, reentrant) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu").double()
    other = plain(tail)
    x = feature_map(3, C, 5, 4, dtype=torch.float64)

    class Checkpointed(Tail):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            inside = OneAfterAnother.forward if self.is_plain else Tail.forward
            return checkpoint(inside, self, x, residual, use_reentrant=reentrant)

    results = []
    for module in (tail, other):
        wrapped = Checkpointed(module.norm, module.gate, module.act)
        wrapped.is_plain = module is other
        torch.manual_seed(1)
        results.append(step(wrapped, x, x))
    assert_equal(*results, TOLERANCE[torch.float64])


@pytest.mark.parametrize("gate", [None, "eca", "se", "with dropout"], ids=str)
def test_a_kept_graph_gives_the_same_gradients_again(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu")
    x = feature_map(3, C, 5, 4).requires_grad_()
    out = tail(x, x).square().sum()
    inputs = [x, *tail.parameters()]
    first, second = (torch.autograd.grad(out, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.autograd.grad(out, inputs)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs)


@pytest.mark.parametrize("gate", [None, "eca", "se", "with dropout"], ids=str)
def test_saved_tensors_may_be_stored_elsewhere(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate))
    x = feature_map(3, C, 5, 4).requires_grad_()
    grads = []
    for pack in (lambda t: t, lambda t: t.clone()):
        torch.manual_seed(1)
        with saved_tensors_hooks(pack, lambda t: t):
            out = tail(x, x)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *tail.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_nothing_is_kept_alive_by_a_circle(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu")
    gc.disable()
    try:
        for backward in (False, True):
            x = feature_map(3, C, 5, 4).requires_grad_()
            out = tail(x)
            if backward:
                out.sum().backward()
            alive = [weakref.ref(x), weakref.ref(out)]
            del x, out
            assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("gate", [None, "eca", "se"], ids=str)
def test_several_gradients_at_once(gate) -> None:
    tail = Tail(nn.BatchNorm2d(C), build(gate), "relu")
    x = feature_map(3, C, 5, 4).requires_grad_()
    out = tail(x, x)
    dout = torch.randn(4, *out.shape)
    (got,) = torch.autograd.grad(out, x, dout, retain_graph=True, is_grads_batched=True)
    want = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in dout]
    torch.testing.assert_close(got, torch.stack(want))


def test_deterministic_algorithms_are_good_enough_and_repeat_themselves() -> None:
    torch.use_deterministic_algorithms(True)  # no warn_only: an operation without a deterministic way would raise
    x = feature_map(3, C, 5, 4)
    tail = Tail(nn.BatchNorm2d(C, track_running_stats=False), ECA(C), "relu")
    results = [step(tail, x, x) for _ in range(2)]
    assert_equal(*results, 0.0)


# --- memory -------------------------------------------------------------------------------------------------------


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, every storage counted once; parameters are not counted."""
    storages = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = function()
    assert out.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("act", [None, "relu", "relu6", "silu"], ids=str)
def test_an_addition_alone_keeps_no_more_than_torchs_own(act) -> None:
    x, residual = (torch.randn(2, C, 28, 28, requires_grad=True) for _ in range(2))
    functions = {"relu": torch.relu_, "relu6": nn.functional.relu6, "silu": nn.functional.silu}
    want = saved_bytes(lambda: functions.get(act, lambda y: y)(x + residual))
    assert saved_bytes(lambda: norm_gate_add_act(x, residual=residual, act=act)) == want


@both_layouts
@pytest.mark.parametrize("act", ["relu", "relu6"])
@pytest.mark.parametrize("gate", [None, "eca", "se", "eca_ns"], ids=str)
def test_a_gate_costs_no_memory_in_training(gate, act, layout) -> None:
    norm, gate_module = nn.BatchNorm2d(C), build(gate)
    x = feature_map(2, C, 28, 28, layout=layout).requires_grad_()
    residual = torch.randn_like(x).requires_grad_()
    in_place = {"relu": nn.ReLU(inplace=True), "relu6": nn.ReLU6(inplace=True)}[act]
    want = saved_bytes(lambda: in_place(norm(x) + residual))
    got = saved_bytes(lambda: norm_gate_add_act(x, norm, gate_module, residual, act))
    assert want >= 2 * x.numel() * 4
    if cpu.why_not() is None:
        assert got <= 1.02 * want


@needs_kernels
def test_a_step_of_eca_resnet50_keeps_what_resnet50_keeps() -> None:
    x = torch.randn(1, 3, 224, 224)
    plain_network, with_gates = torchvision.models.resnet50(), ecanet.models.eca_resnet50()
    want = saved_bytes(lambda: plain_network(x).sum())
    assert saved_bytes(lambda: with_gates(x).sum()) <= 1.02 * want


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes of one group sees in every case."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    if cpu.why_not() is not None:
        pytest.skip(f"torch's own SyncBatchNorm wants a GPU, and {cpu.why_not()}")
    return run_in_processes(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", SYNC_CASES)
def test_sync_batch_norm_of_two_processes_is_one_process_on_the_joined_batch(case, two_processes) -> None:
    joined = training_step(case, sync=False)
    first, second = (seen[case] for seen in two_processes)
    assert first.keys() == joined.keys()
    for name, want in joined.items():
        if "gradient of norm" in name or "gradient of gate" in name:  # what DDP adds up
            got = first[name] + second[name]
        elif name.startswith("norm."):
            assert torch.equal(first[name], second[name])
            got = first[name]
        else:
            got = torch.cat([first[name], second[name]])
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_where_every_process_has_an_empty_batch_the_statistics_shrink_as_in_torch(two_processes) -> None:
    for seen in (process["nothing"] for process in two_processes):
        assert seen["output 1"].shape == seen["gradient of x 1"].shape == (0, 16, 5, 3)
        assert seen["norm.num_batches_tracked"] == 2
        assert torch.equal(seen["norm.running_mean"], torch.zeros(16, dtype=torch.float64))
        torch.testing.assert_close(seen["norm.running_var"], torch.full((16,), 0.9**2, dtype=torch.float64))
        assert not any(t.any() for name, t in seen.items() if name.startswith("gradient of"))


# --- mistakes -----------------------------------------------------------------------------------------------------

X = torch.randn(2, C, 3, 3)


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a name for the norm": ({"norm": "batch"}, TypeError, "norm must be a module or None, got str"),
    "a class for the norm": ({"norm": nn.BatchNorm2d}, TypeError, "norm must be a module or None, got type"),
    "a function for the gate": ({"gate": torch.sigmoid}, TypeError, "gate must be a module or None, got builtin_func"),
    "a name for the gate": ({"gate": "eca"}, TypeError, "gate must be a module or None, got str"),
    "a function for the activation": ({"act": torch.relu}, TypeError, "act must be a name, an activation module or No"),
    "a class for the activation": ({"act": nn.ReLU}, TypeError, "act must be a name, .* or None, got type"),
    "a number for the activation": ({"act": 1}, TypeError, "act must be a name, .* or None, got int"),
    "an unknown activation": (
        {"act": "gelu"},
        ValueError,
        r"one of \['relu', 'relu6', 'silu', 'hardswish'\].*got 'gelu'",
    ),
    "a capital letter": ({"act": "ReLU"}, ValueError, "act must be one of .*got 'ReLU'"),
    "channels of the norm": ({"norm": nn.BatchNorm2d(C + 1)}, RuntimeError, f"contain {C} elements not {C + 1}"),
    "in evaluation": ({"norm": nn.BatchNorm2d(C + 1).eval()}, RuntimeError, f"contain {C} elements not {C + 1}"),
    "rank of the norm, 1": ({"norm": nn.BatchNorm1d(C)}, ValueError, "expected 2D or 3D input"),
    "rank of the norm, 3": ({"norm": nn.BatchNorm3d(C)}, ValueError, "expected 5D input"),
    "channels of a frozen norm": ({"norm": FrozenBatchNorm2d(C + 1)}, RuntimeError, "must match the size"),
    "channels of the gate": ({"gate": ECA(C + 1)}, ValueError, f"x has {C} channels in dimension 1.*built for {C + 1}"),
    "behind a norm": ({"gate": SE(C + 1), "norm": nn.BatchNorm2d(C)}, ValueError, f"x has {C} channels in dimension 1"),
    "integers": ({"x": X.long()}, TypeError, "x must be floating point, got torch.int64"),
    "type of the norm": ({"norm": nn.BatchNorm2d(C), "x": X.double()}, RuntimeError, "dtype|[Ee]xpected|type"),
    "in evaluation, too": ({"norm": nn.BatchNorm2d(C).double().eval()}, RuntimeError, "dtype|[Ee]xpected|type"),
    "size of the residual": ({"residual": torch.randn(2, C, 3, 2)}, RuntimeError, "must match the size"),
    "behind a gate": ({"residual": torch.randn(2, C, 3, 2), "gate": ECA(C)}, RuntimeError, "must match the size"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_mistake_gets_the_same_error_with_and_without_kernels(arguments, error, message, backend) -> None:
    with ecanet.backend(backend), pytest.raises(error, match=message):
        norm_gate_add_act(**{"x": X} | arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(C), (1, C)),
        (nn.BatchNorm2d(C), (1, C, 1, 1)),
        (nn.BatchNorm2d(C, track_running_stats=False).eval(), (1, C, 1, 1)),
    ],
    ids=["1d", "2d", "evaluation without statistics"],
)
def test_a_batch_of_one_value_per_channel_has_no_variance(norm, shape, backend) -> None:
    norm, before = copy.deepcopy(norm), copy.deepcopy(norm.state_dict())
    with ecanet.backend(backend), pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_gate_add_act(torch.randn(shape), norm, ECA(C))
    before.pop("num_batches_tracked", None)  # torch counts the batch first
    assert all(torch.equal(t, norm.state_dict()[name]) for name, t in before.items())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X.long(), TypeError, "x must be floating point, got torch.int64"),
        (X[0, 0], ValueError, r"channels in dimension 1|must have shape"),
        (torch.randn(2, C, 1, 1, 1, 1), ValueError, r"x must have shape \(N, 32, \*spatial\) with 0 to 3 spatial"),
    ],
    ids=["integers", "one map", "four spatial dimensions"],
)
def test_maps_that_a_gate_refuses(x, error, message) -> None:
    for backend in ("auto", "reference"):
        with ecanet.backend(backend), pytest.raises(error, match=message):
            norm_gate_add_act(x, gate=ECA(C))


def nan_places() -> Iterator[tuple[int, ...]]:
    yield from [(0, 0, 0, 0), (1, 3, 2, 1), (2, C - 1, 4, 3)]


@both_layouts
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("gate", [None, "eca", "se_var1"], ids=str)
@pytest.mark.parametrize("norm", ["BatchNorm2d", "evaluation", "none"])
def test_nan_and_inf_reach_what_they_reach_in_the_modules(norm, gate, value, layout) -> None:
    for place in nan_places():
        gate_module = build(gate)
        tail = Tail(NORMS[norm](), gate_module, "relu")
        x = feature_map(3, C, 5, 4, layout=layout)
        x[place] = value
        other = plain(tail)
        got, want = step(tail, x, x), step(other, x, x)
        for name, w in want.items():
            if w is not None and name in ("output", "norm.running_mean", "norm.running_var"):
                torch.testing.assert_close(got[name], w, rtol=1e-4, atol=1e-4, equal_nan=True, msg=f"{name} {place}")
