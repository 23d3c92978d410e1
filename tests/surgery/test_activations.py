"""where="conv" knows an activation by what it does, however it is written; what it cannot judge, it says."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecanet import insert_gates_, remove_gates_
from ecanet.surgery.find.activations import kind_of

C = 8
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Network(nn.Module):
    """Convolution, norm, some code, another convolution."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor], norm: bool = True, dims: int = 2) -> None:
        super().__init__()
        self.code = code
        self.conv = CONVOLUTIONS[dims](3, C, 3, padding=1)
        self.bn = NORMS[dims](C) if norm else nn.Identity()
        self.slope, self.beta = nn.Parameter(torch.linspace(0.1, 0.6, C)), nn.Parameter(torch.zeros(()))
        self.one = nn.Parameter(torch.ones(1))
        self.sigmoid, self.relu, self.fc = nn.Sigmoid(), nn.ReLU(inplace=True), nn.Linear(C, C)
        self.places = nn.Parameter(torch.rand(16, 16))
        self.out = CONVOLUTIONS[dims](C, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.code(self, self.bn(self.conv(x))))


def per_channel(t: Tensor) -> Tensor:
    return t[:, None, None]


def written_into(write: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """A statement whose result nobody takes."""

    def code(net: Any, x: Tensor) -> Tensor:
        write(net, x)
        return x

    return code


Code = Callable[[Any, Tensor], Tensor]

ACTIVATIONS: dict[str, Code] = {
    "F.softplus": lambda net, x: F.softplus(x),
    "clamp(min=0)": lambda net, x: x.clamp(min=0),
    "torch.clamp(x, 0, 6)": lambda net, x: torch.clamp(x, 0, 6),
    "F.prelu with a slope of each channel": lambda net, x: F.prelu(x, net.slope),
    "F.prelu with a slope that is still 1": lambda net, x: F.prelu(x, net.one),
    "x * sigmoid(x)": lambda net, x: x * torch.sigmoid(x),
    "x * sigmoid module": lambda net, x: x * net.sigmoid(x),
    "x * sigmoid(beta x)": lambda net, x: x * torch.sigmoid(net.beta * x),
    "torch.relu_": lambda net, x: torch.relu_(x),
    "F.leaky_relu": lambda net, x: F.leaky_relu(x, 0.1),
    "mish by hand": lambda net, x: x * torch.tanh(F.softplus(x)),
    "gelu by hand": lambda net, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "hardswish by hand": lambda net, x: x * F.relu6(x + 3) / 6,
    "where": lambda net, x: torch.where(x > 0, x, 0.1 * x),
    "maximum": lambda net, x: torch.maximum(x, torch.zeros_like(x)),
    "softsign by hand": lambda net, x: x / (1 + x.abs()),
    "snake": lambda net, x: x + torch.sin(per_channel(net.slope) * x) ** 2 / per_channel(net.slope),
    "square": lambda net, x: x.square(),
    "F.threshold": lambda net, x: F.threshold(x, 0.0, 0.0),
    "torch.ops": lambda net, x: torch.ops.aten.relu(x),
    "after a scaling": lambda net, x: F.relu(x * per_channel(net.slope) + 1),
    "after a dropout": lambda net, x: torch.celu(F.dropout(x, 0.5, net.training)),
    "after contiguous": lambda net, x: F.silu(x.contiguous()),
    "a statement: torch.relu_": written_into(lambda net, x: torch.relu_(x)),
    "a statement: clamp_": written_into(lambda net, x: x.clamp_(min=0)),
    "a statement: inplace=True": written_into(lambda net, x: F.relu(x, inplace=True)),
    "a statement: inplace by its place": written_into(lambda net, x: F.leaky_relu(x, 0.1, True)),
    "a statement: a module": written_into(lambda net, x: net.relu(x)),
}


@pytest.mark.parametrize("code", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_group_ends_before_its_activation_however_that_is_written(code) -> None:
    x = torch.randn(2, 3, 16, 16)
    for norm in (True, False):
        for training in (False, True):
            model = Network(code, norm).train(training)
            report = insert_gates_(model, where="conv", preserve=False, input_shape=x.shape)
            assert [(row.where, row.channels) for row in report.rows] == [("bn" if norm else "conv", C)]
            assert not report.notes
            gated = model.eval()(x)
            remove_gates_(model, force=True)
            assert not torch.allclose(model(x), gated)


@pytest.mark.parametrize("dims", [1, 3])
def test_a_groups_activation_may_have_weights_of_each_channel_in_any_dimension(dims) -> None:
    model = Network(ACTIVATIONS["F.prelu with a slope of each channel"], dims=dims)
    report = insert_gates_(model, where="conv", input_shape=(1, 3, *(8,) * dims))
    assert [row.where for row in report.rows] == ["bn"]


NO_ACTIVATIONS: dict[str, Code] = {
    "nothing": lambda net, x: x,
    "a scaling": lambda net, x: 2 * x + 1,
    "a scale of each channel": lambda net, x: x * per_channel(net.slope),
    "softmax": lambda net, x: F.softmax(x, 1),
    "x less its mean": lambda net, x: x - x.mean((2, 3), keepdim=True),
    "x less the mean of all": lambda net, x: x - x.mean(),
    "a map of mean 0 times a sigmoid": lambda net, x: x * torch.sigmoid((x - x.mean((2, 3), keepdim=True)) ** 2),
    "max pooling": lambda net, x: F.max_pool2d(x, 3, 1, 1),
    "normalize": lambda net, x: F.normalize(x, dim=1),
    "attention": lambda net, x: x * torch.sigmoid(net.fc(x.mean((2, 3))))[:, :, None, None],
    "a running sum": lambda net, x: x.cumsum(3),
    "another order": lambda net, x: x.flip(1),
    "a shift": lambda net, x: torch.roll(x, 1, 3),
    "a sum with the places": lambda net, x: x + torch.linspace(0, 1, 16),
    "sorted channels": lambda net, x: x.sort(1)[0],
    "another sample": lambda net, x: x + x.flip(0),
}


@pytest.mark.parametrize("code", NO_ACTIVATIONS.values(), ids=NO_ACTIVATIONS)
def test_what_works_on_several_values_or_only_scales_them_ends_no_group(code) -> None:
    with pytest.raises(ValueError, match="where='conv' finds no convolution with an activation after it"):
        insert_gates_(Network(code), where="conv", input_shape=(1, 3, 16, 16))


# Modules of one's own


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class BetaSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Acon(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p1, self.p2 = nn.Parameter(torch.randn(1, C, 1, 1)), nn.Parameter(torch.randn(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        d = (self.p1 - self.p2) * x
        return d * torch.sigmoid(d) + self.p2 * x


class StillTheIdentity(nn.Module):
    """A PReLU whose slopes are still 1."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * per_channel(self.slope))


class HoldsOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class AsksForChannels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != C:
            raise ValueError(f"built for {C}")
        return x.clamp(min=0)


class OfAutograd(nn.Module):
    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy

    def forward(self, x: Tensor) -> Tensor:
        return self.Clamp.apply(x)


OWN = [Swish, BetaSwish, Acon, StillTheIdentity, HoldsOne, AsksForChannels, OfAutograd]


@pytest.mark.parametrize("act", OWN)
def test_an_activation_of_ones_own_ends_a_group_with_weights_or_without(act) -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), act(), nn.Conv2d(C, 4, 1)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    want = model(x)
    report = insert_gates_(model, where="conv")
    assert [row.where for row in report.rows] == ["2"]
    assert not report.notes
    assert torch.equal(model(x), want)


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.register_buffer("mean", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3)) if self.training else self.mean
        return (x - per_channel(mean)) * per_channel(self.weight)


@pytest.mark.parametrize("act", [nn.ReLU, None])
def test_a_norm_of_ones_own_is_part_of_the_group(act) -> None:
    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, C, 3), OwnNorm(), nn.ReLU()
            self.out = nn.Conv2d(C, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.out(F.relu(y) if act is None else self.act(y))

    report = insert_gates_(Group(), where="conv")
    assert [row.where for row in report.rows] == ["norm" if act is None else "act"]


# What cannot be judged


class TooSmall(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 6:
            raise ValueError("at least 6 x 6")
        return x.relu()


class LayerNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


def place_dependent(net: Any, x: Tensor) -> Tensor:
    return F.relu(x * net.places)


def group_normed(net: Any, x: Tensor) -> Tensor:
    return F.relu(F.group_norm(x, 2))


SKIPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a module that does not run": (
        lambda: nn.Sequential(nn.Conv2d(3, C, 3), TooSmall(), nn.Conv2d(C, C, 3), nn.ReLU(), nn.Conv2d(C, 4, 1)),
        r"left out: 0: whether TooSmall after it is an activation is unknown \(ValueError: at least 6 x 6\)",
    ),
    "a module that is none": (
        lambda: nn.Sequential(nn.Conv2d(3, C, 3), LayerNorm(), nn.Conv2d(C, C, 3), nn.ReLU(), nn.Conv2d(C, 4, 1)),
        "left out: 0: LayerNorm after it works on several values at a time",
    ),
    "a norm of one's own": (
        lambda: nn.Sequential(
            nn.Conv2d(3, C, 3), LayerNorm(), nn.GELU(), nn.Conv2d(C, C, 3), nn.ReLU(), nn.Conv2d(C, 4, 1)
        ),
        "left out: 0: LayerNorm between it and GELU is not a known norm",
    ),
    "code that does not run": (
        lambda: nn.Sequential(Network(place_dependent), nn.Conv2d(4, C, 3), nn.ReLU(), nn.Conv2d(C, 4, 1)),
        r"left out: 0.bn: whether mul after it is an activation is unknown \(RuntimeError: The size of",
    ),
    "a norm as a function": (
        lambda: nn.Sequential(Network(group_normed, False), nn.Conv2d(4, C, 3), nn.ReLU(), nn.Conv2d(C, 4, 1)),
        "left out: 0.conv: group_norm between it and relu is not a known norm",
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_was_skipped_is_reported_with_the_reason(name, capfd) -> None:
    build, note = SKIPPED[name]
    report = insert_gates_(build(), where="conv", input_shape=(1, 3, 16, 16))
    assert len(report.rows) == 1
    assert len(report.notes) == 1
    assert re.match(note, report.notes[0]), report.notes
    assert capfd.readouterr() == ("", "")


def test_judging_an_activation_leaves_it_as_it_is() -> None:
    class Counting(BetaSwish):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    act, seen = Counting(), []
    act.register_forward_hook(lambda m, a, y: seen.append(y))
    model = nn.Sequential(nn.Conv2d(3, C, 3), act, nn.Conv2d(C, 4, 1)).train()
    before, numbers = [p.clone() for p in model.parameters()], torch.get_rng_state()
    assert kind_of(act, (2, C, 4, 4)) == kind_of(act) == "activation"
    assert (act.calls, seen, act.training) == (0, [], True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), numbers)
