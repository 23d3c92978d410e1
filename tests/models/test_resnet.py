"""ECA-ResNets: torchvision's keys and function, where the gates are, what may be a gate, and what is refused."""

import copy
import functools
import pickle

import pytest
import torch
import torchvision
from plain_networks import blocks, plain
from torch import Tensor, nn

from ecanet.models import (
    MODELS,
    ECAResNet,
    SmallECAResNet,
    build_model,
    eca_resnet18,
    eca_resnet34,
    eca_resnet50,
    small_eca_resnet,
)
from ecanet.nn import ECA, ECANS, GATES, SE

DEPTHS = [18, 34, 50, 101, 152]
PICTURES = (2, 3, 64, 64)


def tiny(gate="eca", **kwargs) -> SmallECAResNet:
    return small_eca_resnet(gate, widths=(16, 32), **kwargs)


def kernels(model: nn.Module) -> list[int]:
    return [gate.kernel_size for _, gate in model.gated_norms()]


class Halve(nn.Module):
    """A gate of somebody's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


# torchvision's keys and function


@pytest.mark.parametrize("depth", DEPTHS)
def test_keys_and_shapes_are_torchvisions(depth):
    with torch.device("meta"):
        ours, theirs = ECAResNet(depth, None), torchvision.models.get_model(f"resnet{depth}", weights=None)
        gated = ECAResNet(depth)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert [key for key in gated.state_dict() if not key.endswith(".eca.conv.weight")] == list(shapes)
    assert [key.removesuffix(".eca.conv.weight") for key in gated.state_dict() if ".eca." in key] == [
        name for name, _ in blocks(theirs)
    ]


@pytest.mark.parametrize("depth", [18, 50])
def test_without_a_gate_it_is_torchvisions_network(depth):
    theirs = plain(f"resnet{depth}")
    ours = ECAResNet(depth, None).eval()
    x = torch.randn(PICTURES)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    nn.init.normal_(ours.fc.bias)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_torchvisions_arguments_are_passed_on():
    with torch.device("meta"):
        model = eca_resnet50(
            num_classes=7, groups=32, width_per_group=4, replace_stride_with_dilation=[False, True, True]
        )
        theirs = torchvision.models.resnext50_32x4d(num_classes=7, replace_stride_with_dilation=[False, True, True])
        assert model(torch.empty(PICTURES)).shape == (2, 7)
    shapes = {key: value.shape for key, value in model.state_dict().items() if ".eca." not in key}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


def test_norm_layer_is_passed_on():
    model = ECAResNet(18, norm_layer=functools.partial(nn.GroupNorm, 4))
    assert all(isinstance(norm, nn.GroupNorm) for norm, _ in model.gated_norms())


# Where the gates are


@pytest.mark.parametrize("model", [ECAResNet(18), ECAResNet(50), tiny(blocks=2)], ids=["18", "50", "small"])
def test_every_gate_is_between_the_last_norm_and_the_addition(model):
    pairs = list(model.gated_norms())
    assert [gate for _, gate in pairs] == [block.eca for _, block in blocks(model)]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    residuals: dict[nn.Module, Tensor] = {}
    added: dict[nn.Module, Tensor] = {}

    def keep(module, args, out):
        seen[module] = args[0].clone(), out.clone()

    for norm, gate in pairs:
        norm.register_forward_hook(keep)
        gate.register_forward_hook(keep)
    for _, block in blocks(model):
        block.register_forward_hook(lambda block, _, out: added.update({block: out.clone()}))
        if block.downsample is None:
            block.register_forward_pre_hook(lambda block, args: residuals.update({block: args[0].clone()}))
        else:
            block.downsample.register_forward_hook(
                lambda _, __, out, block=block: residuals.update({block: out.clone()})
            )
    model(torch.randn(PICTURES))
    for (norm, gate), (name, block) in zip(pairs, blocks(model), strict=True):
        assert norm is (block.bn3 if hasattr(block, "bn3") else block.bn2)
        assert torch.equal(seen[gate][0], seen[norm][1]), f"input of the gate of {name}"
        assert torch.equal(added[block], torch.relu(seen[gate][1] + residuals[block])), f"output of {name}"


@pytest.mark.parametrize("build", [lambda gate: ECAResNet(18, gate), tiny], ids=["resnet18", "small"])
def test_a_seed_gives_the_same_backbone_whatever_the_gate(build):
    def backbone(gate):
        torch.manual_seed(3)
        model = build(gate)
        gates = {id(gate) for _, gate in model.gated_norms()}
        names = [name for name, module in model.named_modules() if id(module) in gates]
        return {k: v for k, v in model.state_dict().items() if not any(k.startswith(f"{name}.") for name in names)}

    want = backbone(None)
    for gate in ("eca", "se", "se_var3", "eca_ns"):
        got = backbone(gate)
        assert got.keys() == want.keys(), gate
        assert all(torch.equal(got[key], want[key]) for key in want), gate


# kernel_size


@pytest.mark.parametrize(
    ("build", "kernel_size", "want"),
    [
        (eca_resnet18, "adaptive", [3, 3, 5, 5, 5, 5, 5, 5]),
        (eca_resnet18, "released", [3, 3, 5, 5, 7, 7, 7, 7]),
        (eca_resnet18, 9, [9] * 8),
        (eca_resnet18, (1, 3, 5, 7), [1, 1, 3, 3, 5, 5, 7, 7]),
        (eca_resnet18, [7, 5, 3, 1], [7, 7, 5, 5, 3, 3, 1, 1]),
        (eca_resnet34, "released", [3] * 3 + [3] * 4 + [5] * 6 + [7] * 3),
        (eca_resnet50, "adaptive", [5] * 13 + [7] * 3),
        (eca_resnet50, "released", [3] * 3 + [5] * 4 + [5] * 6 + [7] * 3),
        (small_eca_resnet, (3, 5, 7), [3, 5, 7]),
    ],
)
def test_kernel_size(build, kernel_size, want):
    with torch.device("meta"):
        assert kernels(build(kernel_size=kernel_size)) == want


def test_kernel_size_of_another_gate_that_has_one():
    with torch.device("meta"):
        assert kernels(eca_resnet18("eca_ns", kernel_size="released")) == [3, 3, 5, 5, 7, 7, 7, 7]
        assert kernels(eca_resnet18(functools.partial(ECA, circular=True), kernel_size=9)) == [9] * 8
        assert kernels(eca_resnet18(functools.partial(ECA, kernel_size=3))) == [3] * 8  # its own, where none is given


def test_a_network_without_gates_ignores_the_kernel_size():
    assert list(tiny(None, kernel_size=3).gated_norms()) == []


# What may be a gate


@pytest.mark.parametrize("gate", [None, *GATES], ids=str)
def test_every_gate_forward_and_backward(gate):
    model = tiny(gate)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("gate", "kind"),
    [
        (ECA, ECA),
        (ECANS, ECANS),
        (functools.partial(SE, reduction=4), SE),
        (functools.partial(ECA, circular=True), ECA),
        (lambda channels: SE(channels, reduction=2), SE),
        (lambda channels: ECA(channels, 3) if channels < 32 else SE(channels), (ECA, SE)),
        (Halve, Halve),
        (lambda channels: nn.Identity(), nn.Identity),
    ],
    ids=["class", "another class", "partial", "partial eca", "function", "by width", "own module", "identity"],
)
def test_a_gate_given_as_a_class_or_a_function(gate, kind):
    model = tiny(gate)
    gates = [gate for _, gate in model.gated_norms()]
    assert len(gates) == 2
    assert all(isinstance(gate, kind) for gate in gates)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_built_by_name(name):
    with torch.device("meta"):
        model = build_model(name, gate="se", num_classes=3)
    assert model.get_submodule(model.classifier_name).out_features == 3
    assert model.config["gate"] == "se"


# Mistakes


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ECAResNet(20), ValueError, r"depth must be one of \[18, 34, 50, 101, 152\], got 20"),
        (lambda: eca_resnet18("ecaa"), ValueError, "gate must be one of .*'eca'.* got 'ecaa'"),
        (lambda: eca_resnet18(ECA(64)), TypeError, "every block needs a gate of its own"),
        (lambda: eca_resnet18(3), TypeError, "gate must be a name, a class or a function"),
        (lambda: eca_resnet18(lambda c: c), TypeError, "must return a torch.nn.Module, got int"),
        (lambda: eca_resnet18("se", kernel_size=3), ValueError, "kernel_size=3 was given, but gate='se' has no"),
        (lambda: eca_resnet18(kernel_size=4), ValueError, "kernel_size must be odd.*got 4: try 3 or 5"),
        (lambda: eca_resnet18(kernel_size=(3, 3, 2, 3)), ValueError, "kernel_size must be odd.*got 2"),
        (lambda: eca_resnet18(kernel_size=-1), ValueError, "positive odd integer, got -1"),
        (lambda: eca_resnet18(kernel_size=(3, 5, 7)), ValueError, r"each of the 4 stages, got 3: \[3, 5, 7\]"),
        (lambda: eca_resnet18(kernel_size="relased"), ValueError, "'adaptive', 'released', an odd.* got 'relased'"),
        (lambda: eca_resnet18(kernel_size=3.0), TypeError, "must be an odd integer, got 3.0"),
        (lambda: eca_resnet18(kernel_size=None), TypeError, "must be an odd integer, got None"),
        (lambda: eca_resnet18(kernel_size=True), TypeError, "must be an odd integer, got True"),
        (lambda: eca_resnet18(kernel_size=torch.tensor([3, 5, 5, 7])), TypeError, "must be an odd integer"),
        (lambda: tiny(kernel_size="released"), ValueError, "released weights .*resnet50.* not small_resnet"),
        (lambda: tiny("se_var1", neutral=True), ValueError, "SEVar1 cannot be made neutral"),
        (lambda: tiny(Halve, neutral=True), ValueError, r"gate Halve has no make_neutral_\(\)"),
        (lambda: small_eca_resnet(widths=()), ValueError, "widths must name .* at least one stage"),
        (lambda: small_eca_resnet(blocks=0), ValueError, "blocks must be 1 or more, got 0"),
        (lambda: build_model("resnet50"), ValueError, "name must be one of eca_resnet18, .* got 'resnet50'"),
    ],
)
def test_mistakes_are_named(build, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        build()


# Neutral start, copies, compilation


@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_a_neutral_start_is_the_plain_network(zero_init_residual):
    models = []
    for gate in (None, "eca"):
        torch.manual_seed(5)
        models.append(eca_resnet18(gate, neutral=True, zero_init_residual=zero_init_residual))
    x = torch.randn(PICTURES)
    torch.testing.assert_close(models[1](x), models[0](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("gate", ["eca", "se", Halve], ids=["eca", "se", "own"])
def test_copies(copied, gate):
    model = tiny(gate).eval()
    twin = copied(model)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(twin(x), model(x))
    assert twin.config == model.config
    nn.init.zeros_(twin.fc.weight)
    assert model.fc.weight.any()


@pytest.mark.parametrize("gate", [None, "eca"], ids=str)
def test_compiles_without_a_graph_break(gate):
    model = tiny(gate).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_channels_last_and_half_types():
    model = tiny().to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 3, 16, 16)
    want = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-4)
    got = model.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)
