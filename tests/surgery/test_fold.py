"""fold_factors_: the factor in the norm, with the keys of the authors' files, and back."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torchvision
from networks import (
    GATES_WITH_WEIGHTS,
    assert_same_state,
    build,
    gated_resnet18,
    images,
    randomise_,
    relative_difference,
    resnet18,
)
from torch import Tensor, nn

import ecanet
from ecanet import ECA, fold_factors_, insert_gates_, remove_gates_, replace_gates_
from ecanet.inspect import gates


def copied(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Of one network that is made once."""
    once = functools.cache(make)
    return lambda: copy.deepcopy(once())


def train_(model: nn.Module) -> None:
    for gate in gates(model).values():
        for weight in gate.parameters():
            nn.init.normal_(weight)


NETWORKS = {
    "inserted": gated_resnet18,
    "MobileNetV2": copied(lambda: insert(build("torchvision/mobilenet_v2"))),
    "ECA-ResNet": copied(lambda: randomise_(ecanet.models.eca_resnet18(neutral=True)).eval()),
    "ECA-MobileNetV2": copied(lambda: randomise_(ecanet.models.eca_mobilenet_v2(neutral=True)).eval()),
}
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def insert(model: nn.Module) -> nn.Module:
    insert_gates_(model)
    return model


@pytest.mark.parametrize("trained", [False, True], ids=["neutral", "trained"])
@every_network
def test_the_function_stays_bit_for_bit_and_back(network, trained) -> None:
    model, x = network(), images()
    if trained:
        train_(model)
    before, state = model(x), copy.deepcopy(model.state_dict())
    names = fold_factors_(model)
    assert names == list(gates(model))
    assert torch.equal(model(x), before)
    assert not any(key.endswith("scale") for key in model.state_dict())
    assert fold_factors_(model) == []
    assert fold_factors_(model, factor=2.0) == names
    assert_same_state(model.state_dict(), state)
    assert torch.equal(model(x), before)


def test_what_is_folded_is_what_fold_true_makes() -> None:
    torch.manual_seed(0)
    first = resnet18()
    second = copy.deepcopy(first)
    fold_factors_(insert(first))
    insert_gates_(second, fold=True)
    assert_same_state(first.state_dict(), second.state_dict())
    assert torch.equal(second.layer1[0].bn2.weight, 2 * resnet_before(second).layer1[0].bn2.weight)


