"""What the tail refuses, and with which words."""

import copy
from typing import Any

import pytest
import torch
from tails import C
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import ecanet
from ecanet.nn import ECA, SE, norm_gate_add_act

X = torch.randn(2, C, 3, 3)


def norm_with(name: str, tensor: torch.Tensor, training: bool = True) -> nn.Module:
    norm = nn.BatchNorm2d(C).train(training)
    setattr(norm, name, nn.Parameter(tensor) if name in ("weight", "bias") else tensor)
    return norm


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
    "no eps": ({"norm": nn.BatchNorm2d(C, eps=0.0)}, ValueError, r"eps must be positive during training, but got 0\.0"),
    "eps below 0": ({"norm": nn.BatchNorm2d(C, eps=-1e-3).eval()}, ValueError, "eps must be non-negative, but got"),
    **{
        f"{name} of {size} channels, {'training' if training else 'evaluation'}": (
            {"norm": norm_with(name, torch.ones(size), training)},
            RuntimeError,
            f"{name} should contain {C} elements not {size}",
        )
        for name in ("running_mean", "running_var", "weight", "bias")
        for size, training in ((C + 1, True), (C + 1, False), (1, True))
    },
    "running_mean elsewhere": (
        {"norm": norm_with("running_mean", torch.ones(C, device="meta")), "gate": ECA(C)},
        RuntimeError,
        "device meta is not on the expected device cpu",
    ),
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
