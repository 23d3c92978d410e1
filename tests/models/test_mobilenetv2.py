"""ECA-MobileNetV2: torchvision's keys and function, where the gates are, and what is refused."""

import functools

import pytest
import torch
import torchvision
from plain_networks import blocks, plain
from torch import Tensor, nn

from ecanet.models import ECAMobileNetV2, eca_mobilenet_v2
from ecanet.nn import GATES, SE

PICTURES = (2, 3, 64, 64)


def narrow(gate="eca", **kwargs) -> ECAMobileNetV2:
    return eca_mobilenet_v2(gate, width_mult=0.5, num_classes=10, **kwargs)


def test_keys_and_shapes_are_torchvisions():
    with torch.device("meta"):
        ours, theirs, gated = eca_mobilenet_v2(None), torchvision.models.mobilenet_v2(), eca_mobilenet_v2()
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    added = [key for key in gated.state_dict() if key not in shapes]
    # The gate follows the projection and its norm: the first block has no expansion before them.
    assert added == [f"features.{n}.conv.{3 if n == 1 else 4}.conv.weight" for n in range(1, 18)]


def test_without_a_gate_it_is_torchvisions_network():
    theirs = plain("mobilenet_v2")
    ours = eca_mobilenet_v2(None).eval()
    x = torch.randn(PICTURES)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    nn.init.normal_(ours.classifier[1].bias)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_torchvisions_arguments_are_passed_on():
    model = narrow(dropout=0.4, norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3))
    assert model.classifier[0].p == 0.4
    assert {norm.eps for norm, _ in model.gated_norms()} == {1e-3}
    assert next(model.gated_norms())[1].channels == 8  # 16 channels, half as wide


def test_every_gate_is_between_the_last_norm_and_the_addition():
    model = narrow()
    pairs = list(model.gated_norms())
    assert len(pairs) == 17
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module, args, out):
        seen[module] = args[0].clone(), out.clone()

    for module in [module for pair in pairs for module in pair] + [block for _, block in blocks(model)]:
        module.register_forward_hook(keep)
    model(torch.randn(PICTURES))
    for (norm, gate), (name, block) in zip(pairs, blocks(model), strict=True):
        assert isinstance(norm, nn.BatchNorm2d)
        assert torch.equal(seen[gate][0], seen[norm][1]), f"input of the gate of {name}"
        gated = seen[gate][1]
        want = seen[block][0] + gated if block.use_res_connect else gated
        assert torch.equal(seen[block][1], want), f"output of {name}"


def test_a_seed_gives_the_same_backbone_whatever_the_gate():
    def backbone(gate):
        torch.manual_seed(3)
        model = narrow(gate)
        last = {name: str(len(block.conv) - 1) for name, block in blocks(model)} if gate else {}
        gates = tuple(f"{name}.conv.{i}." for name, i in last.items())
        return {key: value for key, value in model.state_dict().items() if not key.startswith(gates or "-")}

    want = backbone(None)
    for gate in ("eca", "se", "se_var3"):
        got = backbone(gate)
        assert got.keys() == want.keys(), gate
        assert all(torch.equal(got[key], want[key]) for key in want), gate


@pytest.mark.parametrize(
    ("kernel_size", "want"),
    [
        ("adaptive", [3] * 10 + [3] * 3 + [5] * 4),  # 16 to 96 channels, then 160 and 320
        ("released", [1] * 10 + [3] * 7),
        (5, [5] * 17),
        ((1, 3, 5, 7, 9, 11, 13), [1] + [3] * 2 + [5] * 3 + [7] * 4 + [9] * 3 + [11] * 3 + [13]),
    ],
)
def test_kernel_size(kernel_size, want):
    with torch.device("meta"):
        model = eca_mobilenet_v2(kernel_size=kernel_size)
    assert [gate.kernel_size for _, gate in model.gated_norms()] == want


# 16 groups, or groups of 16, are not to be had in the stage of 24 channels.
IMPOSSIBLE = {"se_gc1", "se_gc2"}


@pytest.mark.parametrize("gate", [None, *sorted(GATES.keys() - IMPOSSIBLE)], ids=str)
def test_every_gate_forward_and_backward(gate):
    model = eca_mobilenet_v2(gate, num_classes=10)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("gate", "reduction"),
    [("se", 8), (SE, 8), (functools.partial(SE, reduction=4), 4), (lambda channels: SE(channels), 16)],
    ids=["name", "class", "partial", "function"],
)
def test_reduction_of_se(gate, reduction):
    with torch.device("meta"):
        assert {gate.reduction for _, gate in eca_mobilenet_v2(gate).gated_norms()} == {reduction}


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: eca_mobilenet_v2("sea"), ValueError, "gate must be one of .* got 'sea'"),
        (lambda: eca_mobilenet_v2(nn.Identity()), TypeError, "every block needs a gate of its own"),
        (lambda: eca_mobilenet_v2("se", kernel_size=3), ValueError, "kernel_size=3 .* has no kernel size"),
        (lambda: eca_mobilenet_v2(kernel_size=(3, 5, 5, 7)), ValueError, "each of the 7 stages, got 4"),
        (lambda: eca_mobilenet_v2(kernel_size=2), ValueError, "must be odd.* got 2"),
        (lambda: eca_mobilenet_v2("se_gc1"), ValueError, "groups must divide channels=24, got 16"),
        (lambda: eca_mobilenet_v2("se_gc2"), ValueError, "multiple of 16 .* got 24"),
        (lambda: eca_mobilenet_v2("se_var1", neutral=True), ValueError, "SEVar1 cannot be made neutral"),
    ],
)
def test_mistakes_are_named(build, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        build()


def test_a_neutral_start_is_the_plain_network():
    models = []
    for gate in (None, "eca"):
        torch.manual_seed(5)
        models.append(narrow(gate, neutral=True).eval())
    x = torch.randn(PICTURES)
    torch.testing.assert_close(models[1](x), models[0](x), rtol=1e-5, atol=1e-6)
