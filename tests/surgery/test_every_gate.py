"""Every gate of GATES in surgery: those that start as 1 without a factor, those with a shift, and one for another."""

import copy

import pytest
import timm
import torch
import torchvision
from networks import randomise_
from torch import Tensor, nn

import ecanet
from ecanet import fuse_tails_, insert_gates_, remove_gates_, replace_gates_
from ecanet.nn import GATES, GRN, SRM, Gate, MomentGate, build_gate
from ecanet.nn.tail.maths import ScaleAndShift, Statistics

C = 64


def can_be_neutral(name: str) -> bool:
    try:
        build_gate(name, C).make_identity_()
    except ValueError:
        return False
    return True


NEUTRAL = [name for name in GATES if can_be_neutral(name)]
#: Those that are 1 at their start without a factor, so that nothing is rounded.
IDENTITIES = [name for name in NEUTRAL if build_gate(name, C).neutral_value == 1]


def test_gct_and_grn_are_among_those_that_start_as_one() -> None:
    assert {"gct", "grn"} <= set(IDENTITIES)


def branch() -> nn.Sequential:
    """One place for a gate, after the norm."""
    return randomise_(nn.Sequential(nn.Conv2d(3, C, 3, bias=False), nn.BatchNorm2d(C))).eval()


def gate_of(model: nn.Module) -> Gate:
    [gate] = [module for module in model.modules() if isinstance(module, Gate)]
    return gate


@torch.no_grad()
def train_(gate: nn.Module) -> None:
    for parameter in gate.parameters():
        parameter.uniform_(0.1, 0.5)


@pytest.fixture(scope="module", params=["resnet50", "convnext_atto"])
def network(request) -> nn.Module:
    library = torchvision.models if hasattr(torchvision.models, request.param) else timm.models
    return randomise_(getattr(library, request.param)(num_classes=4))


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_outputs_after_an_identity_start_are_those_before_bit_for_bit(network, name) -> None:
    plain, gated, x = copy.deepcopy(network), copy.deepcopy(network), torch.randn(2, 3, 32, 32)
    assert len(insert_gates_(gated, name, input_shape=(1, 3, 32, 32)).rows) >= 12
    assert all(gate.scale is None for gate in gated.modules() if isinstance(gate, Gate))

    def check(way: str) -> None:
        for training in (True, False):  # running statistics move in the first
            with torch.no_grad():
                assert torch.equal(gated.train(training)(x), plain.train(training)(x)), (way, training)

    check("plain")
    with ecanet.backend("reference"):
        check("reference")
    if isinstance(network, torchvision.models.ResNet):
        assert len(fuse_tails_(gated).rows) == len(fuse_tails_(plain).rows) == 16
        check("fused")


def test_a_gate_that_starts_as_one_needs_no_folding_and_comes_out_again() -> None:
    for name in IDENTITIES:
        model = branch()
        keys = list(model.state_dict())
        insert_gates_(model, name, "1", fold=True)
        assert gate_of(model).factor == 1
        model.load_state_dict({key: model.state_dict()[key] for key in keys}, strict=True)
        remove_gates_(model)
        assert list(model.state_dict()) == keys


def test_gates_without_values_come_out_as_what_they_were_at_their_start() -> None:
    for name in NEUTRAL:
        model = branch()
        insert_gates_(model, name, "1")
        model.to("meta")
        assert len(remove_gates_(model).rows) == 1, name


def test_a_plain_checkpoint_brings_the_plain_function_to_a_network_that_to_empty_gave_memory_of_any_content() -> None:
    x = torch.randn(2, 3, 7, 7)
    for name in NEUTRAL:
        with torch.device("meta"):
            model = branch()
            insert_gates_(model, name, "1", input_shape=None)
        plain = branch()
        model.to_empty(device="cpu")
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                t.fill_(torch.finfo(t.dtype).max if t.is_floating_point() else 1)
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model(x), plain(x)), name


def test_any_gate_takes_the_place_of_any_other_and_starts_from_the_same_value() -> None:
    x = torch.randn(2, 3, 7, 7)
    for old in NEUTRAL:
        for new in GATES:
            neutral, trained = branch(), branch()
            for model in (neutral, trained):
                insert_gates_(model, old, "1", input_shape=None)
            train_(gate_of(trained))
            if new in NEUTRAL:
                before = neutral(x)
                replace_gates_(neutral, new, input_shape=None)
                torch.testing.assert_close(neutral(x), before)
                assert gate_of(neutral).factor == 1 / gate_of(neutral).neutral_value, (old, new)
            replace_gates_(trained, new, input_shape=None)
            assert gate_of(trained).value_at_start == 1, (old, new)


def test_removing_a_trained_gate_says_whether_it_adds_a_shift() -> None:
    model = branch()
    insert_gates_(model, "grn", "1")
    nn.init.ones_(gate_of(model).bias)  # the scale is still 1
    with pytest.raises(ValueError, match="not constant, and some add a shift, so taking them out changes what"):
        remove_gates_(model)
    nn.init.zeros_(gate_of(model).bias)
    nn.init.ones_(gate_of(model).weight)
    with pytest.raises(ValueError, match="not constant, so taking them out changes what"):
        remove_gates_(model)
    remove_gates_(model, force=True, fold=True)
    assert len(list(model.modules())) == 3


class WithoutFactor(MomentGate):
    """Its start is 2, and it forgets the factor."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.zeros(channels))

    def make_neutral_(self) -> float:
        nn.init.zeros_(self.weight)
        return 2.0

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        return 2 + self.weight * statistics.variances, None


class Shifted(Gate):
    """Sees means alone, and adds a shift at its start."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.zeros(channels))

    def make_neutral_(self) -> float:
        return 1.0

    def logits(self, s: Tensor) -> Tensor:
        return s

    def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
        return torch.ones_like(statistics.means), statistics.means


@pytest.mark.parametrize(
    ("gate", "message"), [(WithoutFactor, "return 1 after make_identity_"), (Shifted, "return 1 and no shift after")]
)
def test_a_gate_of_ones_own_that_is_not_one_at_its_start_is_refused(gate, message) -> None:
    model = branch()
    with pytest.raises(ValueError, match=rf"{gate.__name__}\.scale_and_shift\(\) does not {message}"):
        insert_gates_(model, gate, "1")
    assert list(model.state_dict()) == list(branch().state_dict())


def test_asking_whether_a_gate_is_constant_moves_no_running_statistics() -> None:
    class Own(SRM):
        """Not known by its class, so that it is tried out."""

        def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
            return super().scale_and_shift(statistics)

    gate = Own(C).train()
    gate.make_identity_()
    before = copy.deepcopy(gate.state_dict())
    assert gate.constant() == 1
    assert gate.training
    assert gate.bn.training
    assert all(torch.equal(value, before[key]) for key, value in gate.state_dict().items())


def test_a_gate_of_means_alone_with_a_shift_is_no_constant() -> None:
    class Own(type(build_gate("eca", C))):
        def scale_and_shift(self, statistics: Statistics) -> ScaleAndShift:
            scale, _ = super().scale_and_shift(statistics)
            return scale, statistics.means

    gate = Own(C)
    gate.make_neutral_()
    assert gate.constant() is None
    assert GRN(C).constant() == 1