def resnet_before(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    remove_gates_(plain, fold=True)
    return plain


def test_networks_of_the_library_fold_at_once() -> None:
    plain = randomise_(ecanet.models.eca_resnet18(None, num_classes=5)).eval()
    model = ecanet.models.eca_resnet18(num_classes=5, weights=plain.state_dict(), fold=True).eval()
    x = images()
    assert torch.equal(model(x), plain(x))
    assert list(model.state_dict()) == list(ecanet.models.eca_resnet18(num_classes=5).state_dict())
    assert torch.equal(model.layer1[0].bn2.bias, 2 * plain.layer1[0].bn2.bias)
    assert (model.config["neutral"], model.config["fold"], model.config["factor"]) == (True, True, 1.0)


@every_network
def test_folded_gates_can_be_taken_out(network) -> None:
    model, x = network(), images()
    if not hasattr(model, "gated_norms"):
        before = model(x)
        fold_factors_(model)
        with pytest.raises(ValueError, match=r"are constant, but not 1.*fold=True multiplies the norms before them"):
            remove_gates_(model)
        assert torch.equal(model(x), before)
        remove_gates_(model, fold=True)
        assert torch.equal(model(x), before)
        assert not gates(model)


def test_folded_gates_are_replaced_by_gates_of_their_value() -> None:
    model, x = resnet18(), images()
    before = model(x)
    insert_gates_(model, fold=True)
    replace_gates_(model, "se")
    assert torch.equal(model(x), before)
    assert {gate.factor for gate in gates(model).values()} == {1.0}


@pytest.mark.parametrize("gate", GATES_WITH_WEIGHTS)
def test_other_factors(gate) -> None:
    model, x = resnet18().double(), images(dtype=torch.float64)
    insert_gates_(model, gate)
    train_(model)
    before, factors = model(x), {gate.factor for gate in gates(model).values()}
    if all(gate.weights_on_means() for gate in gates(model).values()):
        fold_factors_(model, factor=1.7)
        factors = {1.7}
    else:  # what is added below the roots of a gate that sees variances does not scale with the map
        with pytest.raises(ValueError, match="has no plain weights of its own that could compensate"):
            fold_factors_(model, factor=1.7)
    assert relative_difference(model(x), before) < 1e-12
    assert {gate.factor for gate in gates(model).values()} == factors


class Branch(nn.Module):
    """A residual branch that ends in what it is given."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 3, 1), end

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.conv(x))


def parametrized() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


@pytest.mark.parametrize(
    "end", [nn.ReLU(), nn.BatchNorm2d(3, affine=False), parametrized()], ids=["no norm", "no weight", "parametrized"]
)
def test_where_nothing_could_take_it_nothing_changes(end) -> None:
    model = nn.Sequential(Branch(nn.BatchNorm2d(3)), Branch(end)).eval()
    keep = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the gate after 1\.end cannot be folded.*leave it in the gate"):
        insert_gates_(model, where=["0.end", "1.end"], fold=True, input_shape=(1, 3, 8, 8))
    assert_same_state(model.state_dict(), keep)
    insert_gates_(model, where=["0.end", "1.end"], input_shape=(1, 3, 8, 8))
    keep = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"factor of 1\.end\.gate cannot be folded"):
        fold_factors_(model)
    assert_same_state(model.state_dict(), keep)


def test_trained_gates_without_weights_keep_their_factor() -> None:
    model = resnet18()
    insert_gates_(model, "se_var1", preserve=False)
    for gate in gates(model).values():
        gate.factor = 2.0
    with pytest.raises(ValueError, match=r"layer1\.0\.bn2\.gate cannot be folded: .* not constant, and a SEVar1"):
        fold_factors_(model)


def test_weights_that_two_norms_share_take_none() -> None:
    model = resnet18()
    model.layer1[1].bn2.weight = model.layer1[0].bn2.weight
    insert_gates_(model)
    with pytest.raises(ValueError, match="another module shares the weights"):
        fold_factors_(model)


def test_the_authors_file_takes_the_place_of_a_folded_network() -> None:
    torch.manual_seed(0)
    authors = randomise_(ecanet.models.eca_resnet18(num_classes=5)).eval()
    model = ecanet.models.eca_resnet18(num_classes=5, neutral=True, fold=True).eval()
    model.load_state_dict(authors.state_dict())
    x = images()
    assert torch.equal(model(x), authors(x))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="factor must be finite and above 0, got 0"):
        fold_factors_(resnet18(), factor=0)
    assert fold_factors_(nn.Sequential(nn.Conv2d(3, 3, 1), ECA(3))) == []
    with torch.device("meta"):
        model = insert(torchvision.models.resnet18())
    assert len(fold_factors_(model)) == 8


def one_for_all() -> nn.Module:
    """A network of two branches whose norms share a gate."""
    gate = ECA(3)
    model = nn.Sequential(Branch(nn.BatchNorm2d(3)), Branch(nn.BatchNorm2d(3))).eval()
    insert_gates_(model, lambda channels: gate, where=["0.end", "1.end"], input_shape=(1, 3, 8, 8))
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(Branch(nn.BatchNorm2d(3))).eval()
    model[0].end.register_forward_hook(lambda module, args, output: output + 1)
    insert_gates_(model, where="0.end", input_shape=(1, 3, 8, 8))
    return model


def tied() -> nn.Module:
    model = nn.Sequential(Branch(nn.BatchNorm2d(3)), Branch(nn.BatchNorm2d(3))).eval()
    insert_gates_(model, where=["0.end", "1.end"], input_shape=(1, 3, 8, 8))
    train_(model)
    model[1].end.gate.conv.weight = model[0].end.gate.conv.weight
    return model


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (one_for_all, "follows several modules"),
        (hooked, "not a norm with a plain weight"),
        (tied, "weights of its own"),
    ],
    ids=["one gate for all", "a hook on the norm", "gates that share a weight"],
)
def test_what_would_change_the_function_is_refused(build, says) -> None:
    model, x = build(), torch.randn(2, 3, 8, 8)
    before, state = model(x), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=says):
        fold_factors_(model)
    assert_same_state(model.state_dict(), state)
    assert torch.equal(model(x), before)


def test_one_gate_for_several_places_cannot_be_folded_at_once_and_comes_out_whole() -> None:
    gate = ECA(3)
    model, x = nn.Sequential(Branch(nn.BatchNorm2d(3)), Branch(nn.BatchNorm2d(3))).eval(), torch.randn(2, 3, 8, 8)
    before = model(x)
    places = {"where": ["0.end", "1.end"], "input_shape": (1, 3, 8, 8)}
    with pytest.raises(ValueError, match="a separate gate for every place"):
        insert_gates_(model, lambda channels: gate, fold=True, **places)
    insert_gates_(model, lambda channels: gate, **places)
    assert len(remove_gates_(model).rows) == 2
    assert torch.equal(model(x), before)


def test_config_says_what_folding_and_plain_weights_made_of_a_network(tmp_path) -> None:
    plain = ecanet.models.small_eca_resnet(None, num_classes=5).state_dict()
    for change in (fold_factors_, lambda m: m.load_state_dict(plain), lambda m: fold_factors_(m, factor=1.5)):
        for fold in (False, True):
            model = ecanet.models.small_eca_resnet(num_classes=5, neutral=True, fold=fold).eval()
            change(model)
            model.save_pretrained(tmp_path)
            again = type(model).from_pretrained(tmp_path)
            x = images(32)
            assert torch.equal(again(x), model(x))
