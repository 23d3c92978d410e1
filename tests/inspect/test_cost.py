from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50
from torchvision.models.mobilenetv2 import InvertedResidual

from ecanet.inspect import gate_parameters, gates, multiply_adds, parameters
from ecanet.nn import ECA, ECANS, GCT, GRN, SE, SRM, Gate, SEGroup, SEVar1, SEVar2, SEVar3, se_gc2
from ecanet.nn.tail.maths import ScaleAndShift, Statistics
from ecanet.surgery.report import gate_row

IMAGE = (1, 3, 224, 224)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def mobilenet_with_eca() -> nn.Module:
    """With the kernel sizes of the released weights."""
    model = mobilenet_v2()
    for block in model.features:
        if isinstance(block, InvertedResidual):
            block.conv.append(ECA(block.out_channels, 1 if block.out_channels < 96 else 3))
    return model


class Small(nn.Module):
    """Two gates, dropout, a norm and a submodule that somebody froze."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.first = ECA(8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.second = SE(8, reduction=4)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.norm(self.first(self.conv(x)))))


class Drawing(nn.Module):
    """Draws random numbers in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = ECA(3)

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x)
        raise RuntimeError("on purpose")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 12), 8 * 3 * 9 * 120),
        (nn.Conv2d(3, 8, 3, stride=2), (2, 3, 11, 11), 2 * 8 * 3 * 9 * 25),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 5, 5), 8 * 9 * 25),
        (nn.Linear(20, 7), (3, 20), 3 * 20 * 7),
        (nn.BatchNorm2d(4), (1, 4, 5, 5), 0),
    ],
    ids=["conv", "strided", "depthwise", "linear", "norm"],
)
def test_layers(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert multiply_adds(layer, shape) == expected


class OfMyOwn(Gate):
    """A gate that nobody has told the counter of: a matrix product, two element-wise ones and a shift."""

    def __init__(self) -> None:
        super().__init__(8)
        self.fc = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.zeros(8))

    def logits(self, s: Tensor) -> Tensor:
        return self.fc(s * self.weight) * s

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        return self.gate(statistics.means), statistics.means


GATES = [
    (ECA(32, 3), 3 * 32),
    (ECA(32, 5, circular=True), 5 * 32),
    (ECANS(32, 3), 3 * 32),
    (ECANS(32, 5, circular=True), 5 * 32),
    (SE(32, reduction=4), 2 * 32 * 8),
    (SE(8, reduction=16), 2 * 8),  # one hidden channel
    (SE(1), 2),
    (SEVar1(32), 0),
    (SEVar2(32), 32),
    (SEVar3(32), 32 * 32),
    (SEVar3(1), 1),
    (SEGroup(32, groups=4), 32 * 32 // 4),
    (SEGroup(32, groups=32), 32),
    (se_gc2(32), 16 * 32),
    (SRM(32), 2 * 32),  # two weights a channel
    (GCT(32), 4 * 32),  # alpha, gamma and two squares
    (GRN(32), 2 * 32),  # the weight and a square
    (OfMyOwn(), 8 * 8 + 2 * 8),
    (ECA(32, 3, factor=2.0), 3 * 32),
]


@pytest.mark.parametrize(("gate", "inside"), GATES, ids=[repr(g).splitlines()[0] + str(n) for g, n in GATES])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spatial", [(5, 7), (6,), (2, 3, 4)], ids=str)
def test_a_gate_costs_its_map_and_its_matrix(gate: Gate, inside: int, batch: int, spatial: tuple[int, ...]) -> None:
    of_map = gate.channels * torch.Size(spatial).numel() * (2 if gate.needs_variances else 1)  # a variance has squares
    assert multiply_adds(gate, (batch, gate.channels, *spatial)) == batch * (of_map + inside)
    assert gate_row("gate", gate, "norm", gate.channels, spatial).multiply_adds == of_map + inside  # surgery's report


def test_resnet50() -> None:
    assert multiply_adds(on_meta(resnet50), IMAGE) == 4_089_184_256


def test_mobilenet_v2_as_in_table_3() -> None:
    plain, eca = on_meta(mobilenet_v2), on_meta(mobilenet_with_eca)
    added = multiply_adds(eca, IMAGE) - multiply_adds(plain, IMAGE)
    assert added == 572_320 + (16 + 2 * 24 + 3 * 32 + 4 * 64) + 3 * (3 * 96 + 3 * 160 + 320)
    assert round(added / 2**20, 1) == 0.5  # 319.9M - 319.4M
    assert parameters(eca) - parameters(plain) == gate_parameters(eca) == 31


def test_a_gate_that_runs_twice_costs_twice() -> None:
    gate = ECA(4, 3)
    assert multiply_adds(nn.Sequential(gate, nn.ReLU(), gate), (1, 4, 5)) == 2 * multiply_adds(gate, (1, 4, 5))


def test_input_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = SEVar2(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x=x)

    assert multiply_adds(Keyword(), (1, 4, 6)) == 4 * 6 + 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_type_and_device_of_the_model(device: torch.device, dtype: torch.dtype) -> None:
    model = Small().to(device, dtype)
    assert multiply_adds(model, (1, 3, 4, 4)) == 8 * 27 * 16 + 2 * 8 * 16 + 3 * 8 + 2 * 8 * 2


def test_the_model_stays_as_it_was() -> None:
    model = Small()
    model.train()
    model.norm.eval()
    modes = [m.training for m in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    multiply_adds(model, (2, 3, 4, 4))
    assert [m.training for m in model.modules()] == modes
    assert hooks(model) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_hooks_of_a_gate_are_called_once_and_its_layers_counted_once() -> None:
    gate, calls = ECA(8, 3), []
    gate.conv.register_forward_hook(lambda *_: calls.append(1))
    assert multiply_adds(gate, (1, 8, 5)) == 8 * 5 + 3 * 8
    assert calls == [1]


def test_the_random_generators_stay_as_they_were(device: torch.device) -> None:
    get_state = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Drawing()).to(device)
    before = get_state()
    multiply_adds(model, (1, 3, 4, 4))
    assert torch.equal(get_state(), before)


def test_a_failing_model_stays_as_it_was() -> None:
    model = Failing()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"):
        multiply_adds(model, (1, 3, 4, 4))
    assert model.training
    assert model.gate.training
    assert hooks(model) == 0
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gate_that_does_not_run_is_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model[0].register_module("unused", ECA(4))
    with pytest.raises(ValueError, match=r"did not run in eval mode: 0\.unused"):
        multiply_adds(model, (1, 3, 4, 4))
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("shape", "error"), [((), ValueError), ((1, 0, 4), ValueError), ((1, 3.0), TypeError), (224, TypeError)], ids=str
)
def test_wrong_shapes(shape: tuple[int, ...], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"input_shape must .*\(1, 3, 224, 224\)"):
        multiply_adds(nn.ReLU(), shape)


def test_parameters_shared_by_modules_count_once() -> None:
    first, second = ECA(8, 3), ECA(8, 3)
    second.conv.weight = first.conv.weight
    model = nn.Sequential(nn.Linear(2, 2), first, second)
    assert gate_parameters(model) == 3
    assert parameters(model) == 3 + 6


def test_only_gates_are_gates() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5))

    model = nn.Sequential(Mine(), nn.Linear(3, 3))
    assert gates(model) == {}
    assert gate_parameters(model) == 0
    assert parameters(model) == 5 + 12


def test_gates_by_name_in_order() -> None:
    model = Small()
    assert list(gates(model).items()) == [("first", model.first), ("second", model.second)]
    assert gates(model.first) == {"": model.first}
